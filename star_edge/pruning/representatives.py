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

import numpy as np

from .core import Points, group_means
from .selection import PLACE_WEIGHT, Selection, Tokens, between, top_k

MAX_CLUSTERED = 4096  # tokens whose distances are held at once (64 MiB); larger images are clustered in bands

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
    n_threads: int = 1,
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
        n_threads: Threads that this may take.
    """
    n = len(scores)
    if n > MAX_CLUSTERED:
        return (
            _by_bands(tokens, scores, k, n_rep, tolerance, n if most is None else most, reach, n_threads)
            if k >= -(-n // MAX_CLUSTERED)
            else spread_evenly(tokens, scores, k, n_rep)
        )
    bound = max(tolerance * _mean_distance(tokens), ROUNDING) if tolerance < math.inf else math.inf
    most, medoids = n if most is None else most, n_rep == k and (reach is None or bound == math.inf)
    points = Points(tokens.unit_vectors, tokens.place_distances(), PLACE_WEIGHT, n_threads)
    best = top_k(scores / np.sqrt(tokens.masses), k - n_rep)
    near, crowded = None, False
    if reach is not None and bound < math.inf and (where := tokens.on_grid()) is not None:
        near = (*where, reach)
        edges = np.flatnonzero(_edges(points, bound, tokens, where))
        crowded = len(edges) > most - len(best)
        best = best if crowded else np.union1d(best, edges)
    kept, group, too_few = points.cluster(best, tokens.masses, k, most, bound, ROUNDING, near, medoids)
    mass = np.bincount(group, weights=tokens.masses, minlength=len(kept))
    return Selection(kept, mass, group, too_few=too_few or crowded)


def _edges(points: Points, bound: float, tokens: Tokens, where: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Tokens that touch one unlike them, and are not part of the ground or are a gap in it between two things side by
    side, (n,) bool. where: row and column of each.
    """
    flat, unlike, ground = points.edges(bound, *where)
    assert tokens.grid is not None  # there are rows and columns
    edges: np.ndarray = (~flat | unlike) & (~ground | between(~ground, tokens.cells, tokens.grid))
    return edges


def _mean_distance(tokens: Tokens) -> float:
    """Mean of 1 - cosine between two original tokens. Of products it is the product of the sums."""
    total = tokens.masses @ tokens.unit_vectors.astype(np.float64)
    return 1.0 - float(total @ total) / float(tokens.masses.sum()) ** 2


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
    n_threads: int = 1,
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
        n_threads: Threads that this may take.
    """
    if k == len(scores):
        return Selection(np.arange(k), tokens.mass, None, np.asarray(scores, np.float32))
    n_rep = round(share * k)
    if share > 0 and kind != "cluster":  # mass goes to representatives only: there must be one
        n_rep = max(1, n_rep)
    ranks = np.asarray(scores, np.float64)
    if kind == "cluster":
        selection = cluster(tokens, ranks, k, n_rep, tolerance, most, reach, n_threads)
    else:
        selection = REPRESENTATIVES[kind](tokens, ranks, k, n_rep)
    selection.scores = np.asarray(scores, np.float32)
    return selection


def merge(vectors: np.ndarray, selection: Selection, n_threads: int = 1) -> np.ndarray:
    """The mean vector of each group, (k, n_embd) float32. vectors: (n, n_embd) float32."""
    if selection.group is None:
        kept: np.ndarray = vectors[selection.kept]
        return kept
    return group_means(vectors, selection.group, len(selection.kept), n_threads)


def _by_bands(
    tokens: Tokens,
    scores: np.ndarray,
    k: int,
    n_rep: int,
    tolerance: float,
    most: int,
    reach: int | None,
    n_threads: int,
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
            part,
            scores[first:last],
            int(share),
            int(share if n_rep == k else reps),
            tolerance,
            at_most,
            reach,
            n_threads,
        )
        assert selection.group is not None and selection.mass is not None  # clusters have both
        group.append(selection.group + sum(len(p) for p in kept))
        kept.append(selection.kept + first)
        mass.append(selection.mass)
        too_few |= selection.too_few
    return Selection(np.concatenate(kept), np.concatenate(mass), np.concatenate(group), too_few=too_few)
