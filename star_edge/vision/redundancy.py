"""Units of a picture that equal, or nearly equal, a neighbour: blank paper, flat areas, rules of a form.

They need not enter the encoder: what they show, a unit that stays shows too (PixelPrune, arXiv 2604.00886, leaves out
patches that can be predicted from their neighbours). Knows pixels and grids, no model.
"""

from __future__ import annotations

import numpy as np


def representatives(pixels: np.ndarray, grid: tuple[int, int], tolerance: float = 0.0) -> np.ndarray:
    """For each unit, the unit that stands for it, (n_units,) int64. A unit that stays stands for itself.

    In raster order a unit is left out if it is like its left or its upper neighbour: like the neighbour itself, or like
    the unit that stands for it, so that no chain of small steps can end far from where it began.

    Args:
        pixels: (n_units, ...) float32, row by row.
        grid: (rows, columns).
        tolerance: The largest difference of a value that units which are alike may have. 0: none.
    """
    rows, columns = grid
    flat = pixels.reshape(rows * columns, -1)
    stands = np.arange(rows * columns)

    def alike(a: int, b: int) -> bool:
        if tolerance:
            return bool(np.abs(flat[a] - flat[b]).max() <= tolerance)
        return np.array_equal(flat[a], flat[b])

    for unit in range(rows * columns):
        row, column = divmod(unit, columns)
        for there, neighbour in ((column > 0, unit - 1), (row > 0, unit - columns)):
            if there and alike(unit, int(stands[neighbour])):
                stands[unit] = stands[neighbour]
                break
    return stands


def with_more(stands: np.ndarray, n: int) -> np.ndarray:
    """The same with n units that stay: some that were left out, evenly spread among them, stand for themselves.

    Raises:
        ValueError: There are fewer units, or more stay already.
    """
    out = np.flatnonzero(stands != np.arange(len(stands)))
    missing = n - (len(stands) - len(out))
    if not 0 <= missing <= len(out):
        raise ValueError(f"cannot make {n} of {len(stands)} units stay, of which {len(stands) - len(out)} do")
    back = out[((np.arange(missing) + 0.5) * len(out) / max(1, missing)).astype(np.int64)]
    more: np.ndarray = stands.copy()
    more[back] = back
    return more


def masses(stands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The units that stay, ascending, (k,) int64, and how many units each stands for, (k,) float64."""
    kept, counts = np.unique(stands, return_counts=True)
    return kept, counts.astype(np.float64)
