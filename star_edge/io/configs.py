"""The config that a user names: a preset, or a JSON file as `star-edge tune` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields

from ..errors import ConfigError, InputFileError, quoted
from ..pruning.config import PruneConfig
from ..pruning.presets import PRESETS
from ..suggestions import did_you_mean, use_one_of
from .json_input import read_json


def resolve_prune(prune: PruneConfig | str | None) -> PruneConfig | None:
    """The config that `prune` stands for.

    Args:
        prune: A PruneConfig, a preset's name, or the path of a .json file of `star-edge tune`. None and "off" mean no
            pruning.

    Returns:
        The config, or None for no pruning.

    Raises:
        ConfigError: The name is unknown, the file cannot be read or holds no config, or `prune` has another type.
    """
    if prune is None or isinstance(prune, PruneConfig):
        return prune
    if isinstance(prune, str):
        if prune in PRESETS:
            return PRESETS[prune]
        if prune.endswith(".json"):
            return load_config(prune)
        raise ConfigError(
            f"there is no preset {prune[:60]!r}",
            use_one_of(prune, PRESETS, ", or a .json file of star-edge tune, or a PruneConfig"),
        )
    raise ConfigError(
        f"prune={quoted(prune)} is a {type(prune).__name__}", "use a PruneConfig, the name of a preset, or None"
    )


def load_config(path: str) -> PruneConfig | None:
    """Reads the config of a JSON file, as `star-edge tune` writes it.

    Args:
        path: The file. Its key "config" holds an object of PruneConfig's fields, or null for no pruning.

    Returns:
        The config, or None for null.

    Raises:
        InputFileError: The file cannot be read, or holds no config that can be used. The message names the file.
    """
    remedy = 'use a file that star-edge tune wrote, or {"config": {"vision_keep": 0.5}}'
    try:
        data = read_json(path)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read ({error.strerror})", "check the path of the config") from error
    except ValueError as error:
        raise InputFileError(f"{path} is not valid JSON ({error})", remedy) from error
    values = data.get("config", {}) if isinstance(data, dict) else {}
    if values is None:
        return None
    if not values or not isinstance(values, dict):
        raise InputFileError(f"{path} has no config", remedy)
    names = [field.name for field in fields(PruneConfig)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InputFileError(
            f"{path} has unknown fields: {', '.join(unknown)}",
            did_you_mean(unknown[0], names, f"use {', '.join(names)}"),
        )
    try:
        return PruneConfig(**values)
    except ConfigError as error:
        raise InputFileError(f"{path}: {error.cause}", error.remedy) from error


def read_named(pairs: Iterable[str]) -> dict[str, PruneConfig | None]:
    """Configs by name, of texts NAME=FILE. FILE is as for `load_config`.

    Raises:
        ConfigError: A text has another form, a name is taken or cannot be one, or a file cannot be used.
    """
    configs: dict[str, PruneConfig | None] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise ConfigError(f"prune config {pair!r} is not NAME=FILE", "write receipts=receipts.json")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
            raise ConfigError(f"prune config {name!r} is not a name", "use letters, digits, '.', '_' and '-'")
        if name in PRESETS or name == "custom" or name.endswith(".json"):
            raise ConfigError(f"prune config {name!r} is the name of something else", "choose another name")
        if name in configs:
            raise ConfigError(f"prune config {name!r} is there twice", "choose another name")
        configs[name] = load_config(path)
    return configs
