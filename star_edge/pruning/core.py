"""The steps of a choice that the C core takes (csrc/cluster.c, cosines.c), on arrays.

They let go of the interpreter, so several images are chosen from at once. Each result is the same for any number of
threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._core import ffi, lib

_C_TYPES: dict[type, str] = {np.float32: "float", np.float64: "double", np.int32: "int32_t", np.uint8: "uint8_t"}


def _at(array: np.ndarray, dtype: type) -> Any:
    """A pointer to an array, which must outlive its use."""
    assert array.dtype == dtype and array.flags.c_contiguous
    return ffi.from_buffer(f"{_C_TYPES[dtype]}[]", array)


def _check(error: int) -> None:
    if error == lib.SE_ERR_MEMORY:
        raise MemoryError("no memory for the distances between tokens")
    if error:
        raise ValueError(ffi.string(lib.se_error_text(error)).decode())


def cosines(unit: np.ndarray, n_threads: int = 1) -> np.ndarray:
    """Products of all pairs of vectors, (n, n) float32, symmetric to the bit. unit: (n, d) float32."""
    unit = np.ascontiguousarray(unit, np.float32)
    products = np.empty((len(unit), len(unit)), np.float32)
    _check(lib.se_cosines(_at(unit, np.float32), *unit.shape, n_threads, _at(products, np.float32)))
    return products


class Points:
    """Tokens as points with distances: of their vectors, and on the image.

    Args:
        unit: Vectors of length 1, (n, d) float32.
        places: Distances on the image, (n, n) float32, or None.
        weight: What they count beside the distances of vectors, whose mean is 1.
        n_threads: Threads that the products of all pairs may take.
    """

    def __init__(self, unit: np.ndarray, places: np.ndarray | None, weight: float, n_threads: int) -> None:
        self.n = len(unit)
        self._c = ffi.new("se_points *")
        self._keep = [products := _at(cosines(unit, n_threads), np.float32)]
        self._c.products, self._c.n, self._c.place_weight = products, self.n, weight
        if places is not None:
            self._keep.append(places_at := _at(np.ascontiguousarray(places, np.float32), np.float32))
            self._c.places = places_at

    def farthest(self, k: int) -> np.ndarray:
        """Picks k points, each the farthest from all before it. They are at least r apart; for each pick the lowest
        point within r / 2 of it, (k,) int32.
        """
        first = np.empty(k, np.int32)
        _check(lib.se_farthest(self._c, k, _at(first, np.int32)))
        return first

    def edges(self, bound: float, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What touches what, where a distance of vectors of at most `bound` is like.

        Args:
            bound: The distance.
            row: Row of each point on the grid, (n,) int32.
            column: Its column.

        Returns:
            (n,) bool each. Flat: points that are like one that they touch. Those that touch one unlike them. The
            ground: flat, and like the flat point that has the most flat ones like it.
        """
        found = [np.empty(self.n, np.uint8) for _ in range(3)]
        places = [_at(np.ascontiguousarray(where, np.int32), np.int32) for where in (row, column)]
        _check(lib.se_edges(self._c, bound, *places, *(_at(array, np.uint8) for array in found)))
        flat, unlike, ground = (array.astype(bool) for array in found)
        return flat, unlike, ground

    def cluster(
        self,
        best: np.ndarray,
        mass: np.ndarray,
        k: int,
        most: int,
        bound: float,
        rounding: float,
        near: tuple[np.ndarray, np.ndarray, int] | None,
        medoids: bool,
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """What stays, and who represents whom (`representatives.cluster`).

        Args:
            best: Tokens that stay in any case.
            mass: (n,) float64.
            k: Tokens that stay at least.
            most: Tokens that stay at most, whatever the bound asks for.
            bound: Largest 1 - cosine between a token and its representative, or infinity.
            rounding: Distances that differ by no more are equal.
            near: Row and column of each token, (n,) int32 each, and how many of them may lie between a token and its
                representative. None: any number.
            medoids: Whether each group's medoid takes over.

        Returns:
            Ascending indices of those that stay, for each token the index into them, and whether the bound asked for
            more than `most`.
        """
        c = ffi.new("se_groups *")
        keep = [
            _at(np.ascontiguousarray(best, np.int32), np.int32),
            _at(np.ascontiguousarray(mass, np.float64), np.float64),
        ]
        c.best, c.n_best, c.mass = keep[0], len(best), keep[1]
        c.k, c.most, c.bound, c.rounding, c.medoids = k, most, bound, rounding, medoids
        if near is not None:
            keep += [_at(np.ascontiguousarray(where, np.int32), np.int32) for where in near[:2]]
            c.row, c.column, c.reach = keep[2], keep[3], near[2]
        kept, group = np.empty(self.n, np.int32), np.empty(self.n, np.int32)
        n_kept, too_few = ffi.new("int32_t *"), ffi.new("int32_t *")
        _check(lib.se_cluster(self._c, c, _at(kept, np.int32), n_kept, _at(group, np.int32), too_few))
        return kept[: n_kept[0]].astype(np.int64), group.astype(np.int64), bool(too_few[0])


def group_means(vectors: np.ndarray, group: np.ndarray, k: int, n_threads: int = 1) -> np.ndarray:
    """The mean vector of each group, (k, d) float32. vectors: (n, d) float32. group: 0..k-1, (n,)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    means = np.empty((k, vectors.shape[1]), np.float32)
    of = _at(np.ascontiguousarray(group, np.int32), np.int32)
    _check(lib.se_group_means(_at(vectors, np.float32), *vectors.shape, of, k, n_threads, _at(means, np.float32)))
    return means
