"""A stopwatch with one hand: every moment counts for one step, so that the steps can be added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Times of steps.

    Attributes:
        seconds: Time of each step, in seconds. A step inside another takes its time from that one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step: str | None = None
        self._since = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts the time of the block for a step. The step around it stands still meanwhile."""
        outer = self._step
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(outer)

    def take(self, name: str, seconds: float) -> None:
        """Counts a part of the running step's time for another step, as something else has measured it."""
        assert self._step is not None  # whose part it is
        self.seconds[self._step] -= seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _turn_to(self, name: str | None) -> None:
        now = perf_counter()
        if self._step is not None:
            self.seconds[self._step] += now - self._since
        if name is not None:
            self.seconds.setdefault(name, 0.0)
        self._step, self._since = name, now
