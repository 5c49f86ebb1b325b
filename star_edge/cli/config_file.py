"""--config FILE: the options of a command in a TOML or JSON file. What the command line gives wins.

A key is an option's long name, without its dashes: ctx-size = 8192. Relative paths are relative to the file.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import ConfigError, MissingDependencyError
from ..io.json_input import read_json

_Command = TypeVar("_Command", bound=Callable[..., Any])


def config_option(paths: Mapping[str, str], not_in_file: frozenset[str]) -> Callable[[_Command], _Command]:
    """Decorator: adds --config to a command.

    Args:
        paths: Parameters that are files: "file", "maybe" if they may be names as well, or "named" for NAME=FILE.
        not_in_file: Names of parameters that a file does not set.
    """

    def read(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
        if path is not None:
            ctx.default_map = read_config(ctx, path, paths, not_in_file | {"config"})

    return click.option(
        "--config",
        metavar="FILE",
        is_eager=True,  # before the others, whose defaults it gives
        expose_value=False,
        callback=read,
        help="TOML or JSON file of these options, by their long names (ctx-size = 8192). The command line wins.",
    )


def read_config(ctx: click.Context, path: str, paths: Mapping[str, str], not_in_file: frozenset[str]) -> dict[str, Any]:
    """Values of parameters by name, as click takes them for defaults.

    Raises:
        ConfigError: The file cannot be read, or has a key or a value that cannot be used. The message names the key.
    """
    options = {
        max(param.opts, key=len).lstrip("-"): param
        for param in ctx.command.params
        if isinstance(param, click.Option) and param.name not in not_in_file | {"help"}
    }
    off = {
        max(param.secondary_opts, key=len).lstrip("-"): name for name, param in options.items() if param.secondary_opts
    }
    found: dict[str, Any] = {}
    for key, value in _read(path).items():
        name = key.replace("_", "-")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1)
            remedy = f"write {off[name]} = false" if name in off else f"did you mean {near[0]}?" if near else None
            raise ConfigError(f"{path}: {key} is not an option", remedy or f"use {', '.join(sorted(options))}")
        param = options[name]
        where = f"{path}: {key} = {value!r}"
        if param.name in found:
            raise ConfigError(f"{path}: {key} is there twice", "with - or with _, not both")
        value = _checked(param, value, where)
        kind = paths.get(str(param.name))
        if kind is not None:
            folder = Path(path).parent
            value = [_resolved(v, folder, kind) for v in ([value] if isinstance(value, str) else value)]
            value = value if param.multiple else value[0]
        try:
            param.type_cast_value(ctx, value)
        except click.BadParameter as error:
            raise ConfigError(f"{where}: {error.message.rstrip('.')}", "change it, or leave it out") from error
        found[str(param.name)] = value
    return found


def _read(path: str) -> Mapping[str, Any]:
    try:
        data = read_json(path) if path.lower().endswith(".json") else _read_toml(path)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror})", "check its path") from error
    except ValueError as error:  # of TOML too
        kind = "JSON" if path.lower().endswith(".json") else "TOML"
        remedy = "JSON has its options in {...}; a file with another ending than .json is read as TOML"
        raise ConfigError(f"--config {path} is not valid {kind} ({error})", remedy) from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} is a JSON {type(data).__name__}", 'write {"ctx-size": 8192}')
    return data


def _read_toml(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingDependencyError("TOML needs tomli on Python 3.10", 'pip install "star-edge[serve]"') from error
    with open(path, "rb") as file:
        return tomllib.load(file)


def _checked(param: click.Option, value: Any, where: str) -> Any:
    """The value, if it is of the option's kind: click itself would take true for 1."""
    if param.multiple:
        if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            return [f"{name}={v}" for name, v in value.items()]  # a table for NAME=VALUE
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in values):
            raise ConfigError(f"{where} is not text", "write a list of texts")
        return values
    if param.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is neither true nor false", "write true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} is a {type(value).__name__}", "write text or a number")
    is_number = isinstance(param.type, (click.types.IntParamType, click.types.FloatParamType))
    if is_number != (not isinstance(value, str)):
        raise ConfigError(f"{where} is not {'a number' if is_number else 'text'}", "mind the quotes")
    if isinstance(value, float) and isinstance(param.type, click.types.IntParamType):
        raise ConfigError(f"{where} is not a whole number", "leave the point out")
    return value


def _resolved(value: str, folder: Path, kind: str) -> str:
    """A path of the file, which is relative to it. kind: see `config_option`."""
    if kind == "named":
        name, equals, file = value.partition("=")
        return f"{name}={_resolved(file, folder, 'file')}" if equals and file else value
    try:
        path = folder / Path(value).expanduser()
        if value == "-" or (kind == "maybe" and not path.is_file()):
            return value
    except (OSError, ValueError, RuntimeError):  # text that cannot be a path, such as a template
        return value
    return str(path)
