"""What is pruned, as the options of `star-edge run`, `chat`, `demo` and `inspect`."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..io.configs import resolve_prune
from ..pruning.config import Keep, PruneConfig
from ..pruning.presets import DEFAULT_PRESET, PRESETS, override
from .options import Choice, Command

if TYPE_CHECKING:
    _KeepParam = click.ParamType[Keep]
    _RedundancyParam = click.ParamType[str | float]
else:  # not every click since 8.2 has generic types of parameters
    _KeepParam = _RedundancyParam = click.ParamType


class KeepType(_KeepParam):
    """0.25 or 1.0 is a fraction, 144 a count."""

    name = "fraction|count"
    forms = "a fraction (0.25) nor a count of tokens (144)"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Keep:
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither {self.forms}", param, ctx)


class LayerType(KeepType):
    """8 is a layer, 0.75 a fraction of the layers."""

    name = "fraction|layer"
    forms = "a fraction of the layers (0.75) nor a layer (8)"


class RedundancyType(_RedundancyParam):
    """off, auto, exact, or a number."""

    name = "off|auto|exact|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        if value in ("off", "auto", "exact"):
            return str(value)
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither off, auto nor exact, nor a number.", param, ctx)


def complete_preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of presets, and .json files, for the shell."""
    files = sorted(glob.glob(f"{glob.escape(incomplete)}*.json"))
    return [CompletionItem(name) for name in (*PRESETS, *files) if name.startswith(incomplete)]


@dataclass(frozen=True)
class Pruning:
    """The options as they were typed. All but the preset are fields of PruneConfig; None was not given."""

    preset: str
    vision_keep: Keep | None
    vision_tolerance: float | None
    decoder_keep: Keep | None
    decoder_layer: int | None
    look_ahead: int | float | None
    budget: str | None
    image_max_tokens: Keep | None
    redundancy: str | float | None = None
    encoder_keep: Keep | None = None
    encoder_tolerance: float | None = None
    encoder_layer: int | None = None

    def config(self) -> PruneConfig | None:
        """The preset with the other options over it; None for no pruning.

        Raises:
            ConfigError: There is no such preset or file, or a value cannot be used.
        """
        changes = asdict(self)
        return override(resolve_prune(changes.pop("preset")), **changes)


KEEP_HELP = (
    "with a point a fraction of the original (1.0 keeps all), a whole number a count for each image (1 keeps one token)"
)

_PROMPT_OPTIONS = (
    click.option(
        "--preset",
        type=str,
        default=DEFAULT_PRESET,
        show_default=True,
        metavar="NAME|FILE.json",
        shell_complete=complete_preset,
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
        "--look-ahead",
        type=LayerType(),
        help="The question looks ahead to this layer, over tokens that have stopped at layer K, before they are "
        "chosen: a layer after K or a fraction of the layers, such as 0.75. K is then a third of them, if not given.",
    ),
    click.option(
        "--budget",
        type=Choice(["image", "crop", "prompt"]),
        help="Who shares tokens: the crops of an image (default), none, or all images, such as the frames of a video.",
    ),
    click.option(
        "--image-max-tokens",
        type=KeepType(),
        help="Make larger pictures smaller, until so many of their image tokens enter the encoder: a fraction of those "
        "at full size (0.5) or a count. What --redundancy leaves out does not count. With --preset off that is all "
        "that is done.",
    ),
)
_ENCODER_OPTIONS = (
    click.option(
        "--redundancy",
        type=RedundancyType(),
        help="Tokens left out before the encoder because one near them shows the same: off, auto (equal pixels, where "
        "the encoder can), exact, or the largest difference of pixels, such as 0.1.",
    ),
    click.option(
        "--encoder-keep", type=KeepType(), help="Image tokens to keep within the encoder from its layer M on."
    ),
    click.option(
        "--encoder-tolerance",
        type=click.FloatRange(min=0, min_open=True),
        help="Keep more than --encoder-keep where the picture needs it, as --vision-tolerance does, such as 0.1.",
    ),
    click.option(
        "--encoder-layer", type=int, help="Layer M, 1 to layers of the encoder - 1. Default: a quarter of them."
    ),
)


def prune_options(command: Command) -> Callable[..., Any]:
    """--preset and the fields that override it. They reach the command as `pruning`, a Pruning."""
    return _declare(command, _PROMPT_OPTIONS + _ENCODER_OPTIONS)


def prune_options_after_encoder(command: Command) -> Callable[..., Any]:
    """As `prune_options`, without what is left out before and within the encoder."""
    return _declare(command, _PROMPT_OPTIONS)


def _declare(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Callable[..., Any]:
    @functools.wraps(command)
    def with_options(**given: Any) -> Any:
        names = {field.name for field in fields(Pruning)} & given.keys()
        pruning = Pruning(**{name: given.pop(name) for name in names})
        return command(pruning=pruning, **given)

    for option in reversed(options):
        with_options = option(with_options)
    return with_options
