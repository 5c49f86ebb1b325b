"""The configs that eval and bench compare: their options, and the configs made from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

from ..errors import ConfigError
from ..evaluation.configs import NamedConfig, choose_configs, parse_values
from ..pruning.presets import PRESETS
from .options import FilePath
from .pruning import KEEP_HELP, complete_preset


@dataclass(frozen=True)
class Grid:
    """The options as they were typed.

    Attributes:
        presets: Values of --preset.
        sets: Values of --set.
        config_file: Value of --configs, or None.
    """

    presets: tuple[str, ...]
    vision_keep: str | None
    decoder_keep: str | None
    decoder_layer: str | None
    image_max_tokens: str | None
    sets: tuple[str, ...]
    config_file: str | None

    def configs(self) -> tuple[list[NamedConfig], list[str]]:
        """As `choose_configs`.

        Raises:
            ConfigError: A field does not take a value.
        """
        names = ("vision_keep", "decoder_keep", "decoder_layer", "image_max_tokens")
        typed = {name: text for name in names if (text := getattr(self, name)) is not None}
        grid = {name: parse_values(name, text) for name, text in typed.items()}
        for name, values in grid.items():
            fractions = [value for value in values if isinstance(value, float)]
            if fractions and 1.0 not in fractions and any(type(value) is int and value == 1 for value in values):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{flag} {typed[name]} has fractions, and 1, which is a count: one token", "write 1.0 to keep all"
                )
        return choose_configs(self.presets, grid, _parse_sets(self.sets), self.config_file)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--preset, --vision-keep, ... and --configs. They reach the command as `grid`, a Grid."""
    parameters = [
        click.option(
            "--preset",
            "presets",
            multiple=True,
            metavar="NAME|FILE.json",
            shell_complete=complete_preset,
            help=f"One of {', '.join(PRESETS)}, or a file of star-edge tune. Repeat for several. Default: quality, "
            "balanced and fast.",
        ),
        click.option(
            "--vision-keep",
            metavar="A,B,...",
            help=f"Image tokens to keep after the encoder: values separated by commas, such as 0.5,0.25; {KEEP_HELP}. "
            "Each combination with values of the next three options is a config.",
        ),
        click.option("--decoder-keep", metavar="A,B,...", help="Image tokens to keep from layer K on, likewise."),
        click.option(
            "--decoder-layer", metavar="A,B,...", help="Layers K. `none` is the layer that is chosen for the model."
        ),
        click.option(
            "--image-max-tokens",
            metavar="A,B,...",
            help="Smaller pictures, by shares (0.5) or counts of image tokens. Alone, it makes configs that "
            "do not prune, to compare pruning with.",
        ),
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="FIELD=A,B",
            help="Vary another field of PruneConfig, in presets and combinations. Repeat for several.",
        ),
        click.option(
            "--configs",
            "config_file",
            type=FilePath(),
            help='A file with a JSON list of configs: {"name": ..., "method": ..., fields of PruneConfig}.',
        ),
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> Any:
        grid = Grid(**{field.name: given.pop(field.name) for field in fields(Grid)})
        return command(grid=grid, **given)

    for parameter in reversed(parameters):
        with_options = parameter(with_options)
    return with_options


def _parse_sets(sets: tuple[str, ...]) -> dict[str, list[Any]]:
    """Values by field from what --set was given.

    Raises:
        ConfigError: no value, or see `parse_values`.
    """
    result: dict[str, list[Any]] = {}
    for text in sets:
        field, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no value", "write --set FIELD=VALUE or --set FIELD=VALUE1,VALUE2")
        result[field.strip()] = result.get(field.strip(), []) + parse_values(field.strip(), values)
    return result
