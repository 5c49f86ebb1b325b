"""Tokens and time of one answer. What the caller does between two pieces of a stream does not count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from .report import PruneReport


class Generation:
    """One answer. Adds up the engine's time; the guarded Llama counts the tokens."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self._seconds = 0.0
        self._since: float | None = None
        llama.n_generated = llama.n_sampled = 0

    # ---- time ----

    def start(self) -> None:
        self._since = perf_counter()

    def stop(self, report: PruneReport) -> None:
        """Stops the clock, if it runs. Writes counts and time into the report."""
        if self._since is not None:
            self._seconds += perf_counter() - self._since
            self._since = None
        report.n_generated, report.n_sampled = self._llama.n_generated, self._llama.n_sampled
        report.milliseconds["generate"] = 1e3 * self._seconds

    @contextmanager
    def running(self, report: PruneReport) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.stop(report)
