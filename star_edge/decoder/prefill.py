"""The decoder stage: probe -> scores -> resume.

Every decode is a layer window [first, last) over some rows:

    text before the first image  -> [0, L)   an ordinary decode
    PROBE                        -> [0, K)   the image rows that the vision stage kept, and the text after them.
                                             Scores at layer K choose n2 of n1 rows of each image.
    RESUME                       -> [K, L)   the kept image rows, and the text

With several decoder stages, at layers K1 < K2 < ..., each resume ends at the next layer and is its probe.

Cost with one stage: K (n1 + T) + (L - K) (n2 + T) token-layers. Only q, k and v of layer K are computed twice, for the
rows that stay: the scores need them before it is known which rows those are. With `look_ahead` the text goes through
the layers from K to the last that ranks once more (ahead.py).

Cells: after the probe, the layers below K hold the right K and V in the cells of all probed rows. A kept row must
therefore come back to its own cell: see cells.py, and hybrid.py for decoders with recurrent layers. This is checked
after each decode, not assumed.

The decodes of a window are in windows.py. What an earlier prompt has left is not computed again: see reuse.py.

Knows segments, layers and KV cells. Knows no pixels and no strings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import EngineError
from ..llamacpp.context import DecoderContext
from ..pruning.selection import Selection
from ..rows import Segment
from ..stopwatch import Stopwatch
from . import reuse
from .ahead import look_ahead
from .cells import ParkingCells, StemRows
from .hybrid import HybridCells
from .levels import Levels
from .windows import WindowEnd, Windows


@dataclass
class Seen:
    """The rows of one image, as a decoder stage sees them when it chooses.

    Attributes:
        hidden: States that enter layer K, (n, n_embd) float32.
        mass: As in Segment.
        attention: Mean over heads and the text rows that score, (n,) float32.
        row_attention: Attention of each text row, (n_text, n) float32, if DecoderStage asks for it.
        text_hidden: Hidden states of those text rows, (n_text, n_embd) float32, or None.
        image: Index of the image.
        rows: Indices of these rows among those that the vision stage left, (n,) int64.
    """

    hidden: np.ndarray
    mass: np.ndarray | None
    attention: np.ndarray
    row_attention: np.ndarray | None
    text_hidden: np.ndarray | None
    image: int
    rows: np.ndarray


@dataclass
class DecoderStage:
    """What the decoder stages drop.

    Attributes:
        windows: (layer K, rows of each image that stay) of each stage.
        choose: choose(seen, n_keep) says which rows of an image stay, and what they stand for.
        text_rows: Rows of the text after the last image that score: "all" or "last" as a mean, or "each". "last" is one
            row, with look_ahead the last few.
        divide: divide(seen of all images, n_keep) says how many rows of each image stay, where images may share a
            budget. It is called before `choose`. None: n_keep.
        seen_below: Rows after the prompt see a dropped row in the layers below the stage that dropped it.
        look_ahead: The first and the last layer whose attention ranks, in a stage before the last one (ahead.py). None:
            that at layer K does.
    """

    windows: Sequence[tuple[int, Sequence[int]]]
    choose: Callable[[Seen, int], Selection]
    text_rows: str = "all"
    divide: Callable[[Sequence[Seen], Sequence[int]], Sequence[int]] | None = None
    seen_below: bool = False
    look_ahead: tuple[int, int] | None = None


@dataclass
class Prefill:
    """State after the prompt.

    Attributes:
        logits: Logits of the last row, (n_vocab,) float32.
        n_cells: Rows in the cache.
        gap: The dense position of the next token is n_cells + gap. Not 0 for hybrid decoders alone.
        tokens: Those rows, (n_cells,) int32: a text token's id, or -1 for a row of an image.
        next_position: RoPE position of the next token.
        scores: For each decoder stage and each image, the attention that its rows got there, (n,) float32.
        selections: For each decoder stage and each image, what stayed, as indices into the rows that the vision stage
            left.
        in_place: False if kept rows did not come back to their own cells and were decoded again from the start.
        n_reused: Rows that an earlier prompt had decoded; with a decoder stage, in the layers below it.
        seconds: Time of each step, in seconds.
    """

    logits: np.ndarray
    n_cells: int
    tokens: np.ndarray
    next_position: int
    scores: list[list[np.ndarray]] = field(default_factory=list)
    selections: list[list[Selection]] = field(default_factory=list)
    in_place: bool = True
    n_reused: int = 0
    gap: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def prefill(
    context: DecoderContext,
    segments: Sequence[Segment],
    next_position: int,
    stage: DecoderStage | None = None,
    *,
    keep: bool = False,
) -> Prefill:
    """Decodes a prompt.

    Args:
        context: The decoder.
        segments: The prompt, in order.
        next_position: RoPE position after the prompt.
        stage: What the decoder stages drop, or None for none.
        keep: Start from what an earlier prompt left, and leave what a later one may use. Without it the cache must be
            empty.

    Returns:
        The state after the prompt.

    Raises:
        ContextLengthError: See DecoderContext.decode.
        EngineError: See DecoderContext.decode. The cache must be cleared before the next prompt.
    """
    run = _Run(context, segments, next_position, keep)
    try:
        return run.run(stage)
    except reuse.RowsMovedError:
        context.clear()
        context.tap.set_cell_bias(None)
        again = _Run(context, segments, next_position, keep)
        again.may_change = False
        again.watch.seconds["fallback"] = sum(run.watch.seconds.values())
        return again.run(stage)


class _Run:
    def __init__(
        self, context: DecoderContext, segments: Sequence[Segment], next_position: int, keep: bool = False
    ) -> None:
        self.context = context
        self.keep = keep
        self.may_change = True  # to the stem of another conversation
        self.attached = reuse.Attached()
        self.segments = list(segments)
        self.next_position = next_position
        self.in_order = True
        self.watch = Stopwatch()
        images = [i for i, s in enumerate(self.segments) if s.image is not None]
        self.first_image = images[0] if images else len(self.segments)
        self.last_image = images[-1] if images else -1
        self.has_mass = any(s.mass is not None for s in self.segments)
        self.cells = HybridCells(context, keep) if context.is_hybrid else ParkingCells(context)
        n_scoring = sum(len(s.rows) for s in self.segments[self.last_image + 1 :])
        self.windows = Windows(context, self.cells, n_scoring, keep or self.has_mass, self.watch)

    def run(self, stage: DecoderStage | None) -> Prefill:
        prefix, rest = self.segments[: self.first_image], self.segments[self.first_image :]
        if stage is not None and self.last_image == len(self.segments) - 1:
            raise EngineError("the decoder stage needs text after the last image")
        n_prefix = sum(len(s.rows) for s in prefix)
        layer = stage.windows[0][0] if stage is not None else None
        if self.keep:
            with self.watch.step("reuse"):
                if self.may_change and self.context.owner.saved is not None:
                    self.context.owner.saved.change_to(self.context, self.segments, n_prefix, layer)
                self.attached = self.cells.attach(self.segments, n_prefix, layer)
                self.cells.n_cells = self.attached.n_main
        self.cells.begin(n_prefix, layer)
        n_reused = self.attached.n_main
        if self.context.meter is not None:
            self.context.meter.begin_read(self.n_work(stage, n_prefix))
        # 1) text before the first image
        with self.watch.step("prefix"):
            cells = self.windows.plain(prefix, last_has_logits=not rest, skip=n_reused)
        self.check_cells(cells, self.cells.n_cells - len(cells))
        if not rest:
            return self.result(self.segments, stem=StemRows(self.segments, n_prefix, n_prefix))
        if self.keep and n_reused <= n_prefix:
            with self.watch.step("reuse"):
                self.cells.read_prefix()
        if self.has_mass:
            # An empty cache is filled from its first cell on. This is checked once the rows are there.
            self.set_masses(rest, np.arange(n_prefix, n_prefix + sum(len(s.rows) for s in rest)))
        start = n_prefix
        stem = self.segments[: self.last_image + 1]
        n_stem = sum(len(s.rows) for s in stem)
        if stage is None:
            images, text = self.segments[self.first_image : self.last_image + 1], self.segments[self.last_image + 1 :]
            with self.watch.step("prefill"):
                cells = self.windows.plain(images, last_has_logits=not text, skip=max(0, n_reused - n_prefix))
                self.cells.read_images()
                cells = np.concatenate([cells, self.windows.plain(text, last_has_logits=True)])
            self.check_cells(cells, max(start, n_reused))
            return self.result(self.segments, stem=StemRows(stem, n_prefix, n_stem))

        # 2) probe
        ends = [layer for layer, _ in stage.windows] + [self.context.n_layers]
        with self.watch.step("probe"):
            end = self.windows.run(rest, 0, ends[0], None, stage.text_rows, known=self.attached.hidden)
        self.check_cells(end.cells, start)
        assert end.hidden is not None  # a window that ends below the last layer leaves states
        stem_hidden = end.hidden[: n_stem - n_prefix].copy() if self.keep else None
        levels = Levels(rest, end.cells)
        live, kept_rows = rest, [np.arange(len(s.rows)) for s in rest]
        all_scores, all_selections, joined = [], [], False
        for w, (first, n_keep) in enumerate(stage.windows):
            # 3) choose
            came_back = True
            if stage.look_ahead is not None and stage.look_ahead[1] > first:
                n_after = len(self.segments) - 1 - self.last_image
                with self.watch.step("look_ahead"):
                    end, came_back = look_ahead(
                        self.windows, self.cells, live, n_after, start, first, stage.look_ahead, end, stage.text_rows
                    )
            if self.context.meter is not None:
                self.context.meter.choose()
            with self.watch.step("decoder_stage"):
                selections = self.choose(live, kept_rows, end, n_keep, stage)
                all_scores.append([end.attention[p] for p in self.places(live) if p is not None])
                live, keep_row = self.thin(live, selections)
                self.cells.free(start, keep_row, end.cells)
                if any(s.mass is not None for s in live):
                    self.set_masses(live, end.cells[keep_row])
                own_cells = end.cells[keep_row]
                levels.add(first, live, own_cells)
                kept_rows = [rows if s is None else rows[s.kept] for rows, s in zip(kept_rows, selections)]
            # 4) resume
            joined |= not keep_row.all() and not self.context.tells_text_apart
            with self.watch.step("resume"):
                assert end.hidden is not None
                end = self.windows.run(live, first, ends[w + 1], end.hidden[keep_row], stage.text_rows, joined)
            in_place = came_back and bool(np.array_equal(end.cells, own_cells))
            # Masses belong to cells. Rows that did not come back to theirs stand for themselves alone, and the report
            # says so.
            stayed = [(rows, s) for rows, s in zip(kept_rows, selections) if s is not None]
            all_selections.append([Selection(rows, s.mass if in_place else None) for rows, s in stayed])
            if not in_place:
                self.context.tap.set_cell_bias(None)
                with self.watch.step("fallback"):
                    self.restart(prefix, rest, kept_rows)
                break
        if stage.seen_below and in_place and len(levels.dropped):
            self.cells.leave_dropped()
            self.context.owner.see_below(*levels.arrays(), n_hidden=len(levels.dropped))
        n_live = sum(len(s.rows) for s in (prefix + live)[: self.last_image + 1])
        return self.result(
            prefix + live,
            StemRows(stem, n_prefix, n_live, layer, stem_hidden) if in_place else None,
            scores=all_scores,
            selections=all_selections,
            in_place=in_place,
        )

    def n_work(self, stage: DecoderStage | None, n_prefix: int) -> int:
        """Rows times layers of the decodes to come."""
        n_layers, n = self.context.n_layers, sum(len(s.rows) for s in self.segments)
        if stage is None:
            return int((n - self.attached.n_main) * n_layers)
        n_images = sum(len(s.rows) for s in self.segments if s.image is not None)
        n_known = 0 if self.attached.hidden is None else len(self.attached.hidden)
        ends = [layer for layer, _ in stage.windows] + [n_layers]
        work = (n_prefix - self.attached.n_main) * n_layers + (n - n_prefix - n_known) * ends[0]
        for (first, n_keep), last in zip(stage.windows, ends[1:]):
            work += (n - n_prefix - n_images + sum(n_keep)) * (last - first)
            if stage.look_ahead is not None:
                work += self.windows.n_scoring * max(0, stage.look_ahead[1] - first)
        return int(work)

    def result(self, segments: Sequence[Segment], stem: StemRows | None, **fields: Any) -> Prefill:
        """segments: the rows that are left. stem: None if nothing can be kept."""
        if self.keep and self.in_order and stem is not None:
            with self.watch.step("reuse"):
                self.cells.finish(stem)
        else:
            self.cells.finish(None)
        tokens: list[Any] = [  # arrays: rows of text have tokens
            np.full(len(s.rows), -1) if s.image is not None else original.rows.tokens
            for s, original in zip(segments, self.segments)
        ]
        ids = np.concatenate(tokens).astype(np.int32)
        return Prefill(
            self.context.logits(),
            self.cells.n_cells,
            ids,
            self.next_position,
            n_reused=self.attached.n_rows,
            gap=self.cells.gap,
            seconds=self.watch.seconds,
            **fields,
        )

    def places(self, segments: Sequence[Segment]) -> list[slice | None]:
        """For each image segment, the slice of its rows among those of all segments; None for text."""
        edges = np.cumsum([0] + [len(s.rows) for s in segments])
        return [slice(int(a), int(b)) if s.image is not None else None for s, a, b in zip(segments, edges, edges[1:])]

    def choose(
        self,
        segments: Sequence[Segment],
        kept_rows: Sequence[np.ndarray],
        end: WindowEnd,
        n_keep: Sequence[int],
        stage: DecoderStage,
    ) -> list[Selection | None]:
        """What stays of each segment's rows; None for text, which always stays."""
        n_text = sum(len(s.rows) for s in segments[self.last_image - self.first_image + 1 :])
        hidden, by_row = end.hidden, end.row_attention
        assert hidden is not None
        seen = [
            None
            if place is None or segment.image is None
            else Seen(
                hidden[place],
                segment.mass,
                end.attention[place],
                None if by_row is None else by_row[:, place],
                None if by_row is None else hidden[-n_text:],
                segment.image,
                rows,
            )
            for segment, place, rows in zip(segments, self.places(segments), kept_rows)
        ]
        if stage.divide is not None:
            n_keep = stage.divide([s for s in seen if s is not None], n_keep)
        return [None if s is None else stage.choose(s, n_keep[s.image]) for s in seen]

    def thin(
        self, segments: Sequence[Segment], selections: Sequence[Selection | None]
    ) -> tuple[list[Segment], np.ndarray]:
        """The segments with the rows that go on, and a mask of those rows, (n,) bool."""
        keep_row = np.ones(sum(len(s.rows) for s in segments), bool)
        live = []
        for segment, place, selection in zip(segments, self.places(segments), selections):
            if selection is not None and place is not None:
                keep_row[place] = False
                keep_row[place.start + selection.kept] = True
                segment = _taken(segment, selection.kept, selection.mass)
            live.append(segment)
        return live, keep_row

    def set_masses(self, segments: Sequence[Segment], cells: np.ndarray) -> None:
        """Sets the attention bias log(mass) of the rows' cells; 0 for text and for rows without a mass."""
        bias = np.zeros(int(cells.max()) + 1, np.float32)
        bias[cells] = np.concatenate([np.zeros(len(s.rows)) if s.mass is None else np.log(s.mass) for s in segments])
        self.cells.set_bias(bias)

    def check_cells(self, cells: np.ndarray, start: int) -> None:
        """Checks that row i of the prompt is in cell i. Masses, reuse and `keep` rely on it."""
        if np.array_equal(cells, np.arange(start, start + len(cells))):
            return
        if self.attached.n_rows:
            raise reuse.RowsMovedError
        self.in_order = False
        if self.has_mass:
            raise EngineError(
                "llama.cpp did not fill an empty cache from its first cell on, so masses would be misplaced",
                'use representatives="none"',
            )

    def restart(self, prefix: Sequence[Segment], segments: Sequence[Segment], kept_rows: Sequence[np.ndarray]) -> None:
        """Decodes the rows that go on again, from layer 0. Below layer K they no longer see the dropped rows."""
        has_prefix = self.cells.restart(sum(len(s.rows) for s in prefix))
        kept = [] if has_prefix else list(prefix)
        for segment, rows in zip(segments, kept_rows):
            kept.append(_taken(segment, rows))
        self.windows.plain(kept, last_has_logits=True)


def _taken(segment: Segment, kept: np.ndarray, mass: np.ndarray | None = None) -> Segment:
    """The segment with those of its rows that are kept, and what they stand for."""
    pruned = segment.pruned or len(kept) < len(segment.rows)
    return replace(segment, rows=segment.rows.take(kept), mass=mass, pruned=pruned)
