"""Checks arguments against a function's signature and annotations, before anything is computed.

Annotations say which types a parameter takes. Ranges are given beside them. Knows no particular function.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Container, Mapping
from os import PathLike, fspath
from typing import Any, Literal, TypeVar, Union

from .errors import ConfigError, quoted
from .suggestions import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


class _NotThisType(Exception):
    """A value is not of the type of an annotation."""


class Range:
    """Numbers from least to most. above: least itself is excluded. infinite: infinities are included."""

    def __init__(
        self, least: float = -math.inf, most: float = math.inf, *, above: bool = False, infinite: bool = False
    ) -> None:
        self.least, self.most, self.above, self.infinite = least, most, above, infinite

    def __contains__(self, value: object) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return self.infinite and not math.isnan(value)
        number: Any = value  # whoever asks has checked that it is one
        return bool(self.least <= number <= self.most) and not (self.above and value == self.least)

    def __str__(self) -> str:
        low, high = f"{self.least:.12g}", f"{self.most:.12g}"
        if self.least == self.most:
            return low
        if math.isinf(self.least):
            return "a finite number" if math.isinf(self.most) else f"{high} or less"
        start = f"more than {low}" if self.above else low
        return f"{start}{'' if self.above else ' or more'}" if math.isinf(self.most) else f"{start} to {high}"


@functools.cache
def parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotation of each parameter that may be given by name, without self. Any: there is no annotation."""
    hints = typing.get_type_hints(function)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: hints.get(name, Any)
        for name, p in inspect.signature(function).parameters.items()
        if p.kind in named and name != "self"
    }


def check(function: Callable[..., Any], values: Mapping[str, Any], ranges: Mapping[str, Range] = {}) -> dict[str, Any]:
    """Converts values to the types of the function's annotations: NumPy's numbers to Python's, and int to float.

    Values of unknown names stay as they are.

    Raises:
        ConfigError: A value has another type, or is out of range.
    """
    known = parameters(function)
    return {
        name: check_value(name, value, known[name], ranges.get(name)) if name in known else value
        for name, value in values.items()
    }


def check_value(name: str, value: Any, annotation: Any, allowed: Range | None = None) -> Any:
    """One value, as `check` does it."""
    try:
        converted = _convert(value, annotation)
    except _NotThisType:
        raise ConfigError(
            f"{name}={quoted(value)} is a {type(value).__name__}", f"give {describe(annotation)}"
        ) from None
    if isinstance(converted, float) and allowed is None:
        allowed = Range()
    if (
        allowed is not None
        and isinstance(converted, (int, float))
        and not isinstance(converted, bool)
        and converted not in allowed
    ):
        raise ConfigError(f"{name}={quoted(value)} is out of range", f"use {allowed}")
    return converted


def checked(ranges: Mapping[str, Range] = {}, skip: Container[str] = ()) -> Callable[[F], F]:
    """Decorator: checks and converts arguments. skip: parameters that the function checks itself.

    An argument of an unknown name is a ConfigError too, which says what may have been meant.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                unknown = [name for name in kwargs if name not in signature.parameters]
                if not unknown:
                    raise
                raise unknown_argument(function, unknown[0]) from None
            for name, value in bound.arguments.items():
                if name in parameters(function) and name not in skip:
                    bound.arguments[name] = check_value(name, value, parameters(function)[name], ranges.get(name))
            return function(*bound.args, **bound.kwargs)

        return call  # type: ignore[return-value]

    return decorate


def unknown_argument(function: Callable[..., Any], name: str) -> ConfigError:
    """The error for an argument that a function does not have."""
    names = list(parameters(function))
    owner = function.__qualname__.removesuffix(".__init__")
    return ConfigError(
        f"{owner} has no argument {name[:60]!r}", did_you_mean(name, names, f"it takes {', '.join(names)}")
    )


def _convert(value: Any, annotation: Any) -> Any:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, (TypeVar, str, typing.ForwardRef)):
        return value
    if origin in (Union, types.UnionType):
        for choice in sorted(inner, key=lambda choice: choice is float):  # an int stays one where both are taken
            try:
                return _convert(value, choice)
            except _NotThisType:
                continue
        raise _NotThisType
    if origin is Literal:
        if any(value is choice or (type(value) is type(choice) and value == choice) for choice in inner):
            return value
        raise _NotThisType
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable, tuple):
        if isinstance(value, (str, bytes)) or not isinstance(
            value, (list, tuple) if origin is list else collections.abc.Iterable
        ):
            raise _NotThisType
        item = inner[0] if inner else Any
        return [_convert(v, item) for v in value]
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, collections.abc.Mapping):
            raise _NotThisType
        return {_convert(k, inner[0]): _convert(v, inner[1]) for k, v in value.items()}
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return _require(callable(value), value)
    return _convert_plain(value, origin or annotation)


def _convert_plain(value: Any, kind: Any) -> Any:
    is_bool = isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # NumPy's own is no Python bool
    if kind is bool:
        _require(is_bool, value)
        return bool(value)
    if kind is int:
        _require(isinstance(value, numbers.Integral) and not is_bool, value)
        return int(value)
    if kind is float:
        _require(isinstance(value, numbers.Real) and not is_bool, value)
        try:
            return float(value)
        except OverflowError:
            raise _NotThisType from None
    if kind in (None, type(None)):
        return _require(value is None, value)
    if kind is PathLike:
        _require(isinstance(value, PathLike), value)
        return _require(isinstance(fspath(value), str), value)
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        if typing.is_typeddict(kind):
            return _require(isinstance(value, collections.abc.Mapping), value)
        return _require(isinstance(value, kind), value)
    return value


def _require(holds: bool, value: Any) -> Any:
    if not holds:
        raise _NotThisType
    return value


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a str",
    bool: "True or False",
    type(None): "None",
    PathLike: "a path",
    bytes: "bytes",
}


def describe(annotation: Any) -> str:
    """What an annotation takes, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(choice) for choice in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable, tuple):
        return f"a list with {describe(inner[0])} each" if inner else "a list"
    if origin in (dict, collections.abc.Mapping):
        return f"a dict from {describe(inner[0])} to {describe(inner[1])}"
    if origin is collections.abc.Callable:
        return "a function"
    kind = origin or annotation
    return _NAMES.get(kind) or (f"a {kind.__name__}" if hasattr(kind, "__name__") else str(kind))
