"""The decoder stage: probe -> scores -> resume.

Everything is a layer window [first, last) over some rows:

    text before the first image  -> [0, L)   an ordinary decode
    PROBE                        -> [0, K)   image rows that the vision stage kept, and the text after them; scores at layer K
    choose n2 of n1 rows for each image
    RESUME                       -> [K, L)   kept image rows and text rows

so token-layers are K (n1 + T) + (L - K) (n2 + T), and nothing is computed twice but q, k and v of layer K for the rows that stay
(the scores need them before it is known which). After the probe, layers < K hold the right K and
V in the cells of all probed rows, so a kept row must come back to its own cell. All rows are parked in another sequence, the
cells of the kept ones are freed, and llama.cpp's allocator (llama_kv_cache::find_slot) walks up from the first freed cell:
it meets exactly those cells, in order. That is verified, not assumed.

Knows segments, layers and cells; knows no pixels and no strings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import EngineError
from ..selection import Selection
from ..tap import MEAN_ALL, AttentionRead, Plan
from .context import MAIN, PARKED, DecoderContext, Rows


@dataclass
class Segment:
    """A run of text tokens or the tokens of one image, in prompt order.

    image: index of the image, or None for text.
    causal: False for images whose rows attend to each other both ways (Gemma 3).
    mass: original tokens that each row stands for, (n,), or None for one each. Its cell gets log(mass) added to its attention logits.
    """

    rows: Rows
    image: int | None = None
    causal: bool = True
    mass: np.ndarray | None = None


@dataclass
class DecoderStage:
    """What to drop: layer K, how many rows of each image stay, and which text rows score.

    choose(scores (n,), n_keep, mass (n,) or None) says which rows of an image stay, and what they stand for.
    """

    layer: int
    n_keep: Sequence[int]
    choose: Callable[[np.ndarray, int, np.ndarray | None], Selection]
    last_row_only: bool = False


@dataclass
class Prefill:
    """State after the prompt.

    logits: (n_vocab,) float32 of the last row.
    n_cells: rows that are in the cache, the dense position of the next token.
    tokens: what those rows are, (n_cells,) int32: a text token's id, or -1 for a row of an image.
    next_position: RoPE position of the next token.
    scores, selections: for each image, (n,) float32 and what stayed of its rows; empty without a decoder stage.
    in_place: False when kept rows did not come back to their own cells and were decoded again from the start.
    """

    logits: np.ndarray
    n_cells: int
    tokens: np.ndarray
    next_position: int
    scores: list[np.ndarray] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    in_place: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def prefill(context: DecoderContext, segments: Sequence[Segment], next_position: int, stage: DecoderStage | None = None) -> Prefill:
    """Runs the prompt from an empty cache.

    Raises:
        ContextLengthError, EngineError: see DecoderContext.decode. The cache must be cleared before the next prompt.
    """
    return _Run(context, segments, next_position).run(stage)


class _Run:
    def __init__(self, context: DecoderContext, segments: Sequence[Segment], next_position: int) -> None:
        self.context = context
        self.segments = list(segments)
        self.next_position = next_position
        self.n_cells = 0
        self.seconds: dict[str, float] = {}
        images = [i for i, s in enumerate(self.segments) if s.image is not None]
        self.first_image = images[0] if images else len(self.segments)
        self.last_image = images[-1] if images else -1
        self.has_mass = any(s.mass is not None for s in self.segments)

    def run(self, stage: DecoderStage | None) -> Prefill:
        prefix, rest = self.segments[: self.first_image], self.segments[self.first_image :]
        if stage is not None and self.last_image == len(self.segments) - 1:
            raise EngineError("the decoder stage needs text after the last image")
        # 1) text before the first image
        with self.timed("prefix"):
            self.plain(prefix, last_has_logits=not rest)
        if not rest:
            return self.result()
        if self.has_mass:
            # An empty cache is filled from its first cell on; checked once the rows are there.
            self.set_masses(np.arange(self.n_cells, self.n_cells + sum(len(s.rows) for s in rest)), [s.mass for s in rest], rest)
        if stage is None:
            with self.timed("prefill"):
                start = self.n_cells
                cells = self.plain(rest, last_has_logits=True)
            self.check_cells(cells, start)
            return self.result()

        # 2) probe
        start = self.n_cells
        with self.timed("probe"):
            hidden, cells, columns = self.probe(rest, stage)
        self.check_cells(cells, start)
        # 3) choose
        with self.timed("decoder_stage"):
            scores, selections, keep_row = self.choose(rest, cells, columns, stage)
            self.free_kept(start, keep_row)
            if self.has_mass or any(s.mass is not None for s in selections):
                kept = iter(selections)
                self.set_masses(cells[keep_row], [next(kept).mass if s.image is not None else None for s in rest], rest, selections)
        # 4) resume
        with self.timed("resume"):
            new_cells = self.resume(rest, hidden, keep_row, stage.layer)
        in_place = bool(np.array_equal(new_cells, cells[keep_row]))
        if not in_place:
            # Masses were for cells that the rows did not come back to: what stays now stands for itself alone, and is reported so.
            self.context.tap.set_cell_bias(None)
            selections = [Selection(s.kept) for s in selections]
            with self.timed("fallback"):
                self.restart(rest, keep_row, start)
        self.context.remove(PARKED, 0)
        return self.result(scores=scores, selections=selections, in_place=in_place)

    def result(self, **fields: object) -> Prefill:
        selections = iter(fields.get("selections", ()))
        tokens = []
        for segment in self.segments:
            selection = next(selections, None) if segment.image is not None else None
            n = len(segment.rows) if selection is None else len(selection.kept)
            tokens.append(segment.rows.tokens if segment.rows.tokens is not None else np.full(n, -1))
        ids = np.concatenate(tokens).astype(np.int32)
        return Prefill(self.context.logits(), self.n_cells, ids, self.next_position, seconds=self.seconds, **fields)

    def timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)

    # ---- windows ----

    def plain(self, segments: Sequence[Segment], last_has_logits: bool) -> np.ndarray:
        """Window [0, L): ordinary decodes, with the true positions."""
        cells = []
        for s, segment in enumerate(segments):
            for rows, is_last in self.chunks(segment):
                wants = last_has_logits and is_last and s == len(segments) - 1
                plan = Plan(want_cells=True)
                cells.append(self.decode(rows, plan, "prefill", segment.causal, wants).cells)
        return np.concatenate(cells) if cells else np.empty(0, np.int64)

    def probe(self, segments: Sequence[Segment], stage: DecoderStage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Window [0, K). Returns the hidden states (n, n_embd), the cells (n,), and the attention that each cell gets."""
        ctx, layer = self.context, stage.layer
        n_rows = sum(len(s.rows) for s in segments)
        hidden = np.empty((n_rows, ctx.n_embd), np.float32)
        cells = np.empty(n_rows, np.int64)
        columns = np.zeros(ctx.n_ctx + 1024, np.float64)  # the cache is padded past n_ctx
        n_scoring = sum(len(s.rows) for s in segments[self.last_image - self.first_image + 1 :])
        at = 0
        for s, segment in enumerate(segments):
            scores = s > self.last_image - self.first_image
            for rows, is_last in self.chunks(segment):
                n = len(rows)
                plan = Plan(window=(0, layer, ctx.n_layers), hidden=hidden[at : at + n], want_cells=True)
                weight, rows_read = n / n_scoring, (0, n, 1)
                reads = scores
                if stage.last_row_only:
                    weight, rows_read = 1.0, (n - 1, 1, 1)
                    reads = is_last and s == len(segments) - 1
                if reads:
                    plan.attention = AttentionRead([layer], len(columns), rows_read, MEAN_ALL, n_threads=ctx.n_threads)
                outcome = self.decode(rows, plan, "probe", segment.causal)
                cells[at : at + n] = outcome.cells
                for attention in outcome.attention:
                    columns[: len(attention)] += weight * attention
                self.seconds["decoder_scores"] = self.seconds.get("decoder_scores", 0.0) + outcome.score_seconds
                at += n
        return hidden, cells, columns

    def choose(
        self, segments: Sequence[Segment], cells: np.ndarray, columns: np.ndarray, stage: DecoderStage
    ) -> tuple[list, list, np.ndarray]:
        """Scores and selection of each image, and (n,) bool of the rows that go on."""
        keep_row = np.ones(len(cells), bool)
        scores, selections = [], []
        at = 0
        for segment in segments:
            n = len(segment.rows)
            if segment.image is not None:
                score = columns[cells[at : at + n]].astype(np.float32)
                selection = stage.choose(score, stage.n_keep[len(selections)], segment.mass)
                keep_row[at : at + n] = False
                keep_row[at + selection.kept] = True
                scores.append(score)
                selections.append(selection)
            at += n
        return scores, selections, keep_row

    def set_masses(
        self,
        cells: np.ndarray,
        masses: Sequence[np.ndarray | None],
        segments: Sequence[Segment],
        selections: Sequence[Selection] | None = None,
    ) -> None:
        """Attention bias log(mass) for the cells of the segments' rows, those of text and of rows without a mass none."""
        sizes = iter([len(s.kept) for s in selections] if selections is not None else [])
        parts = []
        for segment, mass in zip(segments, masses):
            n = len(segment.rows) if selections is None or segment.image is None else next(sizes)
            parts.append(np.zeros(n) if mass is None else np.log(mass))
        bias = np.zeros(int(cells.max()) + 1, np.float32)
        bias[cells] = np.concatenate(parts)
        self.context.tap.set_cell_bias(bias)

    def check_cells(self, cells: np.ndarray, start: int) -> None:
        if self.has_mass and not np.array_equal(cells, np.arange(start, start + len(cells))):
            raise EngineError("rows of an empty cache are not in its first cells, where their attention bias is", "use mass_share=0")

    def free_kept(self, start: int, keep_row: np.ndarray) -> None:
        """Parks all rows from dense position `start` on, then frees the cells of those that go on, so that they are found again."""
        self.context.park(start)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], keep_row.astype(np.int8), [0]])))
        for first, last in edges.reshape(-1, 2):
            self.context.remove(PARKED, start + int(first), start + int(last))
        self.n_cells = start

    def resume(self, segments: Sequence[Segment], hidden: np.ndarray, keep_row: np.ndarray, layer: int) -> np.ndarray:
        """Window [K, L) over the rows that go on. Returns their cells.

        Each segment is a decode of its own, as it was in the probe and is on stock: kernels round differently for another
        number of rows (the CPU's flash attention changes its accumulator at 64), and non-causal images must stay apart.
        """
        ctx = self.context
        cells, at = [], 0
        for s, segment in enumerate(segments):
            keep = keep_row[at : at + len(segment.rows)]
            states = hidden[at : at + len(segment.rows)][keep]
            done = 0
            for rows, is_last in self.chunks(Segment(Rows(segment.rows.positions[..., keep]), causal=segment.causal)):
                plan = Plan(window=(layer, ctx.n_layers, ctx.n_layers), inject=states[done : done + len(rows)], want_cells=True)
                wants = is_last and s == len(segments) - 1
                cells.append(self.decode(rows, plan, "resume", segment.causal, logits=wants).cells)
                done += len(rows)
            at += len(segment.rows)
        return np.concatenate(cells)

    def restart(self, segments: Sequence[Segment], keep_row: np.ndarray, start: int) -> None:
        """Plain prefill of the rows that go on: their layers below K no longer see the dropped ones."""
        self.context.remove(PARKED, 0)
        self.context.remove(MAIN, start)
        self.n_cells = start
        kept, at = [], 0
        for segment in segments:
            keep = keep_row[at : at + len(segment.rows)]
            part = lambda array, keep=keep: None if array is None else array[keep]
            rows = segment.rows
            kept.append(Segment(Rows(rows.positions[..., keep], part(rows.tokens), part(rows.embeddings)), segment.image, segment.causal))
            at += len(keep)
        self.plain(kept, last_has_logits=True)

    # ---- decodes ----

    def chunks(self, segment: Segment) -> list[tuple[Rows, bool]]:
        """Pieces of at most n_ubatch rows, so that one decode is one graph, and whether a piece is the segment's last."""
        n, size = len(segment.rows), self.context.n_ubatch
        return [(segment.rows.slice(at, min(n, at + size)), at + size >= n) for at in range(0, n, size)]

    def decode(self, rows: Rows, plan: Plan, what: str, causal: bool, logits: bool = False):
        if not causal:
            self.context.set_causal(False)
        try:
            outcome = self.context.decode(rows, self.n_cells, plan, what, logits)
        finally:
            if not causal:
                self.context.set_causal(True)
        self.n_cells += len(rows)
        return outcome


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start
