"""A request under way: its prompt is read, its answer comes chunk by chunk, and the cache is given back.

    read -> hand_over -> next_chunk, next_chunk, ... -> finish
                         close: from any thread, at any time

StarVLM, StarChatHandler and the server share this life cycle. Knows neither images nor chat templates.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

import numpy as np

from .decoder.prefill import Prefill
from .errors import ConfigError, EngineClosedError, RequestCancelledError, RequestTimeoutError
from .generation import Generation
from .progress import Meter, Progress
from .pruning.config import PruneConfig
from .reader import PromptReader
from .report import PruneReport
from .vision.chunks import Prompt
from .vision.places import Place, places_or_none
from .vision.resolution import FittedSize

IsCancelled = Callable[[], bool]
_is_cancelled: ContextVar[IsCancelled | None] = ContextVar("star_edge_is_cancelled", default=None)
_asked_at: ContextVar[float | None] = ContextVar("star_edge_asked_at", default=None)
_POLL_SECONDS = 0.05  # while a request that may end waits for its turn


@contextmanager
def cancellable(is_cancelled: IsCancelled) -> Iterator[None]:
    """Requests that this thread or task begins inside the block end when `is_cancelled()` becomes true.

    Raises:
        ConfigError: is_cancelled is no function.
    """
    if not callable(is_cancelled):
        raise ConfigError(f"is_cancelled is a {type(is_cancelled).__name__}", "give a function")
    token = _is_cancelled.set(is_cancelled)
    try:
        yield
    finally:
        _is_cancelled.reset(token)


@contextmanager
def asked_at(time: float) -> Iterator[None]:
    """Timeouts of requests that begin inside the block count from an earlier time, in seconds of time.perf_counter."""
    token = _asked_at.set(time)
    try:
        yield
    finally:
        _asked_at.reset(token)


def cancellation() -> IsCancelled | None:
    """What the innermost `cancellable` block says, or None outside of all."""
    return _is_cancelled.get()


class Ending:
    """Says when a request has to end before its answer is complete. It is asked before each decode.

    Args:
        timeout: Seconds that it may take, or None.
        signals: Functions that say whether the request is cancelled.
        since: From when the seconds count. None: from now, or as `asked_at` says.

    Attributes:
        during: What the request is doing, for the error.
    """

    def __init__(
        self, timeout: float | None = None, signals: Sequence[IsCancelled | None] = (), since: float | None = None
    ) -> None:
        self._timeout = timeout
        since = _asked_at.get() if since is None else since
        self._until = None if timeout is None else timeout + (perf_counter() if since is None else since)
        self._signals = [signal for signal in signals if signal is not None]
        self.during = "before the request's turn came"

    def __call__(self) -> bool:
        """Whether the request is cancelled.

        Raises:
            RequestTimeoutError: Its time is over.
        """
        if self._until is not None and perf_counter() >= self._until:
            raise self.timeout_error()
        return any(signal() for signal in self._signals)

    def timeout_error(self) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"timeout={self._timeout:g} seconds have passed {self.during}",
            "allow more, keep fewer image tokens, or ask for a shorter answer",
        )

    def check(self) -> None:
        """Raises RequestTimeoutError or RequestCancelledError if the request has to end."""
        if self():
            raise RequestCancelledError("the request was cancelled")

    @contextmanager
    def holding(self, lock: threading.RLock) -> Iterator[None]:
        """Holds the lock inside the block. Does not wait for it longer than the request may take."""
        may_end = self._until is not None or self._signals
        while not lock.acquire(timeout=_POLL_SECONDS if may_end else -1):
            self.check()
        try:
            yield
        finally:
            lock.release()


class Request:
    """A request under way.

    It does not hold the chunks of its answer: these hold the Llama, which would then outlive its last user.

    Args:
        reader: Reads the prompt.
        lock: Whoever uses the Llama holds it.
        config: What to prune, or None.
        start: When the request began, in seconds of time.perf_counter.
        is_cancelled: Asked before each decode: when it says so, RequestCancelledError is raised.

    Attributes:
        report: What was pruned, once the prompt has been read. Times and counts of the answer grow with each chunk.
        n_prompt: Tokens of the prompt before pruning, as MTMDChatHandler counts them.
        finish_reason: "stop" or "length" once the answer is complete, before that None.
    """

    def __init__(
        self,
        reader: PromptReader,
        lock: threading.RLock,
        config: PruneConfig | None,
        start: float,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self._reader, self._lock, self._config, self._start = reader, lock, config, start
        self._is_cancelled = is_cancelled
        self._is_closed = self._is_running = False
        self._number = -1  # PromptReader.request while the prompt is in the cache
        self._generation: Generation | None = None
        self.report: PruneReport | None = None
        self.n_prompt = 0
        self._fitted: list[FittedSize | None] = []
        self._sizes: list[tuple[int, int]] = []  # (height, width) of each picture
        self.finish_reason: str | None = None

    # ---- the prompt ----

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """The next picture of the prompt as it is asked about: smaller, if the config says so. (h, w, 3) uint8.

        Raises:
            ImageError: The encoder cannot take its shape.
        """
        fitted = self._reader.fit(pixels, self._config)
        self._fitted.append(fitted.size)
        self._sizes.append((fitted.pixels.shape[0], fitted.pixels.shape[1]))
        return fitted.pixels

    def read(self, prompt: Prompt, progress: Callable[[Progress], None] | None = None) -> Prefill:
        """Reads the prompt, and closes it.

        progress: Is told how far the reading is.

        Raises:
            StarEdgeError: As PromptReader.read.
        """
        meter = None if progress is None else Meter(progress, self._start)
        state, self.report = self._reader.read(prompt, self._config, self._start, meter)
        self.n_prompt = state.next_position
        self._add_full_tokens(self.report)
        self.report.locate = self._locator(self.report)
        return state

    def _locator(self, report: PruneReport) -> Callable[[], list[Place | None]] | None:
        """Asks for `report.places`. It keeps neither the Llama nor the encoder alive, and is asked once."""
        pictures, sizes, lock = report.pictures, self._sizes, self._lock
        if not pictures or len(sizes) != len(pictures) or self._reader.places is None:
            return None
        places, found = weakref.ref(self._reader.places), list[Place | None]()

        def locate() -> list[Place | None]:
            known = places()
            if not found and known is not None:
                with lock:
                    for picture, size in zip(pictures, sizes):
                        found.extend(places_or_none(known, *size, len(picture["images"])))
            return found

        return locate

    def _add_full_tokens(self, report: PruneReport) -> None:
        """Says how many tokens each picture would take at its own size, and whether it takes more than it should."""
        sizes = [size for size in self._fitted if size is not None]
        if len(sizes) < len(report.pictures):
            return  # nobody asked for smaller ones
        if any(size.is_smaller for size in sizes):
            report.full_tokens = [size.n_full for size in sizes]
        taken = [picture["n_tokens"] - picture["n_redundant"] for picture in report.pictures]
        over = [n for n, size in zip(taken, sizes) if n > size.most]
        if over and self._config is not None:
            report.notes.append(
                f"image_max_tokens={self._config.image_max_tokens} cannot be kept to: this model makes {min(over)} "
                "tokens or more of such a picture"
            )

    def hand_over(self, state: Prefill) -> list[int]:
        """Puts what `read` gave into the Llama. Returns the prompt that its create_completion finds read already."""
        ids = self._reader.hand_over(state)
        self._number = self._reader.request
        self._generation = Generation(self._reader.llama)
        return ids

    # ---- the answer ----

    @property
    def answered(self) -> tuple[Generation, PruneReport]:
        """The answer's clock and the report, once the prompt has been handed over."""
        assert self._generation is not None and self.report is not None
        return self._generation, self.report

    @contextmanager
    def running(self) -> Iterator[None]:
        """The Llama works for this request inside the block, and can be cancelled. The caller holds the lock."""
        context = self._reader.context
        context.is_cancelled, self._is_running = self._is_over, True
        try:
            yield
        finally:
            context.is_cancelled, self._is_running = None, False

    def next_chunk(self, chunks: Iterator[Any]) -> Any:
        """The next chunk of the answer, or None at its end.

        Args:
            chunks: The chunks that Llama computes, each when it is asked for.

        Raises:
            EngineClosedError: The Llama is closed, or a newer request has ended this one.
            RequestCancelledError: `is_cancelled` says so, or another thread has closed the request.
        """
        with self._lock:
            if not self._is_current:
                if self.finish_reason is not None:
                    return None
                if self._reader.context.ctx is None:
                    raise EngineClosedError("the Llama is closed", "make a new one")
                raise EngineClosedError(
                    "a newer request has ended this stream", "read a stream to its end before the next request"
                )
            generation, report = self.answered
            with self.running(), generation.running(report):
                chunk = next(chunks, None)
            if chunk is not None:
                self.finish_reason = chunk["choices"][0]["finish_reason"] or self.finish_reason
            return chunk

    # ---- the end ----

    def finish(self) -> None:
        """Leaves the Llama as if nothing had been asked, unless a newer request has it. The caller holds the lock."""
        if self._is_current:
            self._reader.begin()

    def drop(self) -> None:
        """As `finish`, without waiting for the lock: another request that has it begins afresh anyway."""
        if self._lock.acquire(blocking=False):
            try:
                self.finish()
            finally:
                self._lock.release()

    def close(self, chunks: Generator[Any, None, None]) -> None:
        """Ends the answer. A thread that waits for its next chunk gets RequestCancelledError within a token.

        Raises:
            EngineClosedError: A callback of the request called it.
        """
        self._is_closed = True  # for a thread that is inside next_chunk, and holds the lock
        with self._lock:
            if self._is_running:
                raise EngineClosedError("a callback of a request cannot end it", "raise an exception in it")
            chunks.close()
            self.finish()

    @property
    def _is_current(self) -> bool:
        """Whether the cache still holds this prompt."""
        return self._reader.context.ctx is not None and self._reader.request == self._number

    def _is_over(self) -> bool:
        return self._is_closed or (self._is_cancelled is not None and self._is_cancelled())
