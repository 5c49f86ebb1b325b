"""KV cells and recurrent states of hybrid decoders: attention in some layers, a recurrent state in the others.

A state is one for the whole sequence and cannot go back. That fits layer windows: the probe [0, K) moves on the states
of layers below K alone, and the resume [K, L) those of the others, each over exactly the rows that the layer sees.

The memory allows no parking: a sequence that rows are copied to gets the state too. So what is dropped stays in MAIN,
hidden from all rows by a cell bias of -inf, and what goes on gets new dense positions after all others:

    free       cuts the dense positions of the rows that go on out of MAIN. llama_memory_recurrent::seq_rm allows that
               before the position that the state stands at, which is the last row's. The last row's cell is hidden
               and goes after the first decode of the resume. Therefore a resume takes two decodes at least.
    gap        what dense positions are then past the number of rows. It stays until the cache is emptied.
    finish     frees the dropped rows, or leaves them hidden for the next prompt.

For a further question the state is saved at two places, and only those can be gone back to: at the end of the text
before the first image, and after the last image. Each copy is as large as the state itself (19 MiB for a Qwen3.5 of
0.8B, 50 MiB for one of 4B), and the first one lives while a stem of the same prefix does. Invariants 1, 3, 4 and 5 of
reuse.py hold here too. In place of 2: between two prompts the stem's cells belong to MAIN. Whatever else clears or cuts
the cache forgets the stem (TappedContext), and what is done past that shows in MAIN's last position, unless it left as
many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..llamacpp import saved_rows
from ..llamacpp.context import MAIN, DecoderContext
from ..pruning.config import Keep
from ..rows import Segment
from . import reuse
from .cells import Cells, StemRows, runs_of


@dataclass
class HybridStem(reuse.KeptRows):
    """Rows in MAIN, with what was decoded after them.

    Attributes:
        state: Recurrent state after the last image; with a decoder stage, of layers from K on that after the prefix.
        prefix_state: Recurrent state after the prefix, or None.
    """

    state: np.ndarray
    prefix_state: np.ndarray | None

    def is_intact(self, context: DecoderContext) -> bool:
        return (
            self.buffer is context.buffer
            and self.n_ubatch == context.n_ubatch
            and context.span(MAIN)[1] == context.owner.stem_end - 1
        )

    def n_usable(self, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> int:
        n = reuse.common_rows(self.segments, segments, self.n_ubatch)
        if n == self.n_rows and layer == self.layer:
            return n
        return n_prefix if n >= n_prefix == self.n_prefix and self.prefix_state is not None else 0

    def save(self, context: DecoderContext, most: int) -> np.ndarray | None:
        # what follows the stem too: it cannot be cut off without its state
        return saved_rows.save_rows(context.llama, MAIN, most)

    def restore(self, context: DecoderContext, data: np.ndarray) -> None:
        saved_rows.restore_rows(context.llama, MAIN, data)
        context.owner.stem_end = context.span(MAIN)[1] + 1

    @property
    def arrays(self) -> list[np.ndarray]:
        return super().arrays + [array for array in (self.state, self.prefix_state) if array is not None]


class HybridCells(Cells):
    """See the module. keep: states are saved for the next prompt."""

    resumes_apart = True

    def __init__(self, context: DecoderContext, keep: bool) -> None:
        super().__init__(context)
        self.keep = keep
        self.state: np.ndarray | None = None
        self.prefix_state: np.ndarray | None = None
        self.bias: np.ndarray | None = None
        self.hidden = np.zeros(0, bool)  # of each cell: no row may see it
        self.last_row: tuple[int, int] | None = None  # dense position and cell, until another row is decoded
        self.dropped: tuple[int, int] | None = None  # dense positions among which all dropped rows are
        self.is_attached = False

    def attach(self, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> reuse.Attached:
        context, owner = self.context, self.context.owner
        stem, owner.stem, owner.n_parked, owner.dropped = owner.stem, None, 0, None
        if stem is None or not stem.is_intact(context):
            context.clear()
            return reuse.Attached()
        n = stem.n_usable(segments, n_prefix, layer)
        if n == stem.n_rows and layer == stem.layer:
            n_main = n if layer is None else stem.n_prefix
            saved_rows.restore_state(context.llama, stem.state, n_main - 1)
            context.remove(MAIN, n_main)
            self.is_attached = True
            self.prefix_state = stem.prefix_state
            if sum(len(s.rows) for s in _up_to_last_image(segments)) == n:
                self.state = stem.state
            return reuse.Attached(n_main, stem.hidden)
        if n:
            saved_rows.restore_state(context.llama, stem.prefix_state, n_prefix - 1)
            context.remove(MAIN, n_prefix)
            self.prefix_state = stem.prefix_state
            return reuse.Attached(n_prefix)
        context.clear()
        return reuse.Attached()

    def begin(self, n_prefix: int, layer: int | None) -> None:
        if layer is not None and not n_prefix and not self.is_attached:
            self.context.clear_data()  # the probe reaches no layer from K on, whose state would be an earlier prompt's

    def read_prefix(self) -> None:
        if self.keep and self.n_cells and self.prefix_state is None:
            self.prefix_state = saved_rows.save_state(self.context.llama)

    def read_images(self) -> None:
        if self.keep and self.state is None:
            self.state = saved_rows.save_state(self.context.llama)

    def decoded(self) -> None:
        if self.last_row is not None:
            position, cell = self.last_row
            self.last_row = None
            self.context.remove(MAIN, position, position + 1)
            self.hidden[cell] = False
            self._apply()

    def set_bias(self, bias: np.ndarray) -> None:
        self.bias = bias
        self._apply()

    def _apply(self) -> None:
        if not self.hidden.any():
            self.context.tap.set_cell_bias(self.bias)
            return
        bias = np.zeros(max(len(self.hidden), 0 if self.bias is None else len(self.bias)), np.float32)
        if self.bias is not None:
            bias[: len(self.bias)] = self.bias
        bias[: len(self.hidden)][self.hidden] = -np.inf
        self.context.tap.set_cell_bias(bias)

    def free(self, start: int, keep_row: np.ndarray, cells: np.ndarray) -> None:
        base = self.n_cells + self.gap - len(keep_row)
        freed = keep_row.copy()
        freed[-1] = False
        for first, last in runs_of(freed):
            self.context.remove(MAIN, base + first, base + last)
        hidden = np.zeros(max(len(self.hidden), int(cells.max()) + 1), bool)
        hidden[: len(self.hidden)] = self.hidden
        hidden[cells[~freed]] = True
        self.hidden = hidden
        self.last_row = base + len(keep_row) - 1, int(cells[-1])
        self.dropped = start, base + len(keep_row)
        self.gap = base + len(keep_row) - start
        self.n_cells = start
        self._apply()

    def restart(self, start: int) -> bool:
        self.context.clear()
        self.n_cells = self.gap = 0
        self.bias = self.last_row = self.dropped = None
        self.hidden = np.zeros(0, bool)
        self._apply()
        return False

    def leave_dropped(self) -> None:
        self.context.owner.dropped = self.dropped
        self.dropped = None

    def finish(self, stem: StemRows | None) -> None:
        if stem is not None and self.state is not None:
            context, owner = self.context, self.context.owner
            n_rows = sum(len(s.rows) for s in stem.segments)
            owner.stem = HybridStem(
                list(stem.segments),
                stem.n_prefix,
                n_rows,
                stem.layer,
                stem.hidden,
                context.n_ubatch,
                context.buffer,
                self.state,
                self.prefix_state,
            )
            owner.n_parked = int(self.hidden.sum())
            if self.dropped is not None:
                owner.dropped = self.dropped
            owner.stem_end = self.n_cells + self.gap
        elif self.dropped is not None:
            self.context.remove(MAIN, *self.dropped)
            self.hidden[:] = False
            self._apply()


def _up_to_last_image(segments: Sequence[Segment]) -> Sequence[Segment]:
    return segments[: max(i for i, s in enumerate(segments) if s.image is not None) + 1]


def at_attention(
    context: DecoderContext, windows: Sequence[tuple[int, Keep]]
) -> tuple[list[tuple[int, Keep]], list[str]]:
    """The decoder stages, each at the layer with attention that is nearest to the one asked for, and notes on those
    that are elsewhere. Of two stages that meet in a layer the later one stays, which keeps fewer.
    """
    if not context.is_hybrid:
        return list(windows), []
    placed: dict[int, Keep] = {}
    notes = []
    for layer, keep in windows:
        nearest = context.nearest_attention(layer)
        placed[nearest] = keep
        if nearest != layer:
            notes.append(f"layer {layer} of this decoder has no attention: the decoder stage is at layer {nearest}")
    return list(placed.items()), notes
