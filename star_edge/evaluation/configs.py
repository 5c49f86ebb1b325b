"""Which configs to compare: presets, grids over any field of `PruneConfig`, and files.

Reads the fields of `PruneConfig` from its annotations, so that a new field can be varied without a change here.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import ConfigError, InputFileError, StarEdgeError
from ..io.configs import resolve_prune
from ..io.fingerprints import changed_fields, fingerprint
from ..io.json_input import parse_json, read_json
from ..pruning.config import PruneConfig
from ..suggestions import did_you_mean, nearest, use_one_of

_HINTS = typing.get_type_hints(PruneConfig)
# field -> its short name
_BUDGET = {"vision_keep": "vision", "decoder_keep": "decoder", "decoder_layer": "K", "image_max_tokens": "picture"}


@dataclass(frozen=True)
class NamedConfig:
    """A config with a name.

    Attributes:
        name: Unique name, for tables and results files.
        method: Configs of one method are joined by a line in pictures.
        prune: The config, or None for no pruning.
    """

    name: str
    method: str
    prune: PruneConfig | None

    @property
    def fingerprint(self) -> str:
        """A hash of the fields that are not at their first defaults (`changed_fields`). A field that is added later
        does not change it.
        """
        return fingerprint([self.prune is None, {} if self.prune is None else changed_fields(self.prune)])


OFF = NamedConfig("off", "off", None)


def parse_values(field: str, text: str) -> list[Any]:
    """Parses values of a field from "a,b,c". Each gets the type of the field's annotation.

    Commas inside brackets do not separate. Values that hold several numbers are JSON: "[[2,0.5],[4,0.25]],[[3,0.25]]".

    Raises:
        ConfigError: There is no such field, or a value has another type.
    """
    if field not in _HINTS:
        raise ConfigError(
            f"PruneConfig has no field {field[:60]!r}", use_one_of(field, [f.name for f in fields(PruneConfig)])
        )
    parts = [part.strip() for part in _split(text)]
    if not all(parts):
        raise ConfigError(f"{field}={text!r} has an empty value", "separate values by single commas")
    return [_parse(field, _HINTS[field], part) for part in parts]


def preset_configs(names: Sequence[str], sets: Mapping[str, Sequence[Any]]) -> tuple[list[NamedConfig], list[str]]:
    """Each preset with each combination of the values in `sets`, and notes on combinations that PruneConfig refuses.

    Raises:
        ConfigError: A preset is unknown.
    """
    bases = [(name, resolve_prune(name)) for name in names]
    configs: list[NamedConfig] = []
    notes: list[str] = []
    for values in _combinations(sets):
        for name, prune in bases:
            if prune is None:
                continue  # "off" has no fields, and is always run
            title = " ".join([name, *_titles(values)])
            _try(
                configs,
                notes,
                title,
                " ".join(["presets", *_titles(values)]),
                functools.partial(replace, prune, **values),
            )
    return configs, notes


def grid_configs(
    budget: Mapping[str, Sequence[Any]], sets: Mapping[str, Sequence[Any]]
) -> tuple[list[NamedConfig], list[str]]:
    """Every combination of the budget fields (vision_keep, decoder_keep, decoder_layer, image_max_tokens) and of
    `sets`.

    Other fields have their defaults. In a plot a line runs along one budget field: the first of decoder_keep,
    vision_keep, decoder_layer and image_max_tokens that has several values. Each combination of all other fields is a
    method. Without another budget field than image_max_tokens the method is called "smaller picture".

    Returns:
        The configs, and notes on combinations that PruneConfig refuses.
    """
    in_order = ("decoder_keep", "vision_keep", "decoder_layer", "image_max_tokens")
    varied = [name for name in in_order if len(budget.get(name, ())) > 1]
    kind = "smaller picture" if list(budget) == ["image_max_tokens"] else "grid"
    in_method = {*varied[1:], *sets}
    configs: list[NamedConfig] = []
    notes: list[str] = []
    for values in _combinations({**budget, **sets}):
        method = " ".join([kind, *_titles({k: v for k, v in values.items() if k in in_method})])
        _try(configs, notes, " ".join(_titles(values)), method, functools.partial(PruneConfig, **values))
    return configs, notes


def file_configs(path: str | os.PathLike[str]) -> list[NamedConfig]:
    """Reads configs from a JSON file: a list of {"name": ..., "method": ..., and fields of PruneConfig}.

    "method" defaults to the name.

    Raises:
        InputFileError: The file cannot be used. The message names the file and the entry.
    """
    name = os.fspath(path)
    try:
        entries = read_json(path)
    except OSError as error:
        raise InputFileError(f"{name} cannot be read ({error.strerror})", "check the path of the configs") from error
    except ValueError as error:
        raise InputFileError(
            f"{name} is not valid JSON ({error})", 'write a list such as [{"name": "half", "vision_keep": 0.5}]'
        ) from error
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise InputFileError(
            f"{name} is not a list of objects with a name",
            'write a list such as [{"name": "half", "vision_keep": 0.5}]',
        )
    configs = []
    for entry in entries:
        values = {k: _tuples(v) for k, v in entry.items() if k not in ("name", "method")}
        unknown = sorted(set(values) - set(_HINTS))
        if unknown:
            raise InputFileError(
                f"{name}: {entry['name']!r} has unknown fields: {', '.join(unknown)}",
                did_you_mean(unknown[0], ("name", "method", *_HINTS), f"use {', '.join(_HINTS)}"),
            )
        try:
            prune = _build(functools.partial(PruneConfig, **values))
        except ConfigError as error:
            raise InputFileError(f"{name}: {entry['name']!r}: {error.cause}", error.remedy) from error
        configs.append(NamedConfig(entry["name"], str(entry.get("method", entry["name"])), prune))
    return configs


def choose_configs(
    presets: Sequence[str] = (),
    budget: Mapping[str, Sequence[Any]] | None = None,
    sets: Mapping[str, Sequence[Any]] | None = None,
    file: str | os.PathLike[str] | None = None,
) -> tuple[list[NamedConfig], list[str]]:
    """All configs that are asked for, "off" first, and notes on those that were dropped.

    If none is asked for, the presets quality, balanced and fast are compared. `sets` varies presets and the grid, not a
    file's configs.

    Raises:
        ConfigError: A preset or field is unknown, two configs have one name, or no config is left.
    """
    budget, sets = budget or {}, sets or {}
    for name in presets:
        resolve_prune(name)
    if sets and file and not (presets or budget):
        raise ConfigError(
            "--set has nothing to vary: it does not change configs of a file",
            "put the values into the file, or add --preset or a grid",
        )
    if not (presets or budget or file):
        presets = ("quality", "balanced", "fast")  # published methods run only if named
    from_presets, notes = preset_configs(presets, sets) if presets else ([], [])
    from_grid, grid_notes = grid_configs(budget, sets) if budget else ([], [])
    if sets and bool(from_presets) != bool(from_grid):  # with one source, the values are name enough
        from_presets, from_grid = (
            [replace(c, method=c.method.partition(" ")[2]) for c in cs] for cs in (from_presets, from_grid)
        )
    result = {OFF.name: OFF}
    for config in [*from_presets, *from_grid, *(file_configs(file) if file else [])]:
        if config.name in result and result[config.name].prune != config.prune:
            raise ConfigError(f"two configs have the name {config.name!r}", "give each its own name")
        result.setdefault(config.name, config)
    notes += grid_notes
    if notes and len(result) == 1:
        raise ConfigError(f"no config is left to compare: {notes[0]}", "change the values, or drop --set")
    return list(result.values()), notes


def _try(
    configs: list[NamedConfig], notes: list[str], name: str, method: str, build: typing.Callable[[], PruneConfig]
) -> None:
    try:
        configs.append(NamedConfig(name, method, _build(build)))
    except ConfigError as error:
        notes.append(f"dropped {name}: {error.cause}")


def _build(build: typing.Callable[[], PruneConfig]) -> PruneConfig:
    """Builds a config. A wrong type may surface as any built-in error, and becomes a ConfigError."""
    try:
        return build()
    except StarEdgeError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"PruneConfig cannot be made ({error})", "check the types of its fields") from error


def _combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def _titles(values: Mapping[str, Any]) -> list[str]:
    return [f"{_BUDGET[k]} {v}" if k in _BUDGET else f"{k}={v}" for k, v in values.items()]


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse(field: str, hint: Any, text: str) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    simple = text.lower()
    if type(None) in kinds and simple in ("none", "null"):
        return None
    if bool in kinds and simple in ("true", "false"):
        return simple == "true"
    if int in kinds and re.fullmatch(r"[+-]?\d{1,18}", text):  # int() refuses thousands of digits
        return int(text)
    if float in kinds:
        try:
            number = float(text)
        except ValueError:
            number = math.inf
        if math.isfinite(number):
            return number
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            for choice in typing.get_args(kind):
                if str(choice) == text:
                    return choice
    if str in kinds:
        return text
    if any(_is_container(kind) for kind in kinds):
        try:
            return _tuples(parse_json(text))
        except ValueError:
            pass
    choices = [str(c) for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)]
    near = nearest(text, choices)
    raise ConfigError(
        f"{field}={text[:40]!r} does not fit its type",
        f"{f'did you mean {near}? Use' if near else 'use'} {_readable(kinds)}",
    )


def _is_container(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) in (tuple, list, dict, Sequence, Mapping)


def _tuples(value: Any) -> Any:
    """Turns JSON's lists into the tuples of a frozen config."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _readable(kinds: Sequence[Any]) -> str:
    names = {type(None): "none", bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    parts = []
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            parts += [str(choice) for choice in typing.get_args(kind)]
        else:
            parts.append(names.get(kind, "JSON such as [1, 2]"))
    return ", ".join(parts[:-1]) + (" or " if len(parts) > 1 else "") + parts[-1]
