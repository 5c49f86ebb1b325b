"""What an answer takes: its tokens, and the engine's time without what the caller does between two pieces of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import llama_cpp
from llama_cpp import Llama

from .report import PruneReport

_END = object()


class Generation:
    """Counts the tokens of one answer, and adds up the time in which it is worked on.

    n_generated: tokens of the answer, as `usage` counts them: a token that ends generation (EOS) is none.
    n_sampled: the same with that token. Each but the first took a decode.
    """

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._seconds = 0.0
        self._since: float | None = None
        self._replaced: Any = None
        self.n_generated = self.n_sampled = 0

    def attach(self) -> None:
        """Counts what the next `Llama.generate` yields, which create_completion calls once for an answer.

        Nothing else shows whether the last token was EOS or the end of a stop string: finish_reason is "stop" for both.
        """
        self._replaced = vars(self._llama).get("generate")
        self._llama.generate = self._generate

    def detach(self) -> None:
        """Undoes `attach`, which also happens once the answer begins."""
        if getattr(vars(self._llama).get("generate"), "__self__", None) is self:
            del self._llama.generate
            if self._replaced is not None:
                self._llama.generate = self._replaced

    def _generate(self, *args: Any, **options: Any) -> Iterator[int]:
        self.detach()
        vocab = self._llama._model.vocab
        for token in self._llama.generate(*args, **options):
            self.n_sampled += 1
            self.n_generated += not llama_cpp.llama_vocab_is_eog(vocab, token)
            yield token

    # ---- time ----

    def start(self) -> None:
        self._since = perf_counter()

    def stop(self, report: PruneReport) -> None:
        """Ends what `start` began, if anything, and writes counts and time into the report."""
        if self._since is not None:
            self._seconds += perf_counter() - self._since
            self._since = None
        report.n_generated, report.n_sampled = self.n_generated, self.n_sampled
        report.milliseconds["generate"] = 1e3 * self._seconds

    @contextmanager
    def running(self, report: PruneReport) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.stop(report)

    def timed(self, chunks: Iterator[Any], report: PruneReport) -> Iterator[Any]:
        """The chunks, with the clock running only while the next one is waited for."""
        while True:
            with self.running(report):
                chunk = next(chunks, _END)
            if chunk is _END:
                return
            yield chunk
