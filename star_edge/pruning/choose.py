"""What stays at one stage: the same steps for the vision stage and the decoder stages.

A stage has a policy, which follows from the config, and candidates: the tokens of each image, of which some may be
special. Images that share a budget are divided first (`divide`); then each image's tokens are chosen (`choose`).
Numbers in, a choice out: knows neither models nor prompts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import budget
from .blas import one_blas_thread
from .config import PruneConfig
from .representatives import select
from .scorers import DECODER_SCORERS, VISION_SCORERS, Scorer
from .selection import Selection, Tokens, apart


@dataclass(frozen=True)
class Policy:
    """How one stage chooses.

    scorer: what tokens are ranked by. share: part of the budget that represents the rest instead of being chosen by
        score.
    representatives: a name in REPRESENTATIVES. seed: added to that of each image, for scorers that draw lots; None: the
        scorer draws none.
    counts_by_score: a budget that images share goes by how many of the best tokens each has; False: by what each shows
        that none before it does.
    compares: counting takes time in the square of the tokens (budget.divide). equal_images: before images are compared,
    each image's attention is divided by its mean, since a token's share of 1 depends on the number of tokens.
    """

    scorer: Scorer
    share: float
    representatives: str
    seed: int | None
    counts_by_score: bool
    compares: bool
    equal_images: bool


@dataclass
class Candidates:
    """The tokens of one image from which a stage chooses.

    special: tokens that stay in any case and are in no budget, (n,) bool, or None. picture: which picture the image is
        of.
    n_original: ordinary tokens of the image before any stage; an equal share of a budget is reckoned by it.
    """

    tokens: Tokens
    special: np.ndarray | None
    picture: int
    n_original: int


def vision_scorer(config: PruneConfig, has_attention: bool) -> str:
    """The config's vision scorer, or where it needs attention that cannot be read, diversity of the embeddings."""
    needs = VISION_SCORERS[config.vision_scorer].reads is not None
    return config.vision_scorer if has_attention or not needs else "maxmin"


def vision_policy(config: PruneConfig, has_attention: bool) -> Policy:
    """The vision stage's. Crops share by score where tokens are chosen by it. Frames share by what is new in each:
    attention does not tell a repetition from what it repeats. The two baselines that look at nothing give every image
    the same part.
    """
    name = vision_scorer(config, has_attention)
    by_score = config.chooses_by_score and (config.budget != "prompt" or name in ("uniform", "random"))
    return Policy(
        VISION_SCORERS[name],
        _share(config, config.vision_share),
        config.representatives,
        config.seed if name == "random" else None,
        by_score,
        not by_score or name in ("maxmin", "scope"),
        equal_images=True,
    )


def decoder_policy(config: PruneConfig) -> Policy:
    """The decoder stages'. Images share by the question's attention, which is comparable across images."""
    name = config.decoder_scorer
    return Policy(
        DECODER_SCORERS[name],
        _share(config, config.decoder_share),
        config.representatives,
        config.seed if name == "random" else None,
        counts_by_score=True,
        compares=False,
        equal_images=False,
    )


@one_blas_thread()
def divide(policy: Policy, images: Sequence[Candidates], total: int) -> list[int]:
    """How many ordinary tokens of each image stay where images share a budget of `total`."""
    parts = []
    for image in images:
        tokens = _drawn(policy, image.tokens)
        if image.special is not None:
            tokens = tokens.part(~image.special)
        if policy.equal_images and tokens.attention is not None:
            tokens = replace(tokens, attention=tokens.attention / max(float(tokens.attention.mean()), 1e-30))
        parts.append(tokens)
    count: Callable[[budget.JointTokens, int], np.ndarray] = budget.by_distinctness
    if policy.counts_by_score:
        count = lambda tokens, k: budget.by_score(tokens, policy.scorer.score(tokens, k), k)
    return budget.divide(
        parts, [i.picture for i in images], [i.n_original for i in images], total, count, policy.compares
    )


@one_blas_thread()
def choose(policy: Policy, image: Candidates, n_keep: int) -> Selection:
    """n_keep of an image's ordinary tokens, and all special ones. Selection.scores is None where nothing is chosen by
    score.
    """
    n_by_score = n_keep - round(policy.share * n_keep)

    def among(tokens: Tokens) -> Selection:
        scores = np.zeros(len(tokens)) if policy.share == 1.0 else policy.scorer.score(tokens, max(1, n_by_score))
        return select(policy.representatives, tokens, scores, n_keep, policy.share)

    selection = apart(image.special, _drawn(policy, image.tokens), among)
    if policy.share == 1.0:
        selection.scores = None
    return selection


def _share(config: PruneConfig, share: float) -> float:
    return 0.0 if config.representatives == "none" else share


def _drawn(policy: Policy, tokens: Tokens) -> Tokens:
    """The tokens, which must be finite, with the seed of their draw: the same for the same image and config."""
    tokens = tokens.checked()
    return tokens if policy.seed is None else replace(tokens, seed=zlib.crc32(tokens.vectors.tobytes()) + policy.seed)
