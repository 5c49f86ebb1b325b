"""How the rows that go on past layer K come back to their KV cells.

After the probe the layers below K hold the right K and V in the cells of all probed rows. What goes on must come back
to its own cells, and what was dropped must be seen by no row and keep its cells until the prompt is read. How is a
matter of the decoder: by parking (here), or by hiding (hybrid.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..llamacpp.context import MAIN, N_SEQUENCES, PARKED, DecoderContext
from ..pruning.config import PruneConfig
from ..rows import Segment
from . import reuse


@dataclass
class StemRows:
    """The rows of a prompt that the next one may use, at the end of the prompt.

    Attributes:
        segments: The stem's segments.
        n_prefix: Rows of the text before the first image.
        n_live: The stem's rows that went through all layers.
        layer: K of the first decoder stage, or None.
        hidden: As in reuse.Stem.
    """

    segments: Sequence[Segment]
    n_prefix: int
    n_live: int
    layer: int | None = None
    hidden: np.ndarray | None = None


class Cells(ABC):
    """The KV cells of one prompt while it is read.

    Attributes:
        n_cells: Rows of the prompt that stand in the cache. A resume counts anew from its first row on.
        gap: What dense positions are past that number.
        resumes_apart: The last row of a resume must not be in its first decode.
    """

    resumes_apart = False

    def __init__(self, context: DecoderContext) -> None:
        self.context = context
        self.n_cells = 0
        self.gap = 0

    @abstractmethod
    def attach(self, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> reuse.Attached:
        """What the last prompt has left for this one; everything else is taken out of the cache."""

    @abstractmethod
    def begin(self, n_prefix: int, layer: int | None) -> None:
        """The prompt is about to be read, after `attach`."""

    @abstractmethod
    def read_prefix(self) -> None:
        """The text before the first image is read."""

    @abstractmethod
    def read_images(self) -> None:
        """The last image is read, in all layers below the first layer K."""

    @abstractmethod
    def decoded(self) -> None:
        """A decode of a window is over."""

    def set_bias(self, bias: np.ndarray) -> None:
        """Attention bias of each cell, (n,) float32."""
        self.context.tap.set_cell_bias(bias)

    @abstractmethod
    def free(self, start: int, keep_row: np.ndarray, cells: np.ndarray) -> None:
        """Frees the cells of the rows that go on, and sets the others aside.

        Args:
            start: Rows before those of the window.
            keep_row: Which rows of the window go on, (n,) bool.
            cells: Their cells, (n,) int64.
        """

    def rewind(self, start: int) -> None:
        """Frees the cells of all rows from `start` on, for the same rows in another window (ahead.py)."""
        raise NotImplementedError  # a recurrent state cannot go back

    @abstractmethod
    def restart(self, start: int) -> bool:
        """Gives up the rows from `start` on. Returns whether those before it are still there."""

    @abstractmethod
    def leave_dropped(self) -> None:
        """What is dropped is needed where it is, until the cache is emptied or an answer needs its cells."""

    @abstractmethod
    def finish(self, stem: StemRows | None) -> None:
        """The prompt is read. Keeps the stem, or without one frees all that is set aside."""


class ParkingCells(Cells):
    """All rows of a window are parked in another sequence (one per decoder stage, since their dense positions overlap),
    and the cells of the kept rows are freed. llama.cpp's allocator (llama_kv_cache::find_slot) walks up from the first
    freed cell and meets exactly those cells, in order.
    """

    def __init__(self, context: DecoderContext) -> None:
        super().__init__(context)
        self.n_parkings = 0

    def attach(self, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> reuse.Attached:
        return reuse.attach(self.context, segments, n_prefix, layer)

    def begin(self, n_prefix: int, layer: int | None) -> None:
        pass

    def read_prefix(self) -> None:
        pass

    def read_images(self) -> None:
        pass

    def decoded(self) -> None:
        pass

    def free(self, start: int, keep_row: np.ndarray, cells: np.ndarray) -> None:
        parking = PARKED + self.n_parkings
        self.n_parkings += 1
        self.context.park(start, parking)
        for first, last in runs_of(keep_row):
            self.context.remove(parking, start + first, start + last)
        self.n_cells = start

    def rewind(self, start: int) -> None:
        self.context.remove(MAIN, start)
        self.n_cells = start

    def restart(self, start: int) -> bool:
        self._empty_parkings()
        self.context.remove(MAIN, start)
        self.n_cells = start
        return True

    def leave_dropped(self) -> None:
        self.n_parkings = 0

    def finish(self, stem: StemRows | None) -> None:
        if stem is not None:
            reuse.keep(self.context, stem.segments, stem.n_prefix, stem.n_live, stem.layer, stem.hidden)
        elif self.n_parkings:
            self._empty_parkings()

    def _empty_parkings(self) -> None:
        for parking in range(PARKED, N_SEQUENCES):
            self.context.remove(parking, 0)


def runs_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """[first, last) of each run of True in a mask (n,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def possible_in_cells(
    context: DecoderContext, config: PruneConfig, n_cells: int, *, has_stage: bool
) -> tuple[PruneConfig, list[str]]:
    """The config without what cannot be said of this decoder's KV cells, and a note on each such thing.

    Args:
        context: The decoder.
        config: What is asked for.
        n_cells: Cells that the prompt takes at most.
        has_stage: Whether there is a decoder stage.
    """
    notes, problem = [], ""
    move_on = "with swa_full=False, KV cells of tokens that leave the sliding window go to later ones"
    if 0 < context.n_swa < n_cells:  # the bias is made for the cells of another cache
        problem = "the prompt is longer than the model's sliding window"
    elif not context.has_cells:
        problem = "a recurrent decoder has no attention in which a token could count for several"
    elif context.cells_move_on:
        problem = move_on
    if problem and {config.representatives, config.decoder_representatives} - {"none", None}:
        config = replace(config, representatives="none", decoder_representatives=None)
        notes.append(f"no representatives: {problem}")
    if context.cells_move_on and has_stage and config.seen_below:
        config = replace(config, seen_below=False)
        notes.append(f"the answer sees no dropped tokens: {move_on}")
    return config, notes
