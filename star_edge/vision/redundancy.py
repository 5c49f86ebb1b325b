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
    units = pixels.reshape(rows, columns, -1)
    flat = units.reshape(rows * columns, -1)
    stands = list(range(rows * columns))

    def near(a: np.ndarray, b: np.ndarray) -> list[bool]:
        """Of pairs of units that may be alike: two within the tolerance of a third are within twice that."""
        found = (np.abs(a - b) <= 2 * tolerance).all(axis=1) if tolerance else (a == b).all(axis=1)
        return [bool(pair) for pair in found]

    for row in range(rows):
        left = [False, *near(units[row, 1:], units[row, :-1])]
        above = near(units[row], units[row - 1]) if row else [False] * columns
        for column in range(columns):
            unit = row * columns + column
            for there, neighbour in ((left[column], unit - 1), (above[column], unit - columns)):
                if there and (not tolerance or np.abs(flat[unit] - flat[stands[neighbour]]).max() <= tolerance):
                    stands[unit] = stands[neighbour]
                    break
    return np.array(stands)


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
