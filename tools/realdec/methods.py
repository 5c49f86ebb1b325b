"""What is compared: decoder stages as specs, and rankings that the package does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from star_edge.decoder.prefill import DecoderStage, Seen
from star_edge.pruning.choose import Candidates, choose, decoder_policy
from star_edge.pruning.config import PruneConfig, look_ahead_layers
from star_edge.pruning.representatives import merge, select
from star_edge.pruning.scorers import DECODER_SCORERS, Scorer
from star_edge.pruning.selection import Selection, Tokens, average_tokens
from star_edge.rows import Rows, Segment


@dataclass(frozen=True)
class Method:
    """Decoder stages, and what comes before them.

    Attributes:
        name: As tables show it.
        windows: (layer as a share of the layers, or as an int; share of the context rows that stay), ascending.
        scorer: A name in DECODER_SCORERS or SCORERS, "heads", or "facts": the rows that state the answer, then others
            at random. No method knows them.
        pool: Width of a maximum over neighbouring rows of the scores (SnapKV, arXiv 2404.14469); 1 is none.
        representatives: As in PruneConfig.
        share: Part of the budget that represents dropped rows.
        heads: Of the layer of the stage, for the scorer "heads".
        seen_below: The answer's tokens see dropped rows below the layer of the stage that dropped them.
        first: Share of the rows that enter layer 0 at least: clusters of their embeddings, as the vision stage chooses
            them, with masses and mean embeddings. 1: all.
        tolerance: As `PruneConfig.vision_tolerance`, for `first`. None: `first` is what stays.
        look_ahead: As in `PruneConfig`.
    """

    name: str
    windows: tuple[tuple[float, float], ...]
    scorer: str = "last"
    pool: int = 1
    representatives: str = "none"
    share: float = 0.0
    heads: tuple[int, ...] = ()
    seen_below: bool = False
    first: float = 1.0
    tolerance: float | None = None
    look_ahead: float | None = None

    def layers(self, n_layers: int) -> list[int]:
        return [layer if isinstance(layer, int) else round(layer * n_layers) for layer, _ in self.windows]

    def counts(self, n_layers: int, n_context: int) -> list[tuple[int, int]]:
        """(layer, rows that stay) of each stage."""
        return [
            (layer, max(1, round(keep * n_context))) for layer, (_, keep) in zip(self.layers(n_layers), self.windows)
        ]

    def average(self, n_layers: int, n_context: int, n_first: int | None = None) -> float:
        """Context rows for each layer, on average, as a share. n_first: rows that enter layer 0, None for all."""
        n_first = n_context if n_first is None else n_first
        windows = [(layer, min(n, n_first)) for layer, n in self.counts(n_layers, n_context)]
        return average_tokens(n_first, windows, n_layers) / n_context

    def enter(self, context: Segment) -> Segment:
        """The context's rows that enter layer 0."""
        n = len(context.rows)
        if self.first == 1.0:
            return context
        rows = context.rows
        tokens = Tokens(rows.embeddings, np.arange(n), (1, n))
        tolerance = np.inf if self.tolerance is None else self.tolerance
        chosen = select("cluster", tokens, np.zeros(n), max(1, round(self.first * n)), 1.0, tolerance)
        positions = rows.positions[..., chosen.kept]
        merged = Rows(positions, embeddings=merge(rows.embeddings, chosen))
        return Segment(merged, context.image, context.causal, chosen.mass)

    def stage(
        self,
        n_layers: int,
        n_context: int,
        attention: Callable[[], np.ndarray] | None = None,
        facts: np.ndarray | None = None,
        n_first: int | None = None,
    ) -> DecoderStage:
        """The stages as the engine runs them.

        Args:
            n_layers: Layers of the decoder.
            n_context: Rows of the context.
            attention: Unpruned, (n_layers, n_heads, n_text, n_context).
            facts: Which rows state the answer, (n_context,) bool.
            n_first: Rows that enter layer 0, None for all.
        """
        n_first = n_context if n_first is None else n_first
        windows = [(layer, min(n, n_first)) for layer, n in self.counts(n_layers, n_context)]
        plain = PruneConfig(representatives=self.representatives, decoder_share=self.share)
        if self.scorer == "heads":
            assert attention is not None and len(windows) == 1
            by_heads = attention()[windows[0][0], list(self.heads), -LAST_FEW:].mean(axis=(0, 1))
            scorer = Scorer(lambda tokens, k: by_heads, "all")
        elif self.scorer == "facts":
            assert facts is not None and len(windows) == 1
            by_facts = facts + np.random.default_rng(0).random(n_context)
            scorer = Scorer(lambda tokens, k: by_facts, "last")
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
            [(layer, [n]) for layer, n in windows],
            choice,
            scorer.reads or "all",
            seen_below=self.seen_below,
            look_ahead=None if self.look_ahead is None else look_ahead_layers(self.look_ahead, n_layers),
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
