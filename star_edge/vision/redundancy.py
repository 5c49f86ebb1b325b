"""Units of a picture that equal, or nearly equal, one near them: blank paper, flat areas, rules of a form.

They need not enter the encoder: what they show, a unit that stays shows too (PixelPrune, arXiv 2604.00886, leaves out
patches that can be predicted from their neighbours). Which of them can go without costing answers was measured
(ACCURACY.md): the ground can, but for the gap between two things side by side, and the inside of a thing of one colour,
but not all of a bar. Knows pixels and grids, no model.
"""

from __future__ import annotations

import numpy as np

from ..pruning.selection import REACH, between

_SAMPLE = 97  # every so many values are compared first: most units that differ do so there
_CENTRES = 512  # colours that the ground's is looked for among, at most


def representatives(pixels: np.ndarray, grid: tuple[int, int], tolerance: float = 0.0) -> np.ndarray:
    """For each unit, the unit that stands for it, (n_units,) int64. A unit that stays stands for itself.

    A unit may be left out if all units that touch it are like it, or if it is part of the ground: flat, and of the
    colour that most flat units have. Flat is a unit that is like one that it touches. So the edge of a bar or a button
    stays, though all of it has one colour. Ground between two things side by side (selection.between) stays as well:
    the gap between two columns is where an encoder may tell what belongs to what.

    It is left out if one that stays is like it and at most REACH rows and columns away. The nearest unit that may not
    be left out stands for it. For the others that is one of themselves: the one with the most undecided units like it
    stays and stands for these (the first of equal ones in raster order), until none has any.

    Args:
        pixels: (n_units, channels, ...) float32, row by row.
        grid: (rows, columns).
        tolerance: The largest difference of a value that units which are alike may have. 0: none.
    """
    n = grid[0] * grid[1]
    near, alike, touches = _look_around(pixels.reshape(*grid, -1), tolerance)
    flat: np.ndarray = np.any(alike[:, touches], axis=1)
    inside = flat & (alike | (near == n))[:, touches].all(axis=1)
    ground = _ground(pixels, flat, tolerance)
    ground &= ~between(~ground, np.arange(n), grid)
    undecided = np.append(inside | ground, False)  # one more for what is outside the picture
    stands = np.arange(n)
    staying = alike & ~undecided[near]
    found = undecided[:n] & staying.any(axis=1)
    stands[found] = near[found, staying[found].argmax(axis=1)]
    undecided[:n] &= ~found
    counts = np.append((alike & undecided[near]).sum(axis=1), 0)
    while np.any(waiting := counts * undecided):
        unit = int(waiting.argmax())
        members = near[unit, alike[unit]]
        members = members[undecided[members]]
        stands[members] = unit
        decided = np.append(members, unit)
        undecided[decided] = False
        np.subtract.at(counts, near[decided][alike[decided]], 1)
    return stands


def _look_around(units: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The units within REACH of each, the nearest first; which of them are like it; and which places touch it.

    Args:
        units: (rows, columns, values) float32.
        tolerance: As in `representatives`.

    Returns:
        (n, n_places) int64, n for a place outside the picture; (n, n_places) bool, False there; (n_places,) bool.
    """
    rows, columns = units.shape[:2]
    n = rows * columns
    flat = units.reshape(n, -1)
    index = np.arange(n).reshape(rows, columns)
    span = range(-REACH, REACH + 1)
    around = [(i, j) for i in span for j in span if (i, j) != (0, 0)]
    places = sorted(around, key=lambda place: (place[0] ** 2 + place[1] ** 2, place))
    near = np.full((n, len(places)), n)
    alike = np.zeros(near.shape, bool)
    for place, (down, right) in enumerate(places):
        if (down, right) < (0, 0) or down >= rows or abs(right) >= columns:
            continue  # found from the other side, or nowhere
        here = index[: rows - down, max(0, -right) : columns - max(0, right)].ravel()
        there = index[down:, max(0, right) : columns - max(0, -right)].ravel()
        back = places.index((-down, -right))
        near[here, place], near[there, back] = there, here
        for values in (flat[:, ::_SAMPLE], flat):
            same = (np.abs(values[here] - values[there]) <= tolerance).all(axis=1)
            here, there = here[same], there[same]
        alike[here, place] = alike[there, back] = True
    return near, alike, np.array([max(abs(i), abs(j)) == 1 for i, j in places])


def _ground(pixels: np.ndarray, flat: np.ndarray, tolerance: float) -> np.ndarray:
    """Which of the flat units have the colour that most of them have, within the tolerance, (n,) bool."""
    colours = pixels.reshape(*pixels.shape[:2], -1).mean(axis=2)
    some = np.flatnonzero(flat)
    if not len(some):
        return flat
    centres = colours[some[:: -(-len(some) // _CENTRES)]]
    counts = [(np.abs(colours[some] - centre) <= tolerance).all(axis=1).sum() for centre in centres]
    ground: np.ndarray = flat & (np.abs(colours - centres[int(np.argmax(counts))]) <= tolerance).all(axis=1)
    return ground


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
