"""What becomes of dropped tokens: they are gone, or some of the kept tokens represent them.

A dropped token's weight is missing in every softmax, which skews what the text reads. A kept token that represents
others therefore gets log(mass) added to its attention logits. It then counts for all of them (proportional attention,
Token Merging, arXiv 2210.09461, section 3.2, carried into a decoder; derived in ACCURACY.md).

Each way is a function (tokens, scores (n,), k, n_rep) -> Selection. Of k kept tokens, k - n_rep are chosen by score and
n_rep represent the rest. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .selection import Selection, Tokens, top_k

MAX_CLUSTERED = 4096  # tokens whose distances are held at once (64 MiB); larger images are clustered in bands


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


def cluster(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """Representatives are far from all kept tokens. A dropped token's mass goes to the nearest kept token.

    1. The k - n_rep best tokens stay, by score / sqrt(mass): a middle way between total attention and attention per
       unit of mass.
    2. n_rep more are picked one by one, each the farthest from all kept ones: max-min diversity as in DivPrune (arXiv
       2503.02175), by Tokens.distances. Small objects unlike the rest are found first; large areas get few tokens.
    3. Every token goes to the nearest kept token. If no token was chosen by score, each group's medoid replaces its
       representative, and tokens are assigned once more (one step of k-medoids).
    """
    n = len(scores)
    if n > MAX_CLUSTERED:
        return (
            _by_bands(tokens, scores, k, n_rep)
            if k >= -(-n // MAX_CLUSTERED)
            else spread_evenly(tokens, scores, k, n_rep)
        )
    far = tokens.distances()
    kept = np.zeros(n, bool)
    kept[top_k(scores / np.sqrt(tokens.masses), k - n_rep)] = True
    if n_rep == k:
        kept[int(far.sum(axis=1).argmax())] = True
    nearest = far[kept].min(axis=0)
    nearest[kept] = -1.0
    for _ in range(k - int(kept.sum())):
        pick = int(nearest.argmax())
        kept[pick] = True
        np.minimum(nearest, far[pick], out=nearest)
        nearest[pick] = -1.0
    chosen = np.flatnonzero(kept)
    group = _assign(far, chosen)
    if n_rep == k:
        chosen = _medoids(far, group, k, tokens.masses)
        group = _assign(far, chosen)
    return Selection(chosen, np.bincount(group, weights=tokens.masses, minlength=k), group)


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


def select(kind: str, tokens: Tokens, scores: np.ndarray, k: int, share: float) -> Selection:
    """Keeps k tokens. kind: a name in REPRESENTATIVES. share: part of k, 0..1, that represents dropped tokens."""
    if k == len(scores):
        return Selection(np.arange(k), tokens.mass, None, np.asarray(scores, np.float32))
    n_rep = round(share * k)
    if share > 0 and kind != "cluster":  # mass goes to representatives only: there must be one
        n_rep = max(1, n_rep)
    selection = REPRESENTATIVES[kind](tokens, np.asarray(scores, np.float64), k, n_rep)
    selection.scores = np.asarray(scores, np.float32)
    return selection


def merge(vectors: np.ndarray, selection: Selection) -> np.ndarray:
    """The mean vector of each group, (k, n_embd) float32. vectors: (n, n_embd) float32."""
    if selection.group is None:
        return vectors[selection.kept]
    order = np.argsort(selection.group, kind="stable")
    sizes = np.bincount(selection.group, minlength=len(selection.kept))
    first = np.cumsum(sizes) - sizes
    sums = np.empty((len(sizes), vectors.shape[1]), np.float32)
    np.take(vectors, order[first], axis=0, out=sums)
    for member in range(
        1, sizes.max()
    ):  # few groups are large: cheaper than np.add.reduceat, which adds element by element
        larger = np.flatnonzero(sizes > member)
        sums[larger] += vectors[order[first[larger] + member]]
    sums /= sizes[:, None].astype(np.float32)
    return sums


def _assign(far: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """For each token the index into `chosen` of the nearest, (n,) int64. Chosen tokens are their own nearest."""
    group = far[:, chosen].argmin(axis=1)
    group[chosen] = np.arange(len(chosen))  # equal tokens have distance 0: each chosen one still keeps its own group
    return group


def _medoids(far: np.ndarray, group: np.ndarray, k: int, mass: np.ndarray) -> np.ndarray:
    """The medoid of each group, ascending, (k,) int64: the member with the least mass-weighted sum of distances."""
    order = np.argsort(group, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=k))])
    medoids = np.empty(k, np.int64)
    for g in range(k):
        members = order[edges[g] : edges[g + 1]]
        medoids[g] = (
            members[0] if len(members) < 2 else members[(far[np.ix_(members, members)] @ mass[members]).argmin()]
        )
    return np.sort(medoids)


def _by_bands(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """`cluster` on bands of the image that are small enough, each with its share of k."""
    n = len(scores)
    n_bands = -(-n // MAX_CLUSTERED)
    edges = np.linspace(0, n, n_bands + 1).astype(int)
    shares = np.diff(np.round(edges * k / n).astype(int))
    n_reps = np.minimum(shares, np.diff(np.round(np.cumsum([0, *shares]) * n_rep / k).astype(int)))
    kept, mass, group = [], [], []
    for first, last, share, reps in zip(edges, edges[1:], shares, n_reps):
        part = tokens.part(slice(first, last))
        selection = cluster(part, scores[first:last], int(share), int(share if n_rep == k else reps))
        group.append(selection.group + sum(len(p) for p in kept))
        kept.append(selection.kept + first)
        mass.append(selection.mass)
    return Selection(np.concatenate(kept), np.concatenate(mass), np.concatenate(group))
