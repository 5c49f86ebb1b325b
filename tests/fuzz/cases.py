"""A case of the fuzzer, and what cases are made with: bytes and JSON values with some of their parts changed.

A case's `check` runs in a process of its own (forking.run). It returns a line about what happened, where a typed error
is a result; anything else that is raised, a death of the process or a hang is a failure. Lines that begin with "bad"
are failures too.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from star_edge.errors import StarEdgeError

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
NUMBERS = (0, -1, 1, 2, 100, 20000, 10**6, 10**9, 2**31, 2**63, 1e308, -0.5)


@dataclass
class Case:
    """said: what it is. payload: the bytes that `check` takes. divides: whether a part of them may be enough to
    fail.
    """

    said: str
    payload: bytes
    check: Callable[[bytes], str]
    suffix: str
    divides: bool = True


def typed(function: Callable[[], object]) -> str:
    try:
        return f"done {type(function()).__name__}"
    except StarEdgeError as error:
        message = str(error)
        if "\n" in message or len(message) > 2000:
            return f"bad message of {len(message)} characters: {message[:200]!r}"
        return f"{type(error).__name__}: {message}"


def in_file(payload: bytes, suffix: str, function: Callable[[Path], object]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzz{suffix}"
        path.write_bytes(payload)
        return typed(lambda: function(path))


def scrambled(rng: random.Random, data: bytes, most: int = 8) -> bytes:
    """A few bytes changed, cut out, doubled or put elsewhere."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not out:
            break
        at, n = rng.randrange(len(out)), rng.choice((1, 1, 2, 4, 16, 100))
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + n] = bytes(rng.randrange(256) for _ in range(n))
        elif kind == 1:
            del out[at : at + n]
        elif kind == 2:
            out[at:at] = out[at : at + n]
        elif kind == 3:
            out[at : at + 4] = struct.pack(
                rng.choice(("<I", ">I")), rng.choice((0, 1, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1))
            )
        else:
            other = rng.randrange(len(out))
            out[at : at + n] = out[other : other + n]
    return bytes(out)


def changed(rng: random.Random, value: object) -> object:
    """A JSON value with some of its parts replaced by others."""
    if rng.random() < 0.2:
        return rng.choice(
            (
                None,
                True,
                [],
                {},
                "",
                "x" * 50,
                "\ud800",
                rng.choice(NUMBERS),
                [[]],
                {"type": "object"},
                "^a{1,100000}$",
            )
        )
    if isinstance(value, dict):
        return {
            (k if rng.random() < 0.9 else rng.choice(("type", "items", "$ref", "pattern", "x"))): changed(rng, v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [changed(rng, v) for v in value] * rng.choice((1, 1, 1, 2, 0))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice(NUMBERS)
    return value


def dumps(value: object) -> bytes:
    """JSON of any depth: json.dumps gives up at Python's recursion limit."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        closing, out = [], []
        while isinstance(value, dict) and ("items" in value or "properties" in value):
            array = "items" in value
            out.append('{"type": "array", "items": ' if array else '{"type": "object", "properties": {"a": ')
            closing.append("}" if array else "}}")
            value = value["items"] if array else value["properties"]["a"]
        return ("".join(out) + json.dumps(value) + "".join(reversed(closing))).encode()
