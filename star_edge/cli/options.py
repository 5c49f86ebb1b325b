"""Options that several subcommands share, and what they make of them."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import click
import numpy as np
import PIL.Image
from click.shell_completion import CompletionItem

from .. import refvlm
from ..chat import find_template
from ..engine import StarVLM
from ..errors import ConfigError, StarEdgeError
from ..io.hub import fetch
from ..io.video import Video, read_video
from ..llamacpp.devices import can_offload
from ..llamacpp.names import KV_TYPES
from ..options import AFRESH as AFRESH  # for the commands
from ..options import EncoderOptions, LoadOptions
from ..report import ImageReport, PruneReport
from ..suggestions import nearest
from ..vision.precision import MMPROJ_TYPES
from .words import cli_words as cli_words  # for the commands
from .words import in_cli_words as in_cli_words

if TYPE_CHECKING:
    _ChoiceParam = click.Choice[str]
else:  # not every click since 8.2 has a generic Choice
    _ChoiceParam = click.Choice

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A finite float in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class FilePath(click.Path):
    """A path. An empty one is refused: it must not pass for an option that was left out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


_INT32 = 2**31 - 1
SEED = click.IntRange(0, 2**32 - 1)
_MAX_SIDE = 16384
MAX_THREADS = 512  # GGML_MAX_N_THREADS


def _check_gpu(ctx: click.Context, param: click.Parameter, n_layers: int) -> int:
    if n_layers and not can_offload():
        raise click.BadParameter(
            f"{n_layers}: this llama-cpp-python sees no GPU to put layers on. Leave it out, or install a build for the "
            "GPU.",
            ctx,
            param,
        )
    return n_layers


class Choice(_ChoiceParam):
    """One of some words. A mistyped one gets a suggestion."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = nearest(value, self.choices)
            self.fail(f"{error.message} Did you mean {near}?" if near is not None else error.message, param, ctx)


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Leaves the completion to the shell, which knows files."""
    return [CompletionItem(incomplete, type="file")]


def examples(*lines: str) -> str:
    """The end of a command's help page."""
    return "\n".join(["\b", "Examples:" if len(lines) > 1 else "Example:", *(f"  {line}" for line in lines)])


def _be_quiet(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # huggingface_hub's own, read when it is imported
    return quiet


def quiet_option(command: Command) -> Command:
    """--quiet. It reaches the command as `quiet`."""
    return click.option(
        "-q", "--quiet", is_flag=True, callback=_be_quiet, help="Show results and errors alone, and no progress."
    )(command)


# Options of `model_options` at their defaults that older files of results do not have: they say the same without them
LATER_OPTIONS = (("chat_template", None), ("mmproj_type", EncoderOptions.mmproj_type))


def model_options(command: Command) -> Command:
    """-m, --mmproj, -hf and how to load them. The parameters reach `load_engine` as keyword arguments."""
    options = [
        click.option(
            "-m",
            "--model",
            type=str,
            shell_complete=complete_file,
            help="Text model, GGUF. Default: the reference model that ships with star_edge.",
        ),
        click.option("--mmproj", type=str, shell_complete=complete_file, help="Vision projector of that model, GGUF."),
        click.option(
            "-hf",
            "-hfr",
            "--hf-repo",
            "hf_repo",
            metavar="OWNER/REPO[:QUANT]",
            help="Text model and mmproj from the Hugging Face hub. Default quant: Q4_K_M, then Q8_0, then the first.",
        ),
        click.option("--no-mmproj", is_flag=True, help="With -hf: the text model alone."),
        click.option(
            "-c",
            "--ctx-size",
            "n_ctx",
            type=click.IntRange(0, _INT32),
            default=LoadOptions.n_ctx,
            show_default=True,
            help="Context in tokens, 0 for the model's own.",
        ),
        click.option(
            "-ub",
            "--ubatch-size",
            "n_ubatch",
            type=click.IntRange(1, _INT32),
            default=LoadOptions.n_ubatch,
            show_default=True,
            help="Rows of one compute batch.",
        ),
        click.option(
            "-ngl",
            "--gpu-layers",
            "n_gpu_layers",
            type=click.IntRange(-1, _INT32),
            default=LoadOptions.n_gpu_layers,
            show_default=True,
            callback=_check_gpu,
            help="Layers on the GPU, -1 for all.",
        ),
        click.option(
            "-fa/-no-fa",
            "--flash-attn/--no-flash-attn",
            "flash_attn",
            default=LoadOptions.flash_attn,
            show_default=True,
            help="Flash attention in decoder and encoder.",
        ),
        click.option(
            "-ctk",
            "--cache-type-k",
            "type_k",
            type=Choice(list(KV_TYPES)),
            metavar="TYPE",
            default=LoadOptions.type_k,
            show_default=True,
            help=f"Type of the cached K: {', '.join(KV_TYPES)}.",
        ),
        click.option(
            "-ctv",
            "--cache-type-v",
            "type_v",
            type=Choice(list(KV_TYPES)),
            metavar="TYPE",
            default=LoadOptions.type_v,
            show_default=True,
            help="Type of the cached V, likewise.",
        ),
        click.option(
            "--encoder",
            type=Choice(["repaired", "stock"]),
            default=EncoderOptions.encoder,
            show_default=True,
            help="Put right what this llama.cpp gets wrong with the encoders of LLaVA files, or leave it.",
        ),
        click.option(
            "--mmproj-type",
            type=click.Choice(MMPROJ_TYPES),
            default=EncoderOptions.mmproj_type,
            show_default=True,
            help="Type that the encoder computes in: the mmproj file's, the fastest on this processor (auto), or "
            "another. A converted copy is kept in the user's cache folder.",
        ),
        click.option(
            "--chat-template",
            metavar="FILE|NAME|JINJA",
            shell_complete=complete_file,
            callback=lambda ctx, param, value: (
                None if value is None else find_template(value)
            ),  # now: a worker may have another current folder
            help="Chat template: a file with Jinja source, or a name that llama.cpp knows, such as vicuna. Default: "
            "the model's own, otherwise its family's.",
        ),
        click.option(
            "-t",
            "--threads",
            "n_threads",
            type=click.IntRange(1, MAX_THREADS),
            help="CPU threads. Default: physical cores.",
        ),
        click.option("--verbose", is_flag=True, help="Show llama.cpp's log."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def load_engine(
    model: str | None = None,
    mmproj: str | None = None,
    hf_repo: str | None = None,
    no_mmproj: bool = False,
    **options: Any,
) -> StarVLM:
    """Loads the given files, those of a repository of the hub, or the reference model if none are given."""
    files = find_model(model, mmproj, hf_repo, no_mmproj)
    fit_reference_model(files[0], options)
    return StarVLM(*files, **options)


def fit_reference_model(text: str | Path, options: dict[str, Any]) -> bool:
    """Whether the text model is the reference model. Its context, of 1024 tokens, is n_ctx at most then."""
    is_reference = text == refvlm.TEXT_MODEL
    if is_reference:
        options["n_ctx"] = min(options.get("n_ctx") or 1024, 1024)
    return is_reference


def check_load_options(options: dict[str, Any]) -> None:
    """Raises ConfigError where those of LoadOptions cannot be used, before a model is downloaded."""
    LoadOptions.take(dict(options))


def find_model(
    model: str | None, mmproj: str | None, hf_repo: str | None, no_mmproj: bool
) -> tuple[str | Path, str | Path | None]:
    """Paths of the text model and its mmproj. Downloads them if needed. --mmproj replaces the repository's own.

    Raises:
        ConfigError: Options exclude each other.
        StarEdgeError: As `hub.fetch`.
    """
    if no_mmproj and (hf_repo is None or mmproj is not None):
        raise ConfigError("--no-mmproj is for -hf without --mmproj", "leave it out")
    if hf_repo is not None:
        if model is not None:
            raise ConfigError("-m and -hf both name a model", "give one of them")
        files = fetch(hf_repo, mmproj=mmproj is None and not no_mmproj)
        return files.model, mmproj or files.mmproj
    if model is not None:
        return model, mmproj
    if mmproj is not None:
        raise ConfigError("--mmproj was given without a text model", "add -m TEXT.gguf")
    return refvlm.TEXT_MODEL, refvlm.MMPROJ


def parse_size(text: str, option: str = "--image-size") -> tuple[int, int]:
    """Width and height of a text such as 672x672.

    Raises:
        click.BadParameter: It is not one, or is out of range.
    """
    try:
        width, height = (int(n) for n in text.lower().split("x"))
        if 0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE:
            return width, height
    except ValueError:
        pass
    raise click.BadParameter(
        f"{text[:60]!r} is not a size such as 672x672, of {_MAX_SIDE} pixels a side at most.", param_hint=option
    )


def open_stdin() -> io.TextIOBase:
    """Stdin as UTF-8, whatever the locale says."""
    return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig")


def print_json(data: Any) -> None:
    """Prints one line."""
    click.echo(json.dumps(data, allow_nan=False))


def report_json(report: PruneReport, kept: bool) -> dict[str, Any]:
    """A report for `print_json`. The arrays of its images, such as kept indices and scores, are there with `kept`."""
    data: dict[str, Any] = dict(report.to_dict())
    if not kept:
        arrays = {name for name, kind in get_type_hints(ImageReport).items() if np.ndarray in (kind, *get_args(kind))}
        data["images"] = [{k: v for k, v in image.items() if k not in arrays} for image in data["images"]]
    return data


def save_picture(picture: Any, path: str) -> None:
    """Writes a PIL image.

    Raises:
        ConfigError: The folder does not exist, or the ending is not an image format.
    """
    try:
        picture.save(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} cannot be written ({error})", "use an existing folder and an ending such as .png"
        ) from error


def why_not_writable(path: str) -> str:
    """Why a file cannot be written, as far as that shows before there is anything to write; or ""."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return "there is no such folder"
    return "" if os.access(path if os.path.exists(path) else folder, os.W_OK) else "no permission to write there"


def check_picture_path(path: str) -> None:
    """Checks what `save_picture` needs, before anything is computed.

    Raises:
        ConfigError: The folder does not exist or is not writable, or the ending is not an image format.
    """
    PIL.Image.init()
    known = PIL.Image.registered_extensions().get(Path(path).suffix.lower()) in PIL.Image.SAVE
    cause = why_not_writable(path) if known else f"{Path(path).suffix or 'no ending'} is not an image format"
    if cause:
        raise ConfigError(f"{path} cannot be written ({cause})", "use an existing folder and an ending such as .png")


def save_overlay(report: PruneReport, sources: list[Any], path: str, limits: Any) -> tuple[list[str], list[str]]:
    """Draws each image, with dropped tokens dimmed for each stage; frames of a video on one sheet. Several images get
    -0, -1, ... before the ending.

    Returns:
        The paths that were written, and what could not be drawn or written, with the reason. A problem never costs the
        answer.
    """
    written, problems = [], []
    first = 0  # among the report's pictures
    for i, source in enumerate(sources):
        target = Path(path)
        if len(sources) > 1:
            target = target.with_name(f"{target.stem}-{i}{target.suffix}")
        try:
            picture: Any = list(read_video(source, limits).pictures) if isinstance(source, Video) else source
        except StarEdgeError as error:
            problems.append(f"image {i}: {error}")
            break  # nobody knows how many frames it had
        at, first = first, first + (len(picture) if isinstance(source, Video) else 1)
        try:
            save_picture(report.picture(picture, at, limits), str(target))
        except StarEdgeError as error:
            problems.append(f"image {i}: {error}")
        else:
            written.append(str(target))
    return written, problems
