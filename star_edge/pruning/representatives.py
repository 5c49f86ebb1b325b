"""What becomes of dropped tokens: they are gone, or some of the kept tokens represent them.

A dropped token's weight is missing in every softmax, which skews what the text reads. A kept token that represents
others therefore gets log(mass) added to its attention logits. It then counts for all of them (proportional attention,
Token Merging, arXiv 2210.09461, section 3.2, carried into a decoder; derived in ACCURACY.md).

Each way is a function (tokens, scores (n,), k, n_rep) -> Selection. Of k kept tokens, k - n_rep are chosen by score and
n_rep represent the rest. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .selection import Selection, Tokens, between, top_k

MAX_CLUSTERED = 4096  # tokens whose distances are held at once (64 MiB); larger images are clustered in bands

MAX_PAIRS = 1 << 18  # pairs of tokens that are gathered at once, unless one group has more

ROUNDING = 1e-5  # of 1 - cosine of float32 vectors: tokens this near are equal


def drop(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """Keeps the k highest scores per unit of mass. Dropped tokens are gone (STAR, arXiv 2505.12359)."""
    kept = top_k(scores / tokens.masses, k)
    return Selection(kept, None if tokens.mass is None else tokens.masses[kept])


def spread_evenly(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """Representatives are spread evenly, in index order, over the tokens outside the k - n_rep best.

    They share the mass of those tokens equally. Tokens are ranked by score per unit of mass, because a representative
    receives attention for all that it stands for.
    """
    weights = tokens.masses
    best = top_k(scores / weights, k - n_rep)
    if n_rep == 0:
        return Selection(best, None if tokens.mass is None else weights[best])
    rest = np.setdiff1d(np.arange(len(scores)), best)
    spread = rest[((np.arange(n_rep) + 0.5) * len(rest) / n_rep).astype(np.int64)]
    weights = weights.copy()
    weights[spread] = weights[rest].sum() / n_rep
    kept = np.sort(np.concatenate([best, spread]))
    return Selection(kept, weights[kept])


def cluster(
    tokens: Tokens,
    scores: np.ndarray,
    k: int,
    n_rep: int,
    tolerance: float = math.inf,
    most: int | None = None,
    reach: int | None = None,
) -> Selection:
    """Representatives are far from all kept tokens. A dropped token's mass goes to the nearest kept token.

    1. The k - n_rep best tokens stay, by score / sqrt(mass): a middle way between total attention and attention per
       unit of mass.
    2. n_rep more are picked one by one, each the farthest from all kept ones: max-min diversity as in DivPrune (arXiv
       2503.02175), by Tokens.distances. Small objects unlike the rest are found first; large areas get few tokens.
    3. Every token goes to the nearest kept token. If no token was chosen by score, each group's medoid replaces its
       representative, and tokens are assigned once more (one step of k-medoids). Only members count whose farthest
       other member is no farther than the representative's: a group is as small as the greedy choice made it, since
       its size bounds what is lost (ACCURACY.md), and what was chosen for being unlike all others stays.

    With a tolerance, more tokens are picked after step 2, each the farthest from all kept ones by 1 - cosine alone,
    until none is farther than the tolerance times the mean of that distance between two of the image's original tokens.
    PACT (arXiv 2504.08966, DBDPC) bounds the distances within its clusters in the same way. In step 3 a token goes to
    a token within that bound, and a medoid is within it of its whole group.

    With a reach, tokens farther apart than that on the grid count as farther than the tolerance; the edges of things
    stay, whatever they are like; and no medoid replaces what was chosen. An edge is a token that touches one unlike it,
    if it is not part of the ground, or lies between two things side by side (selection.between). Those within the
    tolerance are alike. The ground is what is like the token that has the most like it, of those that are like one that
    they touch.

    Args:
        tokens: The tokens.
        scores: What they are ranked by, (n,).
        k: Tokens that stay at least.
        n_rep: Those of them that represent others.
        tolerance: Largest distance between a token and its representative, as above.
        most: Tokens that stay at most, whatever the tolerance asks for. None: all.
        reach: With a tolerance and tokens on a grid, the most rows or columns between a token and its representative.
            None: any number.
    """
    n = len(scores)
    if n > MAX_CLUSTERED:
        return (
            _by_bands(tokens, scores, k, n_rep, tolerance, n if most is None else most, reach)
            if k >= -(-n // MAX_CLUSTERED)
            else spread_evenly(tokens, scores, k, n_rep)
        )
    most = n if most is None else most
    alone = tokens.vector_distances() if tolerance < math.inf else None
    bound = math.inf if alone is None else max(tolerance * _mean_distance(tokens), ROUNDING)
    far = tokens.distances(alone)
    kept, too_few = np.zeros(n, bool), False
    if alone is not None and reach is not None:
        kept = _edges(tokens, alone <= bound)
        if kept.sum() > most - (k - n_rep):
            kept, too_few = np.zeros(n, bool), True
    kept[top_k(scores / np.sqrt(tokens.masses), k - n_rep)] = True
    if not kept.any():
        kept[int(far.sum(axis=1).argmax())] = True
    nearest = far[kept].min(axis=0)
    nearest[kept] = -1.0
    for _ in range(k - int(kept.sum())):
        pick = int(nearest.argmax())
        kept[pick] = True
        np.minimum(nearest, far[pick], out=nearest)
        nearest[pick] = -1.0
    within = None
    if alone is not None:
        beyond = None if reach is None else tokens.beyond(reach)
        if beyond is not None:
            alone[beyond] += np.float32(bound + 2)  # over the bound, and still in the order of what is unlike
        too_few |= _pick_within(alone, kept, bound, most)
        within = _Within(alone, bound, np.float32(far.max() + 1))
    chosen = np.flatnonzero(kept)
    group = _assign(far, chosen, within)
    if n_rep == k and (reach is None or within is None):
        chosen = _medoids(far, group, chosen, tokens.masses, within)
        group = _assign(far, chosen, within)
    mass = np.bincount(group, weights=tokens.masses, minlength=len(chosen))
    return Selection(chosen, mass, group, too_few=too_few)


@dataclass(frozen=True)
class _Within:
    """Which pairs of tokens may be in one group: those whose distance `alone` is at most the bound.

    Attributes:
        alone: `Tokens.vector_distances`, (n, n) float32.
        bound: The largest distance.
        penalty: More than any distance that is compared.
    """

    alone: np.ndarray
    bound: float
    penalty: np.float32

    def broken(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Whether the pairs are farther apart, (len(rows), len(columns)) bool."""
        apart: np.ndarray = _pairs(self.alone, rows, columns) > self.bound
        return apart


def _pairs(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """matrix[np.ix_(rows, columns)]: whole rows first, which is faster than element by element."""
    pairs: np.ndarray = matrix[rows].take(columns, axis=1)
    return pairs


def _edges(tokens: Tokens, alike: np.ndarray) -> np.ndarray:
    """Tokens that touch one unlike them, and are not part of the ground or are a gap in it between two things side by
    side, (n,) bool. None without a grid.

    alike: Pairs of tokens, (n, n) bool.
    """
    beyond = tokens.beyond(1)
    if beyond is None:
        return np.zeros(len(tokens), bool)
    touching = ~beyond
    np.fill_diagonal(touching, False)
    flat = (alike & touching).any(axis=1)
    edges: np.ndarray = ~flat | (touching & ~alike).any(axis=1)
    if flat.any():
        most = int((alike[:, flat].sum(axis=1) * flat).argmax())
        ground = flat & alike[most]
        assert tokens.grid is not None  # `beyond` has asked
        edges &= ~ground | between(~ground, tokens.cells, tokens.grid)
    return edges


def _mean_distance(tokens: Tokens) -> float:
    """Mean of 1 - cosine between two original tokens. Of products it is the product of the sums."""
    total = tokens.masses @ tokens.unit_vectors.astype(np.float64)
    return 1.0 - float(total @ total) / float(tokens.masses.sum()) ** 2


def _pick_within(far: np.ndarray, kept: np.ndarray, bound: float, most: int) -> bool:
    """Adds the farthest token to `kept`, (n,) bool, again and again, until all are within the bound or `most` stay.

    Returns:
        Whether some are still too far.
    """
    nearest = far[kept].min(axis=0)
    nearest[kept] = -1.0
    for _ in range(most - int(kept.sum())):
        pick = int(nearest.argmax())
        if nearest[pick] <= bound:
            return False
        kept[pick] = True
        np.minimum(nearest, far[pick], out=nearest)
        nearest[pick] = -1.0
    return bool(nearest.max() > bound)


def contextual(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """Evenly spread targets absorb their most similar dropped tokens, without mass (VisionZip, arXiv 2412.04467,
    section 3.2).

    The paper compares the encoder's keys; here projected embeddings are compared.
    """
    best = top_k(scores, k - n_rep)
    if n_rep == 0:
        return Selection(best)
    rest = np.setdiff1d(np.arange(len(scores)), best)
    targets = rest[((np.arange(n_rep) + 0.5) * len(rest) / n_rep).astype(np.int64)]
    chosen = np.sort(np.concatenate([best, targets]))
    group = np.empty(len(scores), np.int64)
    nearest = (tokens.unit_vectors[rest] @ tokens.unit_vectors[targets].T).argmax(axis=1)
    group[rest] = np.searchsorted(chosen, targets)[nearest]
    group[chosen] = np.arange(k)
    return Selection(chosen, None, group)


REPRESENTATIVES: dict[str, Callable[[Tokens, np.ndarray, int, int], Selection]] = {
    "none": drop,
    "even": spread_evenly,
    "cluster": cluster,
    "contextual": contextual,
}


def select(
    kind: str,
    tokens: Tokens,
    scores: np.ndarray,
    k: int,
    share: float,
    tolerance: float = math.inf,
    most: int | None = None,
    reach: int | None = None,
) -> Selection:
    """Keeps k tokens, or more if there is a tolerance.

    Args:
        kind: A name in REPRESENTATIVES.
        tokens: The tokens.
        scores: What they are ranked by, (n,).
        k: Tokens that stay.
        share: Part of k, 0..1, that represents dropped tokens.
        tolerance: As in `cluster`, and for that kind alone.
        most: As in `cluster`.
        reach: As in `cluster`.
    """
    if k == len(scores):
        return Selection(np.arange(k), tokens.mass, None, np.asarray(scores, np.float32))
    n_rep = round(share * k)
    if share > 0 and kind != "cluster":  # mass goes to representatives only: there must be one
        n_rep = max(1, n_rep)
    ranks = np.asarray(scores, np.float64)
    if kind == "cluster":
        selection = cluster(tokens, ranks, k, n_rep, tolerance, most, reach)
    else:
        selection = REPRESENTATIVES[kind](tokens, ranks, k, n_rep)
    selection.scores = np.asarray(scores, np.float32)
    return selection


def merge(vectors: np.ndarray, selection: Selection) -> np.ndarray:
    """The mean vector of each group, (k, n_embd) float32. vectors: (n, n_embd) float32."""
    if selection.group is None:
        kept: np.ndarray = vectors[selection.kept]
        return kept
    # In order of size: groups with another member are then the first ones, and are added to without an index. (Of few
    # groups that are large, np.add.reduceat would be slower: it adds element by element.)
    sizes = np.bincount(selection.group, minlength=len(selection.kept))
    first = np.cumsum(sizes) - sizes
    members = np.argsort(selection.group, kind="stable")
    by_size = np.argsort(-sizes, kind="stable")
    sizes, first = sizes[by_size], first[by_size]
    sums = vectors[members[first]]
    more = np.empty((int(np.count_nonzero(sizes > 1)), vectors.shape[1]), np.float32)
    for member in range(1, int(sizes[0])):
        n = int(np.count_nonzero(sizes > member))
        np.take(vectors, members[first[:n] + member], axis=0, out=more[:n], mode="clip")  # "raise" would copy once more
        sums[:n] += more[:n]
    sums[: len(more)] /= sizes[: len(more), None].astype(np.float32)
    means: np.ndarray = np.empty_like(sums)
    means[by_size] = sums
    return means


def _assign(far: np.ndarray, chosen: np.ndarray, within: _Within | None) -> np.ndarray:
    """For each token the index into `chosen` of the nearest, (n,) int64. Chosen tokens are their own nearest.

    within: pairs that may be in one group, or None for all. A token for which there are none goes to the nearest.
    """
    rest = np.setdiff1d(np.arange(len(far)), chosen, assume_unique=True)
    away = _pairs(far, rest, chosen)
    if within is not None:
        away += np.where(within.broken(rest, chosen), within.penalty, np.float32(0))
    group = np.empty(len(far), np.int64)
    group[rest] = away.argmin(axis=1)
    # equal tokens have distance 0: each chosen one still keeps a place of its own
    group[chosen] = np.arange(len(chosen))
    return group


def _medoids(
    far: np.ndarray, group: np.ndarray, chosen: np.ndarray, mass: np.ndarray, within: _Within | None
) -> np.ndarray:
    """The medoid of each group, ascending, (k,) int64: the member with the least mass-weighted sum of distances, among
    those with the fewest members too far away, and of these among those whose farthest member is no farther than that
    of the group's representative. Of equal ones, the lowest index.

    chosen: The representatives, (k,) int64.
    """
    k = len(chosen)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=k)
    first = np.cumsum(sizes) - sizes
    costs, n_broken = np.zeros(len(order)), np.zeros(len(order), np.int64)  # in that order
    wider = np.zeros(len(order), bool)
    for size in np.unique(sizes[sizes > 1]):
        groups = np.flatnonzero(sizes == size)
        for some in np.array_split(groups, -(-len(groups) * size * size // MAX_PAIRS)):  # many small groups at once
            at = first[some][:, None] + np.arange(size)
            members = order[at]
            pairs = members[:, :, None] * len(far) + members[:, None, :]
            apart = far.take(pairs)
            costs[at] = np.matmul(apart, mass[members][:, :, None])[:, :, 0]
            farthest = apart.max(axis=2)
            wider[at] = farthest > farthest[members == chosen[some][:, None]][:, None] + ROUNDING
            if within is not None:
                n_broken[at] = (within.alone.take(pairs) > within.bound).sum(axis=2)
    best = np.lexsort((costs, wider, n_broken, group[order]))[first]
    return np.sort(order[best])


def _by_bands(
    tokens: Tokens, scores: np.ndarray, k: int, n_rep: int, tolerance: float, most: int, reach: int | None
) -> Selection:
    """`cluster` on bands of the image that are small enough, each with its share of k."""
    n = len(scores)
    n_bands = -(-n // MAX_CLUSTERED)
    edges = np.linspace(0, n, n_bands + 1).astype(int)
    shares = np.diff(np.round(edges * k / n).astype(int))
    n_reps = np.minimum(shares, np.diff(np.round(np.cumsum([0, *shares]) * n_rep / k).astype(int)))
    kept: list[np.ndarray] = []
    mass: list[np.ndarray] = []
    group: list[np.ndarray] = []
    too_few = False
    for first, last, share, reps in zip(edges, edges[1:], shares, n_reps):
        part = tokens.part(slice(first, last))
        at_most = int(share) + (most - k) * (last - first - int(share)) // max(1, n - k)
        selection = cluster(
            part, scores[first:last], int(share), int(share if n_rep == k else reps), tolerance, at_most, reach
        )
        assert selection.group is not None and selection.mass is not None  # clusters have both
        group.append(selection.group + sum(len(p) for p in kept))
        kept.append(selection.kept + first)
        mass.append(selection.mass)
        too_few |= selection.too_few
    return Selection(np.concatenate(kept), np.concatenate(mass), np.concatenate(group), too_few=too_few)
