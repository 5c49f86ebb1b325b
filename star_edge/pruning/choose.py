"""How a stage chooses what stays. The vision stage and the decoder stages take the same steps.

A stage has a policy, which follows from the config, and candidates: the tokens of each image, some of them special.
`divide` first shares a budget among images; `choose` then picks the tokens of each image. Knows neither models nor
prompts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import budget
from .blas import one_blas_thread
from .config import PruneConfig
from .representatives import MAX_CLUSTERED, select
from .scorers import DECODER_SCORERS, VISION_SCORERS, Scorer
from .selection import REACH, Selection, Tokens, apart, project


@dataclass(frozen=True)
class Policy:
    """How one stage chooses.

    Attributes:
        scorer: What tokens are ranked by.
        share: Part of the budget, 0..1, that represents dropped tokens instead of being chosen by score.
        representatives: A name in REPRESENTATIVES.
        seed: Added to each image's own seed, for scorers that draw at random. None: the scorer draws nothing.
        counts_by_score: True: images share a budget by how many of the best tokens each has. False: by what each shows
            first.
        compares: Counting takes time in the square of the tokens (`budget.divide`).
        equal_images: Each image's attention is divided by its mean before images are compared. Attention adds up to 1
            in each image, so it is smaller where there are more tokens.
        tolerance: `PruneConfig.vision_tolerance` or `encoder_tolerance`, infinite if the stage does not adapt.
        reach: With a tolerance, the most rows or columns between a token and the one that represents it, or None.
    """

    scorer: Scorer
    share: float
    representatives: str
    seed: int | None
    counts_by_score: bool
    compares: bool
    equal_images: bool
    tolerance: float = math.inf
    reach: int | None = None

    @property
    def needs_distances(self) -> bool:
        """Whether the tokens of an image are compared with each other when it chooses."""
        return self.scorer.compares or self.representatives in ("cluster", "contextual")


@dataclass
class Candidates:
    """The tokens of one image from which a stage chooses.

    Attributes:
        tokens: The tokens, special ones included.
        special: Tokens that always stay and are in no budget, (n,) bool, or None.
        picture: Index of the image's picture.
        n_original: Ordinary tokens of the image before any stage. Equal shares are in proportion to it.
    """

    tokens: Tokens
    special: np.ndarray | None
    picture: int
    n_original: int


def vision_scorer(config: PruneConfig, has_attention: bool) -> str:
    """The config's vision scorer, or "maxmin" if it needs attention that cannot be read."""
    needs = VISION_SCORERS[config.vision_scorer].reads is not None
    return config.vision_scorer if has_attention or not needs else "maxmin"


def vision_policy(config: PruneConfig, has_attention: bool) -> Policy:
    """The policy of the vision stage.

    Crops share a budget by score, if tokens are chosen by score. Frames share it by what is new in each, because
    attention does not tell a repetition from the original. The baselines "uniform" and "random" give every image the
    same part.
    """
    name = vision_scorer(config, has_attention)
    by_score = config.chooses_by_score and (config.budget != "prompt" or name in ("uniform", "random"))
    return Policy(
        VISION_SCORERS[name],
        _share(config.representatives, config.vision_share),
        config.representatives,
        config.seed if name == "random" else None,
        by_score,
        not by_score or VISION_SCORERS[name].compares,
        equal_images=True,
        tolerance=_tolerance(config.vision_tolerance, config.adapts_to_picture),
    )


def encoder_policy(config: PruneConfig, has_attention: bool) -> Policy:
    """The policy of the encoder stage: the vision stage's, with its own tolerance.

    Early hidden states say what is seen and hardly where, since places enter an encoder of today by RoPE alone. Two
    like tokens far apart are two things: a token is represented by one near it.
    """
    tolerance = _tolerance(config.encoder_tolerance, config.encoder_adapts)
    return replace(vision_policy(config, has_attention), tolerance=tolerance, reach=REACH)


def decoder_policy(config: PruneConfig) -> Policy:
    """The policy of the decoder stages. Images share by the question's attention, which is comparable across images."""
    name = config.decoder_scorer
    representatives = config.decoder_representatives or config.representatives
    return Policy(
        DECODER_SCORERS[name],
        _share(representatives, config.decoder_share),
        representatives,
        config.seed if name == "random" else None,
        counts_by_score=True,
        compares=False,
        equal_images=False,
    )


@one_blas_thread()
def prepare(images: Sequence[tuple[Policy, Candidates]], n_threads: int) -> None:
    """Works out ahead what choosing needs of the vectors of these images, on up to n_threads threads.

    Where vectors are long it is most of the work. What is not done ahead, `divide` and `choose` do on one thread, with
    the same result.

    Raises:
        EngineError: The model computed NaN or infinity.
    """
    project([image.tokens for policy, image in images if policy.needs_distances], n_threads)


@one_blas_thread()
def divide(policy: Policy, images: Sequence[Candidates], total: int, n_threads: int = 1) -> list[int]:
    """How many ordinary tokens of each image stay if the images share a budget of `total`. It may take n_threads."""
    parts = []
    for image in images:
        tokens = _drawn(policy, image.tokens)
        if image.special is not None:
            tokens = tokens.part(~image.special)
        if policy.equal_images and tokens.attention is not None:
            tokens = tokens.changed(attention=tokens.attention / max(float(tokens.attention.mean()), 1e-30))
        parts.append(tokens)
    count: Callable[[budget.JointTokens, int], np.ndarray]
    count = lambda tokens, k: budget.by_distinctness(tokens, k, n_threads)
    if policy.counts_by_score:
        count = lambda tokens, k: budget.by_score(tokens, policy.scorer.score(tokens, k), k)
    return budget.divide(
        parts,
        [i.picture for i in images],
        [i.n_original for i in images],
        total,
        count,
        policy.compares,
        policy.scorer.reads == "each",
    )


def at_once(images: Sequence[Candidates], n_threads: int) -> tuple[int, int]:
    """How many of these images are chosen from at the same time, and on how many threads each.

    An image takes memory in the square of its tokens: several at once take no more than the largest one that is whole.
    """
    largest = max([1, *(len(image.tokens) for image in images)])
    n_images = max(1, min(n_threads, len(images), MAX_CLUSTERED**2 // largest**2))
    return n_images, max(1, n_threads // n_images)


@one_blas_thread()
def choose(policy: Policy, image: Candidates, n_keep: int, most: int | None = None, n_threads: int = 1) -> Selection:
    """Keeps n_keep of an image's ordinary tokens, and all special ones.

    With a tolerance n_keep is the least that stays, and `most` what stays at most (None: all). Selection.scores is None
    if no token is chosen by score. It may take n_threads threads, and chooses the same as with one.
    """
    n_by_score = n_keep - round(policy.share * n_keep)

    def among(tokens: Tokens) -> Selection:
        scores = np.zeros(len(tokens)) if policy.share == 1.0 else policy.scorer.score(tokens, max(1, n_by_score))
        return select(
            policy.representatives,
            tokens,
            scores,
            n_keep,
            policy.share,
            policy.tolerance,
            most,
            policy.reach,
            n_threads,
        )

    selection = apart(image.special, _drawn(policy, image.tokens), among)
    if policy.share == 1.0:
        selection.scores = None
    return selection


def _tolerance(tolerance: float | None, adapts: bool) -> float:
    """Infinite where the stage keeps a number of tokens: then it decides nothing, not even whom a token goes to."""
    return tolerance if tolerance is not None and adapts else math.inf


def _share(representatives: str, share: float) -> float:
    return 0.0 if representatives == "none" else share


def _drawn(policy: Policy, tokens: Tokens) -> Tokens:
    """The checked tokens, with a seed that depends on the image and the config alone."""
    tokens = tokens.checked()
    return tokens if policy.seed is None else tokens.changed(seed=zlib.crc32(tokens.vectors.tobytes()) + policy.seed)
