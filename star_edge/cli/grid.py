"""The configs that eval and bench compare: their options, and the configs made from them."""

from __future__ import annotations

from typing import Any

import click

from ..errors import ConfigError
from ..evaluation.configs import NamedConfig, choose_configs, parse_values
from ..pruning.config import PRESETS
from .options import KEEP_HELP, Command, FilePath, complete_preset


def config_options(command: Command) -> Command:
    """Adds the options that `grid_configs` takes."""
    options = [
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
    for option in reversed(options):
        command = option(command)
    return command


def grid_configs(
    presets: tuple[str, ...], sets: tuple[str, ...], config_file: str | None, **budget: str | None
) -> tuple[list[NamedConfig], list[str]]:
    """As `choose_configs`, from the options as they were typed.

    Args:
        presets: Values of --preset.
        sets: Values of --set.
        config_file: Value of --configs.
        **budget: Values of --vision-keep, --decoder-keep, --decoder-layer and --image-max-tokens.

    Raises:
        ConfigError: A field does not take a value.
    """
    grid = {name: parse_values(name, text) for name, text in budget.items() if text is not None}
    for name, values in grid.items():
        fractions = [value for value in values if isinstance(value, float)]
        if fractions and 1.0 not in fractions and any(type(value) is int and value == 1 for value in values):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {budget[name]} has fractions, and 1, which is a count: one token", "write 1.0 to keep all"
            )
    return choose_configs(presets, grid, _parse_sets(sets), config_file)


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
