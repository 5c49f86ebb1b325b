"""JSON from others. Whatever is wrong with it, its size included, is a ValueError of one line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from os import PathLike
from typing import Any

MAX_CHARACTERS = (
    2**26
)  # of a line, or of a file that is read whole: room for pictures as data: URLs, an end for /dev/zero
MAX_DEPTH = 64  # lists and objects in each other


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: The text is not JSON, is nested deeper than MAX_DEPTH, or has a number of more digits than Python
            converts.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # sys.get_int_max_str_digits()
        raise ValueError("it has a number of thousands of digits") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, (list, dict)) for inner in _items(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def read_json(path: str | PathLike[str]) -> Any:
    """The value in a UTF-8 file.

    Raises:
        OSError: The file cannot be read.
        ValueError: See `parse_json`; or it is not UTF-8, or is longer than MAX_CHARACTERS.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(MAX_CHARACTERS + 1)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    return parse_json(text)


def read_lines(source: str | PathLike[str] | io.TextIOBase) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank, of a path or an open file.

    Only a newline ends a line: JSON strings may hold U+2028.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or a line is longer than MAX_CHARACTERS.
    """
    if isinstance(source, io.TextIOBase):
        yield from ((number, line) for number, line in enumerate(bounded_lines(source), 1) if line.strip())
        return
    with open(source, encoding="utf-8-sig") as file:
        yield from read_lines(file)


def bounded_lines(file: io.TextIOBase) -> Iterator[str]:
    """Each line of a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not text in its encoding, or a line is longer than MAX_CHARACTERS.
    """
    number = 0
    while line := file.readline(MAX_CHARACTERS + 1):
        number += 1
        if len(line) > MAX_CHARACTERS:
            raise ValueError(f"line {number} has more than {MAX_CHARACTERS} characters")
        yield line


def _items(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
