"""Runs layer windows over the segments of a prompt, decode by decode.

Knows segments, layers and what a window leaves. Which cells the rows get is the business of cells.py and hybrid.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..llamacpp.context import DecoderContext
from ..llamacpp.tap import MEAN_ALL, MEAN_HEADS, AttentionRead, Outcome, Plan
from ..rows import Rows, Segment, decode_groups, pieces
from ..stopwatch import Stopwatch
from .cells import Cells


@dataclass
class WindowEnd:
    """What a window leaves at its last layer.

    Attributes:
        hidden: Hidden states, (n, n_embd) float32, or None.
        cells: KV cells of the rows, (n,) int64.
        attention: Attention that each row receives from the text, (n,) float32.
        row_attention: The same for each text row, (n_text, n) float32, or None.
    """

    hidden: np.ndarray | None
    cells: np.ndarray
    attention: np.ndarray
    row_attention: np.ndarray | None


class ReceivedAttention:
    """Adds up what the rows of a prompt receive from the text after the last image, decode by decode.

    Args:
        windows: The prompt's windows.
        n_rows: Rows of the window.
        text_rows: As in DecoderStage.
        last_rows: What each of the rows counts that "last" stands for, in their order.
    """

    def __init__(self, windows: Windows, n_rows: int, text_rows: str, last_rows: Sequence[float] = (1.0,)) -> None:
        self._context = windows.context
        self._n_rows, self._text_rows = n_rows, text_rows
        n_scoring = windows.n_scoring
        weights = np.array(last_rows if text_rows == "last" else np.ones(n_scoring), np.float64)
        self._weights = weights / weights.sum()  # of the last rows of the window
        self._is_mean = text_rows != "each" and bool(np.ptp(weights) == 0)
        self._columns = np.zeros(windows.context.n_ctx + 1024, np.float64)  # the cache is padded past n_ctx
        self._lines: list[np.ndarray] = []
        self._watch = windows.watch
        self._taken = slice(0)  # rows of the decode at hand, as an index of `_weights`

    def read(self, end: int, n: int, layers: list[int]) -> AttentionRead | None:
        """What is read from the decode of the n rows before row `end`, or None if none of them scores."""
        stop = len(self._weights) - (self._n_rows - end)
        n_taken = min(n, max(0, stop))
        if not n_taken:
            return None
        self._taken = slice(stop - n_taken, stop)
        reduce = MEAN_ALL if self._is_mean else MEAN_HEADS
        taken, n_threads = (n - n_taken, n_taken, 1), self._context.n_threads
        return AttentionRead(layers, len(self._columns), taken, reduce, max_rows=n_taken, n_threads=n_threads)

    def add(self, outcome: Outcome) -> None:
        """Takes what that decode has brought back: the mean over its layers."""
        self._watch.take("decoder_scores", outcome.score_seconds)
        weights = self._weights[self._taken] / max(1, len(outcome.attention))
        for attention in outcome.attention:
            received = weights.sum() * attention if attention.ndim == 1 else weights @ attention
            self._columns[: attention.shape[-1]] += received
        if self._text_rows == "each" and outcome.attention:
            self._lines += list(np.mean([np.atleast_2d(attention) for attention in outcome.attention], axis=0))

    def at(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What rows in these cells, (n,) int64, receive: (n,) float32 in all; and from each text row, (n_text, n)
        float32, where that is asked for.
        """

        def at_cells(line: np.ndarray) -> np.ndarray:
            at_rows: np.ndarray = np.pad(line, (0, max(0, len(self._columns) - len(line))))[cells]
            return at_rows

        lines = np.array([at_cells(line) for line in self._lines]) if self._lines else None
        return self._columns[cells].astype(np.float32), lines


class Windows:
    """The windows of one prompt.

    Args:
        context: The decoder.
        cells: The prompt's KV cells.
        n_scoring: Rows of text after the last image, whose attention scores.
        wants_cells: `plain` returns the rows' cells. A recurrent decoder has none.
        watch: Takes the time of scores.
    """

    def __init__(
        self, context: DecoderContext, cells: Cells, n_scoring: int, wants_cells: bool, watch: Stopwatch
    ) -> None:
        self.context = context
        self.cells = cells
        self.n_scoring = n_scoring
        self.wants_cells = wants_cells
        self.watch = watch

    def plain(self, segments: Sequence[Segment], last_has_logits: bool, skip: int = 0) -> np.ndarray:
        """Window [0, L): ordinary decodes, with the true positions. Returns the rows' cells, if they are asked for.

        skip: rows at the beginning, in whole decodes, that are in the cache already.
        """
        cells: list[Any] = []
        at, n_rows = 0, sum(len(s.rows) for s in segments)
        for rows, causal in self.decodes(segments):
            at += len(rows)
            if at <= skip:
                continue
            plan = Plan(want_cells=self.wants_cells, only_cells=True)
            outcome = self.decode(rows, plan, "prefill", causal, last_has_logits and at == n_rows)
            cells += [outcome.cells] if plan.want_cells else []
        return np.concatenate(cells) if cells else np.empty(0, np.int64)

    def run(
        self,
        segments: Sequence[Segment],
        first: int,
        last: int,
        inject: np.ndarray | None,
        text_rows: str,
        joined: bool = False,
        known: np.ndarray | None = None,
    ) -> WindowEnd:
        """Window [first, last) over the segments, from the hidden states `inject` (n, n_embd) when first > 0.

        text_rows: see DecoderStage. joined: see `decodes`. known: states (n, n_embd) that the first rows leave at
        `last`: they come back to their cells and are not computed.
        """
        ctx = self.context
        n_rows, is_end = sum(len(s.rows) for s in segments), last == ctx.n_layers
        hidden = None if is_end else np.empty((n_rows, ctx.n_embd), np.float32)
        cells = np.empty(n_rows, np.int64)
        received = ReceivedAttention(self, n_rows, text_rows)
        n_known, at = 0 if known is None else len(known), 0
        for rows, causal in self.decodes(segments, joined):
            n, is_final = len(rows), at + len(rows) == n_rows
            plan = Plan(window=(first, last, ctx.n_layers), want_cells=True)
            if first > 0:
                assert inject is not None
                plan.inject = inject[at : at + n]
            if at < n_known:  # whole decodes, and none that scores: reuse.common_rows
                assert known is not None and hidden is not None
                plan.window, plan.inject = (last, last, ctx.n_layers), known[at : at + n]
                hidden[at : at + n] = plan.inject
            elif not is_end:
                assert hidden is not None
                plan.hidden = hidden[at : at + n]
                plan.attention = received.read(at + n, n, [last])
            outcome = self.decode(rows, plan, "probe" if first == 0 else "resume", causal, logits=is_end and is_final)
            self.cells.decoded()
            assert outcome.cells is not None  # want_cells
            cells[at : at + n] = outcome.cells
            received.add(outcome)
            at += n
            if first == 0 and at == n_rows - self.n_scoring:
                self.cells.read_images()
        return WindowEnd(hidden, cells, *received.at(cells))

    def decodes(self, segments: Sequence[Segment], joined: bool = False) -> Iterator[tuple[Rows, bool]]:
        """Rows of each decode of a window, and whether they are causal.

        As a rule a segment is a decode of its own, as on stock llama.cpp: kernels round differently for another number
        of rows (the CPU's flash attention changes its accumulator at 64). What shares decodes in every window says
        rows.decode_groups.

        joined: all consecutive segments share a decode. The result is then not bit-identical to stock, and each row
        costs less. The CPU's kernels take 16 rows at a time, and a row left over costs nearly as much as two of those
        (measured, Q4_K on AVX2). A GPU is hardly busy with so few rows. Images whose rows attend to each other are
        never joined, and the last segment stays apart where Cells.resumes_apart says so.
        """
        runs: list[list[Segment]] = []
        for group in decode_groups(segments):
            is_apart = self.cells.resumes_apart and group[-1] is segments[-1]
            if joined and runs and group[0].causal and runs[-1][-1].causal and not is_apart:
                runs[-1] += group
            else:
                runs.append(group)
        for run in runs:
            for parts in pieces(run, self.context.n_ubatch):
                rows = [segment.rows.slice(first, last) for segment, first, last in parts]
                yield self.context.join(rows) if len(run) > 1 else rows[0], run[0].causal

    def decode(self, rows: Rows, plan: Plan, what: str, causal: bool, logits: bool = False) -> Outcome:
        if not causal:
            self.context.set_causal(False)
        try:
            outcome = self.context.decode(rows, self.cells.n_cells + self.cells.gap, plan, what, logits)
        finally:
            if not causal:
                self.context.set_causal(True)
        self.cells.n_cells += len(rows)
        if self.context.meter is not None:
            first, last, _ = plan.window or (0, self.context.n_layers, 0)
            self.context.meter.decoded(len(rows) * (last - first))
        return outcome
