"""What stays of an image's tokens: top-k, distances between tokens, and the figure that budgets are compared on.

Knows vectors, scores and grid cells. Does not know where they come from or what a token shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import EngineError
from .blas import spread

PLACE_WEIGHT = (
    0.4  # share of the distance on the image in the distance between tokens; 0.2 to 0.4 were best (ACCURACY.md)
)
# Rows or columns of the grid between what is left out and what stands for it, or between things side by side. 1 keeps a
# tenth more tokens, and from 4 on charts lose answers (ACCURACY.md, "An encoder stage that adapts to the picture")
REACH = 2
MAX_DIMENSIONS = 128  # of long vectors, for their distances
BLOCK = 96  # rows of a product that are computed at once: as many as OpenBLAS's kernels take, times a few
_FAR = 1 << 18  # rows of a grid, and more: MAX_CLUSTERED times as many are an int32


@dataclass
class Selection:
    """What stays of n tokens.

    Attributes:
        kept: Ascending indices, (k,) int64.
        mass: Original tokens that each kept one stands for, (k,) float64. None: one each.
        group: Index into `kept` of the token that each of the n went to, (n,) int64. None: dropped tokens are gone.
        scores: What the tokens were ranked by, (n,) float32, or None.
        too_few: A tolerance asked for more tokens than might stay.
    """

    kept: np.ndarray
    mass: np.ndarray | None = None
    group: np.ndarray | None = None
    scores: np.ndarray | None = None
    too_few: bool = False


@dataclass
class Tokens:
    """The tokens of one image, as a stage sees them when it chooses.

    Attributes:
        vectors: (n, n_embd) float32: projected embeddings in the vision stage, hidden states that enter layer K in a
            decoder stage.
        cells: Grid cell of each token, row by row, (n,) int64, -1 for none.
        grid: (rows, columns), or None.
        mass: Original tokens that each stands for, (n,) float64. None: one each.
        attention: Attention that each token receives, (n,) float32, in the encoder or from the question's text in the
            decoder. None: not read.
        row_attention: The same for each text row, (n_text, n) float32, if the scorer asks for it.
        text_vectors: Hidden states of those text rows, (n_text, n_embd) float32.
        seed: Seed of scorers that draw at random.
    """

    vectors: np.ndarray
    cells: np.ndarray
    grid: tuple[int, int] | None = None
    mass: np.ndarray | None = None
    attention: np.ndarray | None = None
    row_attention: np.ndarray | None = None
    text_vectors: np.ndarray | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.vectors)

    def checked(self) -> Tokens:
        """Returns the tokens themselves, if all their numbers are finite.

        Raises:
            EngineError: The model computed NaN or infinity.
        """
        vectors = None if "unit_vectors" in vars(self) else self.vectors  # `project` has looked at them
        for array in (vectors, self.attention, self.row_attention, self.text_vectors):
            if array is not None:
                _check(array)
        return self

    @property
    def masses(self) -> np.ndarray:
        return np.ones(len(self)) if self.mass is None else np.asarray(self.mass, np.float64)

    def part(self, rows: np.ndarray | slice) -> Tokens:
        """Some of the tokens. rows: any index of an (n,) array."""

        def of(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[..., rows]

        part = replace(
            self,
            vectors=self.vectors[rows],
            cells=self.cells[rows],
            mass=of(self.mass),
            attention=of(self.attention),
            row_attention=of(self.row_attention),
        )
        if "unit_vectors" in vars(self):
            part.unit_vectors = self.unit_vectors[rows]
        return part

    def changed(self, **fields: Any) -> Tokens:
        """The same tokens with other fields. `unit_vectors` stay what they are, if they are known."""
        tokens = replace(self, **fields)
        if "unit_vectors" in vars(self):
            tokens.unit_vectors = self.unit_vectors
        return tokens

    @cached_property
    def unit_vectors(self) -> np.ndarray:
        """Vectors of length 1, (n, <= 2 MAX_DIMENSIONS) float32. `project` works out those of several images.

        Longer vectors first go through a seeded random projection. It keeps angles up to about 1/sqrt(MAX_DIMENSIONS)
        (Johnson and Lindenstrauss 1984). Without it, all distances between 576 tokens of 4096 dimensions would cost
        more than the rest of the stage.
        """
        return np.concatenate([_unit(self.vectors[rows]) for rows in _blocks(len(self))])

    def on_grid(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Row and column of each token on the grid, (n,) int32, or None without a grid.

        A token without a grid cell is in a row of its own that is far from all others.
        """
        if self.grid is None:
            return None
        row, column = (part.astype(np.int32) for part in np.divmod(self.cells, self.grid[1]))
        nowhere = np.flatnonzero(self.cells < 0)
        row[nowhere] = -(_FAR * (1 + np.arange(len(nowhere), dtype=np.int32)))
        return row, column

    def place_distances(self) -> np.ndarray | None:
        """Distances on the grid divided by their mean, (n, n) float32, or None without a grid."""
        if self.grid is None or self.grid[0] * self.grid[1] == 1:
            return None
        places = _recent_places if len(self) <= 1024 else _places  # 4 MiB each are kept, not more
        return places(self.grid, np.asarray(self.cells, np.int64).tobytes())


def project(parts: Sequence[Tokens], n_threads: int) -> None:
    """Works out `unit_vectors` of several images where they are not known, on up to n_threads threads.

    Raises:
        EngineError: As Tokens.checked.
    """
    parts = [part for part in parts if len(part) and "unit_vectors" not in vars(part)]
    blocks = [part.vectors[rows] for part in parts for rows in _blocks(len(part))]

    def unit(vectors: np.ndarray) -> np.ndarray:
        _check(vectors)
        return _unit(vectors)

    done = iter(spread(unit, blocks, min(n_threads, len(blocks) // 2)))  # a block takes little longer than a thread
    for part in parts:
        part.unit_vectors = np.concatenate([next(done) for _ in _blocks(len(part))])


def _blocks(n: int) -> list[slice]:
    """Runs of BLOCK of n rows. They do not depend on the number of threads, and so does no rounding."""
    return [slice(a, min(n, a + BLOCK)) for a in range(0, max(1, n), BLOCK)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """`Tokens.unit_vectors` of some rows."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape[1] > 2 * MAX_DIMENSIONS:  # below, projecting costs what it saves
        vectors = vectors @ _projection(vectors.shape[1])
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _check(array: np.ndarray) -> None:
    """Raises EngineError unless all numbers are finite. A sum of squares that is finite says so at the speed of memory;
    one of large numbers may overflow, and then each is looked at.
    """
    flat = array.reshape(-1)
    if not np.isfinite(np.vdot(flat, flat)) and not np.isfinite(flat).all():
        raise EngineError(
            "the model computed NaN or infinity for an image",
            "check the model's files: they may be damaged",
        )


@lru_cache(maxsize=2)
def _projection(n_dimensions: int) -> np.ndarray:
    """Gaussian (n_dimensions, MAX_DIMENSIONS) float32, the same in every process."""
    return np.random.default_rng(n_dimensions).standard_normal((n_dimensions, MAX_DIMENSIONS), np.float32)


def _places(grid: tuple[int, int], cells: bytes) -> np.ndarray:
    """Distances on the grid divided by their mean, (n, n) float32; 1 to and from a token without a grid cell.

    cells: the bytes of `Tokens.cells`, int64.
    """
    where = np.frombuffer(cells, np.int64)
    row, column = (part.astype(np.float32) for part in np.divmod(where, grid[1]))
    apart = np.sqrt((row[:, None] - row) ** 2 + (column[:, None] - column) ** 2)
    apart /= max(float(apart.mean()), 1e-12)
    nowhere = where < 0
    apart[nowhere] = 1.0
    apart[:, nowhere] = 1.0
    return apart


# A model sees few grids, and images of one size have the same cells in the vision stage
_recent_places = lru_cache(maxsize=8)(_places)


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Ascending indices of the k highest scores, (k,) int64. Of equal scores, the lower index wins."""
    if not 0 <= k <= len(scores):
        raise ValueError(f"cannot keep {k} of {len(scores)} tokens")
    best = np.argsort(-np.asarray(scores), kind="stable")[:k]
    return np.sort(best)


def apart(special: np.ndarray | None, tokens: Tokens, choose: Callable[[Tokens], Selection]) -> Selection:
    """Keeps all special tokens, and what `choose` keeps of the others. special: (n,) bool, or None.

    Nothing is merged into a special token (such as a row end). Its mass is 1 if tokens have masses, and its score is 0.
    """
    if special is None or not special.any():
        return choose(tokens)
    if special.all():
        return Selection(np.arange(len(tokens)), tokens.mass)
    ordinary, rows = np.flatnonzero(~special), np.flatnonzero(special)
    chosen = choose(tokens.part(ordinary))
    kept = np.concatenate([ordinary[chosen.kept], rows])
    order = np.argsort(kept)
    selection = Selection(kept[order], too_few=chosen.too_few)
    if chosen.mass is not None:
        selection.mass = np.concatenate([chosen.mass, np.ones(len(rows))])[order]
    if chosen.group is not None:
        place = np.argsort(order)  # in `kept`, of the chosen ones and then of the special ones
        selection.group = np.empty(len(tokens), np.int64)
        selection.group[ordinary] = place[chosen.group]
        selection.group[rows] = place[len(chosen.kept) :]
    if chosen.scores is not None:
        selection.scores = np.zeros(len(tokens), np.float32)
        selection.scores[ordinary] = chosen.scores
    return selection


def average_tokens(n_first: int, windows: Sequence[tuple[int, int]], n_layers: int) -> float:
    """Image tokens per decoder layer, on average: the figure that the literature compares budgets by.

    n_first tokens enter layer 0. windows are (layer, tokens from there on), ascending. With one window (K, n2) the
    result is (K n1 + (L - K) n2) / L.
    """
    edges = [(0, n_first), *windows, (n_layers, 0)]
    return sum(n * (after - layer) for (layer, n), (after, _) in pairwise(edges)) / n_layers


def between(things: np.ndarray, cells: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What lies between two things side by side: one at most REACH columns to the left on its row, one as near to the
    right.

    Args:
        things: (n,) bool.
        cells: Grid cell of each, row by row, (n,) int64, -1 for none.
        grid: (rows, columns).

    Returns:
        (n,) bool. False for what is a thing itself, or has no cell.
    """
    there = np.zeros((grid[0], grid[1] + 2 * REACH), bool)
    row, column = np.divmod(cells, grid[1])
    placed = cells >= 0
    there[row[things & placed], column[things & placed] + REACH] = True

    steps = np.arange(1, REACH + 1)
    left, right = (there[row[:, None], column[:, None] + REACH + side * steps].any(axis=1) for side in (-1, 1))
    gaps: np.ndarray = np.logical_and.reduce([placed, ~things, left, right])
    return gaps


def with_neighbours(values: np.ndarray, cells: np.ndarray, grid: tuple[int, int] | None, share: float) -> np.ndarray:
    """The larger of each token's value and of `share` times the largest among those that touch it, (n,) float32.

    Args:
        values: (n,) >= 0.
        cells: Grid cell of each, row by row, (n,) int64, -1 for none: such a token has no neighbours.
        grid: (rows, columns). None: no token has any.
        share: In (0, 1].
    """
    if grid is None:
        return values
    placed = np.flatnonzero(cells >= 0)
    row, column = np.divmod(cells[placed], grid[1])
    there = np.zeros((grid[0] + 2, grid[1] + 2), np.float32)
    there[row + 1, column + 1] = values[placed]
    around = [there[row + i, column + j] for i in range(3) for j in range(3)]
    found = np.array(values, np.float32)
    found[placed] = np.maximum(found[placed], share * np.max(around, axis=0))
    return found
