"""Scorers: what each stage ranks image tokens by. One function each, with its paper.

A scorer is a function (tokens, k) -> (n,) scores; the k highest stay. Greedy methods give the highest scores to the
tokens that they pick, in the order of picking. So every scorer combines with every way to represent dropped tokens
(star_edge.pruning.representatives).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .core import cosines
from .selection import Tokens

Score = Callable[[Tokens, int], np.ndarray]


@dataclass(frozen=True)
class Scorer:
    """A scorer and the attention that it reads.

    Attributes:
        score: The function (tokens, k) -> (n,) scores.
        reads: Vision stage: "received", "cls" or None. Decoder stage: which rows of the text after the last image
            score, "all" or "last" as a mean, "each" row by row.
        compares: It compares all pairs of tokens.
    """

    score: Score
    reads: Literal["received", "cls", "all", "last", "each"] | None = None
    compares: bool = False


def attention(tokens: Tokens, k: int) -> np.ndarray:
    """The attention that was read, unchanged.

    - Vision stage, "attention": what a patch receives in the encoder's last layer, mean over heads and query rows
      (STAR, arXiv 2505.12359, section 3.2).
    - Vision stage, "cls": what a patch receives from the CLS row (VisionZip, arXiv 2412.04467, section 3.1; FasterVLM,
      arXiv 2412.01818). An encoder without CLS gives "attention" instead, as in VisionZip.
    - Decoder stage, "text": mean over heads and the text rows after the last image (STAR, section 3.3).
    - Decoder stage, "last": attention of the last row alone (FastV, arXiv 2403.06764, section 4.1), or the mean of it
      and of the last four where the question looks ahead (decoder/ahead.py).
    """
    return _read(tokens.attention)


def text_raters(tokens: Tokens, k: int) -> np.ndarray:
    """Attention from the text rows that are about the image (SparseVLM, arXiv 2410.04417, section 3.2).

    A text row's relevance is its mean share in softmax(H_v H_q^T / sqrt(d)) over the image rows. Raters are the rows
    with at least the mean relevance. The paper takes H_v and H_q as they enter layer 0. Here they enter layer K and are
    scaled to RMS 1, because the text's embeddings are not available outside llama.cpp.
    """

    def scale(x: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = x / np.maximum(np.sqrt((x * x).mean(axis=1, keepdims=True)), 1e-12)
        return scaled

    products = scale(tokens.vectors) @ scale(_read(tokens.text_vectors)).T / np.sqrt(tokens.vectors.shape[1])
    shares = np.exp(products - products.max(axis=1, keepdims=True))
    relevance = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    by_raters: np.ndarray = _read(tokens.row_attention)[relevance >= relevance.mean() * (1 - 1e-6)].mean(axis=0)
    return by_raters


def max_min_diversity(tokens: Tokens, k: int) -> np.ndarray:
    """Greedy max-min of cosine distances (DivPrune, arXiv 2503.02175, section 3.3). Reads no attention.

    The first pick is the token whose nearest neighbour is farthest. Each further pick is the token that is farthest
    from all picks before it.
    """
    far = 1.0 - cosines(tokens.unit_vectors)
    np.fill_diagonal(far, np.inf)
    pick = int(far.min(axis=1).argmax())
    nearest = far[pick].copy()
    order = [pick]
    nearest[pick] = -np.inf
    for _ in range(k - 1):
        pick = int(nearest.argmax())
        order.append(pick)
        np.minimum(nearest, far[pick], out=nearest)
        nearest[pick] = -np.inf
    return _by_order(order, len(tokens))


def saliency_coverage(tokens: Tokens, k: int) -> np.ndarray:
    """Greedy saliency x coverage (SCOPE, arXiv 2510.24214).

    Each pick i has the largest product of its attention from CLS and its gain in coverage of all tokens,
    sum_u max(0, sim(u, i) - max_picked sim(u, .)).
    """
    alike = np.maximum(cosines(tokens.unit_vectors), 0.0)
    covered = np.zeros(len(tokens), np.float32)
    salience = np.asarray(tokens.attention, np.float64)
    order: list[int] = []
    open_ = np.ones(len(tokens), bool)
    for _ in range(k):
        gain = np.maximum(alike - covered[:, None], 0.0).sum(axis=0) * salience
        pick = int(np.where(open_, gain, -1.0).argmax())
        order.append(pick)
        open_[pick] = False
        np.maximum(covered, alike[pick], out=covered)
    return _by_order(order, len(tokens))


def uniform(tokens: Tokens, k: int) -> np.ndarray:
    """Every n/k-th token: the baseline that looks at nothing."""
    return _by_order(((np.arange(k) + 0.5) * len(tokens) / k).astype(int), len(tokens))


def random(tokens: Tokens, k: int) -> np.ndarray:
    """A draw without replacement, equal for the same image and seed.

    At mild ratios it beats many published methods (arXiv 2511.02650).
    """
    return np.random.default_rng(tokens.seed).random(len(tokens))


def _read(array: np.ndarray | None) -> np.ndarray:
    """What the stage has read, because `Scorer.reads` asks for it."""
    assert array is not None
    return array


def _by_order(order: np.ndarray | list[int], n: int) -> np.ndarray:
    scores = np.zeros(n)
    scores[order] = np.arange(len(order), 0, -1)
    return scores


VISION_SCORERS: dict[str, Scorer] = {
    "attention": Scorer(attention, "received"),
    "cls": Scorer(attention, "cls"),
    "maxmin": Scorer(max_min_diversity, compares=True),
    "scope": Scorer(saliency_coverage, "cls", compares=True),
    "uniform": Scorer(uniform),
    "random": Scorer(random),
}
DECODER_SCORERS: dict[str, Scorer] = {
    "text": Scorer(attention, "all"),
    "last": Scorer(attention, "last"),
    "raters": Scorer(text_raters, "each"),
    "uniform": Scorer(uniform, "all"),  # these two read attention for the report alone
    "random": Scorer(random, "all"),
}
