"""Results that a later run goes on with: one JSON object a line, in a file that one run at a time writes."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import Any, BinaryIO

from ..errors import ResultsFileError, StarEdgeError
from .json_input import parse_json

if sys.platform != "win32":  # two runs into one file are not told apart there
    import fcntl

Record = dict[str, Any]

START_AGAIN = "use another --out, or --fresh to start again"


@dataclass(frozen=True)
class Stamp:
    """What a result depends on, as a field of it.

    Attributes:
        value: What it must be.
        complain: Says what is wrong with a result that has another value, which it is given.
    """

    value: str
    complain: Callable[[Any], str]


@dataclass(frozen=True)
class Header:
    """A first line that says what all results depend on.

    Attributes:
        mark: Its first field. It tells such a file from others.
        values: The other fields.
        command: Who writes such files, for messages.
    """

    mark: str
    values: Record
    command: str

    @property
    def record(self) -> Record:
        return {self.mark: 1, **self.values}


class ResultsFile:
    """A file of results. What is in it when a run is killed is there for the next run.

    Each result has a key, the values of some fields. Results without "error" are done. Results with other keys than
    this run's stay. A last line that was cut off goes.

    A file without a header holds one line for each key: failures that this run tries again go, and repeated lines do.
    In a file with a header lines stay, and of those with one key the last holds.

    Args:
        path: The file.
        names: {field of the key: field with its stamp}. Each line begins with the first.
        stamps: The parts of this run's keys: {(field, value): stamp}.
        common: {field: stamp} of every result, of other runs too.
        header: The first line, or None for a file without one.
        fresh: Drop the content when the first result comes. A run that fails before leaves it. A file with a header
            takes the place of one of the same kind alone.
        found: Called with each result of the file that stays.

    Attributes:
        done: Keys of this run that have a result without an error.

    Raises:
        ResultsFileError: The file has other content, or results that depend on something else; another run is writing
            it; or it cannot be written.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        names: Mapping[str, str],
        stamps: Mapping[tuple[str, str], Stamp],
        *,
        common: Mapping[str, Stamp] = MappingProxyType({}),
        header: Header | None = None,
        fresh: bool = False,
        found: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._name = os.fspath(path)
        self._names, self._stamps, self._common = names, stamps, common
        self._one_each = header is None
        self._start = b"" if header is None else _line(header.record)
        self._drop = False
        self.done: set[tuple[str, ...]] = set()
        try:
            self.path = os.path.realpath(path)  # a link stays a link when the file is replaced
            self._file = self._open(self.path)
            try:
                data = self._file.read()
                lines = self._check_start(data, header, fresh)
                if fresh and data:
                    self._drop = True
                else:
                    self._turn_into(data, self._start + self._read(lines, found))
            except BaseException:
                self.close()
                raise
        except StarEdgeError:
            raise
        except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
            raise self._cannot_be_written(error, "use an existing folder with space") from error

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        """Writes a result, with its stamps. The system has it when this returns.

        Raises:
            ResultsFileError: It cannot be written.
        """
        key = self._key(record)
        stamps = {self._names[name]: self._stamps[name, value].value for name, value in zip(self._names, key)}
        common = {field: stamp.value for field, stamp in self._common.items()}
        try:
            if self._drop:
                self._replace(self._start)
                self._drop = False
            self._write(self._file, _line({**record, **common, **stamps}))
        except OSError as error:
            raise self._cannot_be_written(error, "make room, and run again: what is done stays done") from error
        self._count(key, record)

    def _count(self, key: tuple[str, ...], record: Record) -> None:
        if "error" in record:
            self.done.discard(key)
        else:
            self.done.add(key)

    def _key(self, record: Record) -> tuple[str, ...]:
        return tuple(str(record[name]) for name in self._names)

    def _check_start(self, data: bytes, header: Header | None, fresh: bool) -> list[bytes]:
        """The lines after the header, which is compared."""
        lines = data.split(b"\n")
        if header is None or not data:
            return lines
        found = _parse(lines[0])
        if header.mark not in found:
            if len(lines) == 1 and _is_cut_off(data, header.mark):
                return []
            raise ResultsFileError(
                f"{self._name} exists and is not a results file of {header.command}", "use another --out"
            )
        expected = header.record
        if fresh:
            return []
        for field in (*expected, *found):
            was, now = found.get(field), expected.get(field)
            if was != now:
                raise ResultsFileError(
                    f"{self._name} was made with {field} {was!r}, and now it is {now!r}",
                    f"use the same, or {START_AGAIN}",
                )
        # As it stands there: the order of its fields may be that of another version
        self._start = lines[0] + b"\n"
        return lines[1:]

    def _read(self, lines: Sequence[bytes], found: Callable[[Record], None]) -> bytes:
        """The lines that stay; fills `done`."""
        kept = []
        first = 1 if self._one_each else 2
        for i, line in enumerate(lines):
            if not line:
                continue
            record = _parse(line)
            if not self._is_result(record):
                # Only a line that begins like a result was cut off: the file may be something else
                if i == len(lines) - 1 and _is_cut_off(line, next(iter(self._names))):
                    continue
                raise ResultsFileError(
                    f"{self._name}, line {first + i} is not a result of star-edge",
                    f"remove the line, or {START_AGAIN}",
                )
            key = self._key(record)
            stamps = {self._names[part[0]]: self._stamps.get(part) for part in zip(self._names, key)}
            is_mine = None not in stamps.values()
            if is_mine and self._one_each and "error" in record:
                continue
            for field, stamp in (*self._common.items(), *stamps.items()):
                if stamp is not None and record[field] != stamp.value:
                    raise ResultsFileError(stamp.complain(record[field]), START_AGAIN)
            if is_mine:
                if self._one_each and key in self.done:
                    continue
                self._count(key, record)
            found(record)
            kept.append(line + b"\n")
        return b"".join(kept)

    def _is_result(self, record: Record) -> bool:
        kinds = (str, int) if self._one_each else (str,)  # tasks of a user may have numbers
        return all(type(record.get(name)) in kinds for name in self._names) and all(
            isinstance(record.get(field), str) for field in (*self._names.values(), *self._common)
        )

    def _turn_into(self, data: bytes, kept: bytes) -> None:
        """Changes the file's content from `data` to `kept`."""
        if kept.startswith(data):
            self._write(self._file, kept[len(data) :])
        elif data.startswith(kept):
            self._file.truncate(len(kept))
        else:
            self._replace(kept)

    def _replace(self, data: bytes) -> None:
        """Replaces the file's content. A reader sees the old content or the new, never a part."""
        beside = f"{self.path}.{os.getpid()}.tmp"
        file = self._open(beside)
        try:
            file.truncate(0)
            self._write(file, data)
            os.fsync(file.fileno())
            os.replace(beside, self.path)
        except OSError:
            file.close()
            os.unlink(beside)
            raise
        self._file.close()
        self._file = file

    def _write(self, file: BinaryIO, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered write may take a part
            rest = rest[file.write(rest) :]

    def _open(self, path: str) -> BinaryIO:
        try:
            return open_alone(path, buffering=0)  # unbuffered: a line is with the system when `add` returns
        except BlockingIOError:
            raise ResultsFileError(
                f"{self._name} is in use by another run", "wait until that ends, or use another --out"
            ) from None

    def _cannot_be_written(self, error: Exception, remedy: str) -> ResultsFileError:
        return ResultsFileError(f"{self._name} cannot be written ({getattr(error, 'strerror', None) or error})", remedy)


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> Record:
    """The object in a line, empty if there is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_cut_off(line: bytes, first_field: str) -> bool:
    """Whether it is the beginning of an object with that first field."""
    start = f'{{"{first_field}": '.encode()
    return line[: len(start)] == start[: len(line)]


def open_alone(path: str | PathLike[str], buffering: int = -1) -> BinaryIO:
    """Opens a file to read it from its start and append to it, and locks it until it is closed.

    The file is created if it does not exist.

    Raises:
        BlockingIOError: Another run has it open.
        OSError: It cannot be opened; or it is a device or a pipe, which may be endless and must not be replaced.
    """
    while True:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        file = open(path, "a+b", buffering=buffering)  # noqa: SIM115 (kept open for the run)
        try:
            if sys.platform != "win32":
                _lock(file)
                # whoever had the lock may have put another file there: results would go into the old one
                if not _is_at(file, path):
                    file.close()
                    continue
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks


def _is_at(file: BinaryIO, path: str | PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
