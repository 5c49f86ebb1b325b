"""Options that several subcommands share, and what they make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import refvlm
from ..chat import find_template
from ..config import DEFAULT_PRESET, PRESETS, Keep, PruneConfig, override, resolve_prune
from ..engine import KV_TYPES, StarVLM
from ..errors import ConfigError
from ..hub import fetch
from ..report import PruneReport


class KeepType(click.ParamType):
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


def model_options(command: Callable) -> Callable:
    """-m, --mmproj, -hf and how to load them; the parameters reach `load_engine` as keyword arguments."""
    options = [
        click.option("-m", "--model", type=str, help="Text model, GGUF. Default: the reference model that ships with star_edge."),
        click.option("--mmproj", type=str, help="Vision projector of that model, GGUF."),
        click.option(
            "-hf",
            "-hfr",
            "--hf-repo",
            "hf_repo",
            metavar="OWNER/REPO[:QUANT]",
            help="Text model and mmproj from the Hugging Face hub. Default quant: Q4_K_M, else Q8_0, else the first.",
        ),
        click.option("--no-mmproj", is_flag=True, help="With -hf: the text model alone."),
        click.option(
            "-c", "--ctx-size", "n_ctx", type=int, default=4096, show_default=True, help="Context in tokens, 0 for the model's own."
        ),
        click.option("-ub", "--ubatch-size", "n_ubatch", type=int, default=512, show_default=True, help="Rows of one compute batch."),
        click.option("-ngl", "--gpu-layers", "n_gpu_layers", type=int, default=0, show_default=True, help="Layers on the GPU, -1 for all."),
        click.option("-fa/-no-fa", "--flash-attn/--no-flash-attn", "flash_attn", default=True, show_default=True),
        click.option("-ctk", "--cache-type-k", "type_k", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True),
        click.option("-ctv", "--cache-type-v", "type_v", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True),
        click.option(
            "--encoder",
            type=click.Choice(["repaired", "stock"]),
            default="repaired",
            show_default=True,
            help="Put right what this llama.cpp gets wrong with the encoders of LLaVA files, or leave it.",
        ),
        click.option(
            "--chat-template",
            metavar="FILE|NAME|JINJA",
            callback=lambda ctx, param, value: None if value is None else find_template(value),  # whoever gets it may have another folder
            help="Chat template: a file with Jinja source, or a name that llama.cpp knows, such as vicuna. Default: the model's own, else its family's.",
        ),
        click.option("-t", "--threads", "n_threads", type=int, help="Default: physical cores."),
        click.option("--verbose", is_flag=True, help="Show llama.cpp's log."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def prune_options(command: Callable) -> Callable:
    """--preset and the fields that override it; the parameters reach `make_config` as keyword arguments."""
    options = [
        click.option(
            "--preset",
            type=str,
            default=DEFAULT_PRESET,
            show_default=True,
            help=f"One of {', '.join(PRESETS)}, or a file of star-edge tune.",
        ),
        click.option("--vision-keep", type=KeepType(), help="Image tokens to keep after the encoder: fraction of the original, or count."),
        click.option("--decoder-keep", type=KeepType(), help="Image tokens to keep from layer K on, likewise."),
        click.option("--decoder-layer", type=int, help="Layer K, 1 to layers - 1. Default: chosen for the model."),
        click.option(
            "--budget",
            type=click.Choice(["image", "crop", "prompt"]),
            help="Who shares tokens: the crops of an image (default), none, or all images, such as the frames of a video.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


# Where times are compared, or two ways of reading a prompt, nothing may come from an earlier request.
AFRESH: dict[str, Any] = {"image_cache_bytes": 0, "reuse": False}


def load_engine(
    model: str | None = None, mmproj: str | None = None, hf_repo: str | None = None, no_mmproj: bool = False, **options: Any
) -> StarVLM:
    """The engine for the given files, for those of a repository of the hub, or for the reference model when none is given."""
    files = find_model(model, mmproj, hf_repo, no_mmproj)
    if files[0] == refvlm.TEXT_MODEL:
        options["n_ctx"] = min(options.get("n_ctx") or 1024, 1024)
    return StarVLM(*files, **options)


def find_model(model: str | None, mmproj: str | None, hf_repo: str | None, no_mmproj: bool) -> tuple[str | Path, str | Path | None]:
    """Paths of the text model and its mmproj, downloaded where they must be; a --mmproj stands in for the repository's own.

    Raises:
        ConfigError: options that exclude each other; otherwise as `hub.fetch`.
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
    preset: str, vision_keep: Keep | None, decoder_keep: Keep | None, decoder_layer: int | None, budget: str | None
) -> PruneConfig | None:
    return override(resolve_prune(preset), vision_keep=vision_keep, decoder_keep=decoder_keep, decoder_layer=decoder_layer, budget=budget)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def save_picture(picture: Any, path: str) -> None:
    """Writes a PIL image.

    Raises:
        ConfigError: the folder does not exist, or the ending is no image format.
    """
    try:
        picture.save(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be written ({error})", "use an existing folder and an ending such as .png") from error


def save_overlay(report: PruneReport, sources: list[Any], path: str, limits: Any) -> list[str]:
    """Draws each image with dropped tokens dimmed for each stage; several images get -0, -1, ... before the ending.

    Returns the paths written.
    """
    written = []
    for i, source in enumerate(sources):
        target = Path(path)
        if len(sources) > 1:
            target = target.with_name(f"{target.stem}-{i}{target.suffix}")
        save_picture(report.picture(source, i, limits), str(target))
        written.append(str(target))
    return written
