"""What is compared: decoder stages as specs, and rankings that the package does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from star_edge.decoder.prefill import DecoderStage, Seen
from star_edge.pruning.choose import Candidates, choose, decoder_policy
from star_edge.pruning.config import PruneConfig
from star_edge.pruning.scorers import DECODER_SCORERS, Scorer
from star_edge.pruning.selection import Selection, Tokens, average_tokens


@dataclass(frozen=True)
class Method:
    """Decoder stages.

    Attributes:
        name: As tables show it.
        windows: (layer as a share of the layers, or as an int; share of the context rows that stay), ascending.
        scorer: A name in DECODER_SCORERS or SCORERS, or "heads".
        pool: Width of a maximum over neighbouring rows of the scores (SnapKV, arXiv 2404.14469); 1 is none.
        representatives: As in PruneConfig.
        share: Part of the budget that represents dropped rows.
        heads: Of the layer of the stage, for the scorer "heads".
        seen_below: The answer's tokens see dropped rows below the layer of the stage that dropped them.
    """

    name: str
    windows: tuple[tuple[float, float], ...]
    scorer: str = "last"
    pool: int = 1
    representatives: str = "none"
    share: float = 0.0
    heads: tuple[int, ...] = ()
    seen_below: bool = False

    def layers(self, n_layers: int) -> list[int]:
        return [layer if isinstance(layer, int) else round(layer * n_layers) for layer, _ in self.windows]

    def counts(self, n_layers: int, n_context: int) -> list[tuple[int, int]]:
        """(layer, rows that stay) of each stage."""
        return [
            (layer, max(1, round(keep * n_context))) for layer, (_, keep) in zip(self.layers(n_layers), self.windows)
        ]

    def average(self, n_layers: int, n_context: int) -> float:
        """Context rows for each layer, on average, as a share."""
        return average_tokens(n_context, self.counts(n_layers, n_context), n_layers) / n_context

    def stage(self, n_layers: int, n_context: int, attention: Callable[[], np.ndarray] | None = None) -> DecoderStage:
        """The stages as the engine runs them. attention: unpruned, (n_layers, n_heads, n_text, n_context)."""
        windows = self.counts(n_layers, n_context)
        plain = PruneConfig(representatives=self.representatives, decoder_share=self.share)
        if self.scorer == "heads":
            assert attention is not None and len(windows) == 1
            by_heads = attention()[windows[0][0], list(self.heads), -LAST_FEW:].mean(axis=(0, 1))
            scorer = Scorer(lambda tokens, k: by_heads, "all")
        else:
            scorer = DECODER_SCORERS.get(self.scorer) or SCORERS[self.scorer]
        if self.pool > 1:
            scorer = Scorer(lambda tokens, k, score=scorer.score: pooled(score(tokens, k), self.pool), scorer.reads)
        policy = replace(decoder_policy(plain), scorer=scorer, seed=0 if self.scorer == "random" else None)

        def choice(seen: Seen, n_keep: int) -> Selection:
            tokens = Tokens(
                seen.hidden,
                np.arange(len(seen.hidden)),
                None,
                seen.mass,
                seen.attention,
                seen.row_attention,
                seen.text_hidden,
            )
            return choose(policy, Candidates(tokens, None, 0, n_context), n_keep)

        return DecoderStage(
            [(layer, [n]) for layer, n in windows], choice, scorer.reads or "all", seen_below=self.seen_below
        )


LAST_FEW = 4


def pooled(scores: np.ndarray, width: int) -> np.ndarray:
    """The maximum over `width` neighbouring rows."""
    padded = np.pad(np.asarray(scores, np.float64), width // 2, constant_values=-np.inf)
    best: np.ndarray = np.lib.stride_tricks.sliding_window_view(padded, width).max(axis=1)
    return best


def last_few(tokens: Tokens, k: int) -> np.ndarray:
    """Mean attention of the last four text rows."""
    mean: np.ndarray = tokens.row_attention[-LAST_FEW:].mean(axis=0)
    return mean


def any_row(tokens: Tokens, k: int) -> np.ndarray:
    """The largest attention that any text row gives."""
    best: np.ndarray = tokens.row_attention.max(axis=0)
    return best


def same_words(tokens: Tokens, k: int) -> np.ndarray:
    """The largest similarity to a row of the question, as a softmax over the context, and what follows it.

    In the first layers a row is little more than its token, so this finds the words of the question in the context. The
    eight rows after such a word have its score: what is said of it. No picture has its question's words: this shows
    what a ranking could do that knew early what is asked for.
    """

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    alike = np.exp((unit(tokens.text_vectors) @ unit(tokens.vectors).T - 1) / 0.1)
    scores = (alike / alike.sum(axis=1, keepdims=True)).max(axis=0)
    return np.array([scores[max(0, i - 8) : i + 2].max() for i in range(len(scores))])


SCORERS: dict[str, Scorer] = {
    "words": Scorer(same_words, "each"),
    "last4": Scorer(last_few, "each"),
    "max": Scorer(any_row, "each"),
}
