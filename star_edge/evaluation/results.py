"""Answers by question and config, in memory and in a file that a later run goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ResultsFileError
from ..io.questions import Question
from ..io.results_file import START_AGAIN, Header, Record, ResultsFile, Stamp
from .configs import NamedConfig


class Records:
    """Records by (question id, config name).

    In the file each has the fingerprints of its question and config, and the first line says what all depend on.

    Args:
        path: JSONL file, or None to keep records in memory.
        header: What all results must share (files of the model, options).
        questions: The questions.
        configs: The configs.
        fresh: Start a results file again that does not fit. Other files are never overwritten.

    Attributes:
        records: All of them. Of those of one pair the last holds.

    Raises:
        ResultsFileError: The file is not a results file, belongs to another model, other options, or changed questions
            or configs, is in use by another run, or cannot be written.
    """

    def __init__(
        self,
        path: str | None,
        header: dict[str, Any],
        questions: Sequence[Question],
        configs: Sequence[NamedConfig],
        fresh: bool = False,
    ) -> None:
        self.records: dict[tuple[str, str], Record] = {}
        self._file: ResultsFile | None = None
        self._path = path
        if path is None:
            return
        self._stamps = {
            ("task", q.id): self._stamp(q.fingerprint, f"question {q.id!r} (image, question or answer)")
            for q in questions
        } | {("config", c.name): self._stamp(c.fingerprint, f"config {c.name!r}") for c in configs}
        self._file = ResultsFile(
            path,
            {"task": "task_fingerprint", "config": "config_fingerprint"},
            self._stamps,
            header=Header("star_edge_eval", header, "star-edge eval"),
            fresh=fresh,
            found=self._keep,
        )

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def expect(self, configs: Sequence[NamedConfig]) -> None:
        """Further configs, of which the file may have answers.

        Raises:
            ResultsFileError: It has answers of another config of that name.
        """
        if self._file is None:
            return
        for config in configs:
            if ("config", config.name) in self._stamps:
                continue
            stamp = self._stamps["config", config.name] = self._stamp(config.fingerprint, f"config {config.name!r}")
            for (_, name), record in self.records.items():
                if name == config.name and record["config_fingerprint"] != stamp.value:
                    raise ResultsFileError(stamp.complain(record), START_AGAIN)

    def _stamp(self, value: str, what: str) -> Stamp:
        return Stamp(value, lambda _: f"{what} has changed since {self._path} was begun")

    def done(self, question: Question, config: NamedConfig) -> bool:
        """Whether there is an answer. Failed questions are asked again."""
        record = self.records.get((question.id, config.name))
        return record is not None and "error" not in record

    def add(self, question: Question, config: NamedConfig, **values: Any) -> None:
        """Keeps a record. It is in the file when this returns."""
        record = {"task": question.id, "config": config.name, **values}
        self._keep(record)
        if self._file is not None:
            self._file.add(record)

    def _keep(self, record: Record) -> None:
        self.records[record["task"], record["config"]] = record
