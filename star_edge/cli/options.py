"""Options that several subcommands share, and what they make of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import PIL.Image

from .. import refvlm
from ..chat import find_template
from ..engine import StarVLM
from ..errors import ConfigError, StarEdgeError
from ..io.configs import resolve_prune
from ..io.hub import fetch
from ..llamacpp.devices import can_offload
from ..llamacpp.names import KV_TYPES
from ..options import AFRESH as AFRESH  # for the commands
from ..options import EncoderOptions, LoadOptions
from ..pruning.config import DEFAULT_PRESET, PRESETS, Keep, PruneConfig, override
from ..report import PruneReport

if TYPE_CHECKING:
    _KeepParam = click.ParamType[Keep]
    _RedundancyParam = click.ParamType[str | float]
else:  # click 8.1 has no generic types of parameters
    _KeepParam = _RedundancyParam = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])


class KeepType(_KeepParam):
    """0.25 or 1.0 is a fraction, 144 a count."""

    name = "fraction|count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Keep:
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a fraction (0.25) nor a count of tokens (144)", param, ctx)


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


class RedundancyType(_RedundancyParam):
    """off, exact, or a number."""

    name = "off|exact|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        if value in ("off", "exact"):
            return str(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither off nor exact nor a number.", param, ctx)


@contextmanager
def in_cli_words() -> Iterator[None]:
    """Errors inside the block name options as they are typed (--vision-keep 2), not as in Python (vision_keep=2)."""
    try:
        yield
    except StarEdgeError as error:
        raise type(error)(cli_words(error.cause), cli_words(error.remedy)) from error


def cli_words(text: str) -> str:
    """The text, with names of Python parameters replaced by the running command's options."""
    context = click.get_current_context(silent=True)
    for param in context.command.params if context is not None else ():
        if not isinstance(param, click.Option):
            continue
        flag = max(param.opts, key=len)
        if param.is_flag:
            off = max(param.secondary_opts, key=len) if param.secondary_opts else None
            text = re.sub(rf"\b{param.name}=True\b", flag, text)
            text = re.sub(rf"\b{param.name}=False\b", off, text) if off else text
        text = re.sub(rf"\b{param.name}=(?=\S)", f"{flag} ", text)
        if "_" in param.name:  # other names are English words too
            text = re.sub(rf"(?<![-\w.]){param.name}(?![\w.])", flag, text)
    return text


def model_options(command: Command) -> Command:
    """-m, --mmproj, -hf and how to load them. The parameters reach `load_engine` as keyword arguments."""
    options = [
        click.option(
            "-m", "--model", type=str, help="Text model, GGUF. Default: the reference model that ships with star_edge."
        ),
        click.option("--mmproj", type=str, help="Vision projector of that model, GGUF."),
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
        ),
        click.option(
            "-ctk",
            "--cache-type-k",
            "type_k",
            type=click.Choice(list(KV_TYPES)),
            default=LoadOptions.type_k,
            show_default=True,
        ),
        click.option(
            "-ctv",
            "--cache-type-v",
            "type_v",
            type=click.Choice(list(KV_TYPES)),
            default=LoadOptions.type_v,
            show_default=True,
        ),
        click.option(
            "--encoder",
            type=click.Choice(["repaired", "stock"]),
            default=EncoderOptions.encoder,
            show_default=True,
            help="Put right what this llama.cpp gets wrong with the encoders of LLaVA files, or leave it.",
        ),
        click.option(
            "--chat-template",
            metavar="FILE|NAME|JINJA",
            callback=lambda ctx, param, value: (
                None if value is None else find_template(value)
            ),  # now: a worker may have another current folder
            help="Chat template: a file with Jinja source, or a name that llama.cpp knows, such as vicuna. Default: "
            "the model's own, otherwise its family's.",
        ),
        click.option(
            "-t", "--threads", "n_threads", type=click.IntRange(1, MAX_THREADS), help="Default: physical cores."
        ),
        click.option("--verbose", is_flag=True, help="Show llama.cpp's log."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


KEEP_HELP = (
    "with a point a fraction of the original (1.0 keeps all), a whole number a count for each image (1 keeps one token)"
)


def prune_options(command: Command) -> Command:
    """--preset and the fields that override it. The parameters reach `make_config` as keyword arguments."""
    options = [
        click.option(
            "--preset",
            type=str,
            default=DEFAULT_PRESET,
            show_default=True,
            help=f"One of {', '.join(PRESETS)}, or a file of star-edge tune.",
        ),
        click.option("--vision-keep", type=KeepType(), help=f"Image tokens to keep after the encoder: {KEEP_HELP}."),
        click.option(
            "--vision-tolerance",
            type=click.FloatRange(min=0, min_open=True),
            help="Keep more than --vision-keep where the picture needs it: until each dropped token is within this "
            "share of the mean distance between tokens from the one that stands for it, such as 0.2. "
            "--vision-keep without it leaves the preset's out.",
        ),
        click.option(
            "--decoder-keep",
            type=KeepType(),
            help="Image tokens to keep from layer K on, likewise. A stage of the preset that contradicts "
            "what is given here is left out.",
        ),
        click.option("--decoder-layer", type=int, help="Layer K, 1 to layers - 1. Default: chosen for the model."),
        click.option(
            "--budget",
            type=click.Choice(["image", "crop", "prompt"]),
            help="Who shares tokens: the crops of an image (default), none, or all images, such as the frames of a "
            "video.",
        ),
        click.option(
            "--image-max-tokens",
            type=KeepType(),
            help="Make larger pictures smaller, until they take so many image tokens: a fraction of those at full size "
            "(0.5) or a count. With --preset off that is all that is done.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def encoder_prune_options(command: Command) -> Command:
    """--redundancy, --encoder-keep and --encoder-layer, for `make_config` too."""
    options = [
        click.option(
            "--redundancy",
            type=RedundancyType(),
            help="Tokens left out before the encoder because a neighbour shows the same: off (default), exact, or the "
            "largest difference of pixels, such as 0.03.",
        ),
        click.option(
            "--encoder-keep", type=KeepType(), help="Image tokens to keep within the encoder from its layer M on."
        ),
        click.option(
            "--encoder-layer", type=int, help="Layer M, 1 to layers of the encoder - 1. Default: a quarter of them."
        ),
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
    with in_cli_words():
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


def make_config(
    preset: str,
    vision_keep: Keep | None,
    decoder_keep: Keep | None,
    decoder_layer: int | None,
    budget: str | None,
    **more: Any,
) -> PruneConfig | None:
    """The config of `prune_options`. more: the fields of the other options."""
    config = resolve_prune(preset)  # errors in a file keep the file's words
    with in_cli_words():
        return override(
            config,
            vision_keep=vision_keep,
            decoder_keep=decoder_keep,
            decoder_layer=decoder_layer,
            budget=budget,
            **more,
        )


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


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


def check_picture_path(path: str) -> None:
    """Checks what `save_picture` needs, before anything is computed.

    Raises:
        ConfigError: The folder does not exist, or the ending is not an image format.
    """
    PIL.Image.init()
    known = PIL.Image.registered_extensions().get(Path(path).suffix.lower()) in PIL.Image.SAVE
    if not known or not Path(path).parent.is_dir():
        cause = "the folder does not exist" if known else f"{Path(path).suffix or 'no ending'} is not an image format"
        raise ConfigError(f"{path} cannot be written ({cause})", "use an existing folder and an ending such as .png")


def save_overlay(report: PruneReport, sources: list[Any], path: str, limits: Any) -> tuple[list[str], list[str]]:
    """Draws each image, with dropped tokens dimmed for each stage. Several images get -0, -1, ... before the ending.

    Returns:
        The paths that were written, and what could not be drawn or written, with the reason. A problem never costs the
        answer.
    """
    written, problems = [], []
    for i, source in enumerate(sources):
        target = Path(path)
        if len(sources) > 1:
            target = target.with_name(f"{target.stem}-{i}{target.suffix}")
        try:
            save_picture(report.picture(source, i, limits), str(target))
        except StarEdgeError as error:
            problems.append(f"image {i}: {error}")
        else:
            written.append(str(target))
    return written, problems
