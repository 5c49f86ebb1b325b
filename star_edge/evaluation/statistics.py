"""Whether a difference between two configs on the same questions is more than chance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np

RESAMPLES = 5000


def mcnemar_p(n_lost: int, n_gained: int) -> float:
    """Two-sided exact McNemar test: probability of a split at least as uneven if lost and gained are equally likely.

    With n = n_lost + n_gained and k the smaller of the two, p = min(1, 2 sum_{i <= k} C(n, i) / 2^n). Questions on
    which both configs are right, or both wrong, do not count.

    McNemar (1947), Psychometrika 12:153. Exact form: Agresti, Categorical Data Analysis, 10.1.4.

    Args:
        n_lost: Questions that only the first config answers correctly.
        n_gained: Questions that only the second config answers correctly.
    """
    n, k = n_lost + n_gained, min(n_lost, n_gained)
    term = total = 1
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i  # C(n, i) from C(n, i - 1), in whole numbers
        total += term
    return min(1.0, float(Fraction(2 * total, 2**n)))


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of the mean of `values`, from a bootstrap over clusters.

    Questions about one image tend to be right or wrong together. Resampling single questions would make the interval
    too narrow.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13. Clusters: Field and Welsh (2007), J. R. Stat.
    Soc. B 69:369.

    Args:
        values: Paired differences, one for each question, (n,).
        clusters: What each question belongs to, such as its image, (n,).
        seed: Seed of the bootstrap.
        level: Level of the interval, in 0..1.

    Returns:
        (low, high), or None with fewer than two clusters.
    """
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    n_clusters = len(index)
    if n_clusters < 2:
        return None
    place = [index[cluster] for cluster in clusters]
    sums, sizes = np.bincount(place, weights=values, minlength=n_clusters), np.bincount(place, minlength=n_clusters)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    rows = max(1, 2**20 // n_clusters)  # bounds memory, whatever the number of images
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(0, n_clusters, (min(rows, RESAMPLES - start), n_clusters))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_counts(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """(lost, gained) for `mcnemar_p`: questions on which the second config scores lower, and higher, than the first.

    With scores of 0 and 1 these are McNemar's counts. With graded scores (VQA) the test is the sign test, of which
    McNemar's is a case.
    """
    return sum(b < a for a, b in zip(first, second)), sum(b > a for a, b in zip(first, second))
