"""The results of a run: one JSON line for each question and config. A run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

from ..errors import EvaluationError
from ..io.json_input import parse_json
from ..io.results_file import open_alone
from .configs import NamedConfig
from .tasks import Task

Record = dict[str, Any]

_MARK = "star_edge_eval"
_PAIR = ("task", "config", "task_fingerprint", "config_fingerprint")  # of every record, all str
_SAMPLES, _SAMPLE_BYTES = 64, 16384
_START_AGAIN = "use --fresh to start again, or another --out"


def fingerprint_file(path: str | os.PathLike[str]) -> str:
    """A hash of a file's size and of 64 pieces spread over it, head and tail included. It reads 1 MiB at most.

    The file's time does not count. The head has the metadata. Weights that differ nearly everywhere (another
    quantization, a fine-tune) differ in the other pieces.

    Raises:
        EvaluationError: The file cannot be read.
    """
    try:
        size = os.path.getsize(path)
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(f"{path} cannot be read ({reason})", "check the path") from error
    return digest.hexdigest()[:16]


class Results:
    """Records by (task id, config name), appended to a file one by one.

    The file's first line is a header. Each further line is a record: task, config, fingerprints of both, and what the
    runner adds. The last record of a pair holds. An unfinished last line, which a killed run may leave, is cut off.

    Args:
        path: JSONL file, or None to keep records in memory.
        header: What all results must share (files of the model, options).
        tasks: The questions.
        configs: The configs.
        fresh: Start a results file again that does not fit. Other files are never overwritten.

    Raises:
        EvaluationError: The file is not a results file, belongs to another model, other options, or changed questions
            or configs, is in use by another run, or cannot be written.
    """

    def __init__(
        self,
        path: str | None,
        header: dict[str, Any],
        tasks: Sequence[Task],
        configs: Sequence[NamedConfig],
        fresh: bool = False,
    ) -> None:
        self.records: dict[tuple[str, str], Record] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            self._file = open_alone(path)
        except BlockingIOError:
            raise EvaluationError(
                f"{path} is in use by another run", "wait until that ends, or use another --out"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EvaluationError(
                f"{path} cannot be written ({reason})", "use an existing folder that can be written"
            ) from error
        try:
            end = self._read(path, header, tasks, configs, fresh)
            self._file.truncate(end)
            if not end:
                self._append({_MARK: 1, **header})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def done(self, task: Task, config: NamedConfig) -> bool:
        """Whether there is an answer. Failed questions are asked again."""
        record = self.records.get((task.id, config.name))
        return record is not None and "error" not in record

    def add(self, task: Task, config: NamedConfig, **values: Any) -> None:
        """Keeps a record. It is in the file when this returns."""
        pair = {
            "task": task.id,
            "config": config.name,
            "task_fingerprint": task.fingerprint,
            "config_fingerprint": config.fingerprint,
        }
        self.records[task.id, config.name] = {**pair, **values}
        if self._file is not None:
            self._append(self.records[task.id, config.name])

    def _append(self, record: Record) -> None:
        assert self._file is not None
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="surrogatepass") + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise EvaluationError(
                f"{self._file.name} cannot be written ({error.strerror})",
                "make room, and run again: what is done stays done",
            ) from error

    def _read(
        self, path: str, header: dict[str, Any], tasks: Sequence[Task], configs: Sequence[NamedConfig], fresh: bool
    ) -> int:
        """Fills `records`, and returns where the file's complete lines end; 0 to start the file."""
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        lines = data[:end].split(b"\n")[:-1]
        if not lines:
            if data and not data.startswith(f'{{"{_MARK}"'.encode()[: len(data)]):
                raise _no_results_file(path)
            return 0
        found = _parse(lines[0])
        if _MARK not in found:
            raise _no_results_file(path)
        if fresh:
            return 0
        _compare(path, found, {_MARK: 1, **header})
        fingerprints = {("task", t.id): t.fingerprint for t in tasks} | {
            ("config", c.name): c.fingerprint for c in configs
        }
        for number, line in enumerate(lines[1:], 2):
            record = _parse(line)
            if not all(isinstance(record.get(name), str) for name in _PAIR):
                raise EvaluationError(f"{path}, line {number} is not a result", f"remove the line, or {_START_AGAIN}")
            for kind in ("task", "config"):
                if (
                    fingerprints.get((kind, record[kind]), record[f"{kind}_fingerprint"])
                    != record[f"{kind}_fingerprint"]
                ):
                    what = (
                        f"question {record[kind]!r} (image, question or answer)"
                        if kind == "task"
                        else f"config {record[kind]!r}"
                    )
                    raise EvaluationError(f"{what} has changed since {path} was begun", _START_AGAIN)
            self.records[record["task"], record["config"]] = record
        return end


def _no_results_file(path: str) -> EvaluationError:
    return EvaluationError(f"{path} exists and is not a results file of star-edge eval", "use another --out")


def _parse(line: bytes) -> Record:
    """The object in a line, empty if there is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _compare(path: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in (*expected, *found):
        if found.get(key) != expected.get(key):
            was, now = found.get(key), expected.get(key)
            raise EvaluationError(
                f"{path} was made with {key} {was!r}, and now it is {now!r}", f"use the same, or {_START_AGAIN}"
            )
