"""Which tokens stay, given their scores.

Knows neither where scores come from nor what a token shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Selection:
    """What stays: ascending indices (k,) int64, and how many original tokens each stands for, (k,) float64, or None for one each."""

    kept: np.ndarray
    mass: np.ndarray | None = None


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest scores, ascending, (k,) int64. Of equal scores the lower index wins."""
    if not 1 <= k <= len(scores):
        raise ValueError(f"cannot keep {k} of {len(scores)} tokens")
    best = np.argsort(-np.asarray(scores), kind="stable")[:k]
    return np.sort(best)


def keep_by_score(scores: np.ndarray, k: int, mass_share: float = 0.0, mass: np.ndarray | None = None) -> Selection:
    """Keeps k tokens, by score alone or with some of them as representatives of the dropped ones.

    scores: (n,) attention that each token receives. mass: original tokens that each stands for so far, (n,), default one each.
    mass_share: 0 keeps the k highest scores (STAR). Otherwise round(mass_share k) of the k, at least one, are spread evenly, in
        index order, over the tokens that are not among the k - m highest, and share the mass of all of those equally: a dropped
        token then takes its part in every softmax through its representative, whose attention logit gets log(mass) added
        (proportional attention, Token Merging, arXiv 2210.09461, section 3.2). Tokens are ranked by score for each unit of
        mass, since a representative receives attention for all that it stands for.
    """
    weights = np.ones(len(scores)) if mass is None else np.asarray(mass, np.float64)
    density = np.asarray(scores, np.float64) / weights
    m = max(1, round(mass_share * k)) if mass_share > 0 else 0
    if m == 0 or k == len(scores):
        kept = top_k(density, k)
        return Selection(kept, None if mass is None else weights[kept])
    best = top_k(density, k - m) if k > m else np.empty(0, np.int64)
    rest = np.setdiff1d(np.arange(len(scores)), best)
    spread = rest[((np.arange(m) + 0.5) * len(rest) / m).astype(np.int64)]
    weights = weights.copy()
    weights[spread] = weights[rest].sum() / m
    kept = np.sort(np.concatenate([best, spread]))
    return Selection(kept, weights[kept])


def average_tokens(layer: int, n_layers: int, n1: int, n2: int) -> float:
    """Image tokens for each decoder layer, on average: (K n1 + (L - K) n2) / L, the figure that the literature compares on."""
    return (layer * n1 + (n_layers - layer) * n2) / n_layers
