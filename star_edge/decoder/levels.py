"""What rows after a prompt see of it, by layer: below a decoder stage everything that came there, with the masses of
that time.

A dropped row's K and V of the layers below K are in its cell. The cell is in a parking sequence, where llama.cpp hides
it from MAIN, in all layers. The tap shows it in layers [0, K) (`Tap.set_levels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..rows import Segment


class Levels:
    """Collects what each decoder stage leaves.

    Attributes:
        dropped: Cells of the rows that have been dropped so far, ascending.
    """

    def __init__(self, segments: Sequence[Segment], cells: np.ndarray) -> None:
        """segments, cells: the rows from the first image on, as they were probed, and their cells."""
        self._cells = cells
        self._n_cells = int(cells.max()) + 1
        self._layers: list[int] = []
        self._bias: list[np.ndarray] = []
        self._live = cells
        self.add(0, segments, cells)

    def add(self, layer: int, segments: Sequence[Segment], cells: np.ndarray) -> None:
        """Notes what stays from a layer on: the rows of the segments, in these cells."""
        bias = np.zeros(self._n_cells, np.float32)
        bias[self._cells] = -np.inf
        bias[cells] = np.concatenate([np.zeros(len(s.rows)) if s.mass is None else np.log(s.mass) for s in segments])
        self._layers.append(layer)
        self._bias.append(bias)
        self._live = cells

    @property
    def dropped(self) -> np.ndarray:
        return np.setdiff1d(self._cells, self._live)

    def arrays(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(layers, bias, witness) of `Tap.set_levels`.

        The witness of a dropped row is the next row that stayed. There is one: text comes after the last image. Where a
        layer sees a window of positions alone, a dropped row thus leaves it with its neighbour.
        """
        witness = np.full(self._n_cells, -1, np.int32)
        is_live = np.isin(self._cells, self._live)
        following = np.searchsorted(np.flatnonzero(is_live), np.flatnonzero(~is_live))
        witness[self._cells[~is_live]] = self._cells[np.flatnonzero(is_live)[following]]
        return self._layers, np.stack(self._bias), witness
