"""Which tokens stay, given their scores.

Knows neither where scores come from nor what a token shows.
"""

from __future__ import annotations

import numpy as np


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest scores, ascending, (k,) int64. Of equal scores the lower index wins."""
    if not 1 <= k <= len(scores):
        raise ValueError(f"cannot keep {k} of {len(scores)} tokens")
    best = np.argsort(-np.asarray(scores), kind="stable")[:k]
    return np.sort(best)


def average_tokens(layer: int, n_layers: int, n1: int, n2: int) -> float:
    """Image tokens for each decoder layer, on average: (K n1 + (L - K) n2) / L, the figure that the literature compares on."""
    return (layer * n1 + (n_layers - layer) * n2) / n_layers
