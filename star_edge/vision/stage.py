"""The vision stage: encode each image, keep the tokens that say most about it.

Turns the chunks of a prompt into the segments that the decoder runs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import budget
from ..blas import one_blas_thread
from ..config import Keep, PruneConfig, keep_count
from ..decoder.context import Rows
from ..decoder.prefill import Segment
from ..report import ImageReport
from ..representatives import merge, select
from ..scorers import VISION_SCORERS
from ..selection import Selection, Tokens, apart
from .encoder import Encoded, ImageChunk, TextChunk, VisionEncoder


@dataclass
class PromptPlan:
    """What a prompt will take, before any of it is decoded.

    config: what is done, or None for no pruning.
    groups: images that share their tokens, as indices: the crops of each picture, or all. Of such a group the sums of what follows are
    fixed; how they are divided is known once the images are seen, and until then by their sizes.
    n_special: tokens of each image that always stay and are in no budget. What no profile says is known once the image is encoded.
    n_vision: tokens of each image that the vision stage leaves, special ones among them. windows: (layer K, tokens of each image that
    stay from there on) for each decoder stage.
    """

    chunks: Sequence[TextChunk | ImageChunk]
    config: PruneConfig | None
    groups: list[list[int]]
    n_special: list[int]
    n_vision: list[int]
    windows: list[tuple[int, list[int]]]
    n_text: int

    @property
    def images(self) -> list[ImageChunk]:
        return [c for c in self.chunks if isinstance(c, ImageChunk)]

    @property
    def n_cells(self) -> int:
        """KV cells that the prompt takes at most: while probing."""
        return self.n_text + sum(self.n_vision)


def plan_prompt(
    chunks: Sequence[TextChunk | ImageChunk],
    config: PruneConfig | None,
    windows: Sequence[tuple[int, Keep]],
    encoded: Sequence[Encoded] | None = None,
) -> PromptPlan:
    """Counts tokens. windows: (layer, keep) of the decoder stages that are possible. encoded: the images, once they are.

    Special tokens count, and beside them one at least stays of each image.

    Raises:
        ConfigError: a count over an image's tokens.
    """
    images = [chunk for chunk in chunks if isinstance(chunk, ImageChunk)]
    n_special = [0 if i.special is None else int(i.special.sum()) for i in (images if encoded is None else encoded)]
    pictures: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        alone = config is not None and config.budget == "crop"
        pictures.setdefault(i if alone else image.picture, []).append(i)
    groups = list(pictures.values())
    if config is not None and config.budget == "prompt" and images:
        groups = [list(range(len(images)))]
    n_vision = left = [image.n_tokens for image in images]

    def keep_of(name: str, keep: Keep, left: list[int]) -> list[int]:
        kept = [0] * len(images)
        for crops in pictures.values():
            sizes = [images[i].n_tokens for i in crops]
            special = [n_special[i] for i in crops]
            n_crops = sum(size > n for size, n in zip(sizes, special))  # each keeps at least one
            total = max(keep_count(name, keep, sum(sizes), sum(special)) - sum(special), n_crops)
            ordinary = [left[i] - n_special[i] for i in crops]
            shares = budget.in_proportion(min(total, sum(ordinary)), ordinary)
            for i, n in zip(crops, shares):
                kept[i] = n_special[i] + n
        return kept

    if config is not None:
        n_vision = left = keep_of("vision_keep", config.vision_keep, left)
    counts = []
    for layer, keep in windows:
        left = keep_of("decoder_keep", keep, left)
        counts.append((layer, left))
    n_text = sum(len(c.tokens) for c in chunks if isinstance(c, TextChunk))
    return PromptPlan(chunks, config, groups, n_special, n_vision, counts, n_text)


def encode_images(
    images: Sequence[ImageChunk], encoder: VisionEncoder, config: PruneConfig | None, seconds: dict[str, float]
) -> list[Encoded]:
    """Runs the encoder where its output is not known. seconds gets "encode" and, within it, "vision_stage".

    Raises:
        EngineError: the encoder failed.
    """
    start = time.perf_counter()
    attention = config.encoder_attention if config is not None else None
    encoded = [encoder.encode_once(image, attention, want_cells=config is not None) for image in images]
    if images:
        seconds["encode"] = time.perf_counter() - start
        seconds["vision_stage"] = sum(e.score_seconds for e in encoded)
    return encoded


@one_blas_thread()
def run_vision_stage(
    plan: PromptPlan, encoded: Sequence[Encoded], mrope: bool, seconds: dict[str, float]
) -> tuple[list[Segment], list[ImageReport], int]:
    """Prunes. Returns the segments, a report for each image, and the RoPE position after the prompt.

    seconds: "encode" and "vision_stage" grow. plan.n_vision becomes what each image of a group that shares its tokens has of them.
    """
    start = time.perf_counter()
    config = plan.config
    images = plan.images
    for group in plan.groups:
        if len(group) > 1 and any(plan.n_vision[i] < images[i].n_tokens for i in group):
            counts = _divide([images[i] for i in group], [encoded[i] for i in group], plan, group)
            for i, n in zip(group, counts):
                plan.n_vision[i] = plan.n_special[i] + n
    segments: list[Segment] = []
    reports: list[ImageReport] = []
    position = 0
    for chunk in plan.chunks:
        if isinstance(chunk, TextChunk):
            n = len(chunk.tokens)
            if n:
                segments.append(Segment(Rows(_text_positions(position, n, mrope), tokens=chunk.tokens)))
            position += n
            continue
        image, n_keep = encoded[len(reports)], plan.n_vision[len(reports)]
        selection, embeddings = Selection(np.arange(chunk.n_tokens)), image.embeddings
        if n_keep < chunk.n_tokens:
            selection = _select(image, chunk, n_keep - plan.n_special[len(reports)], config)
            embeddings = merge(image.embeddings, selection)
        kept = selection.kept
        positions, n_positions = chunk.positions[..., kept], chunk.n_positions
        if config is not None and config.positions == "renumbered" and n_keep < chunk.n_tokens:
            positions, n_positions = _text_positions(0, n_keep, mrope), n_keep
        offset = np.array([[position]] * 3 + [[0]], np.int32) if mrope else position
        segments.append(Segment(Rows(positions + offset, embeddings=embeddings), len(reports), chunk.causal, selection.mass))
        reports.append(
            ImageReport(
                chunk.picture,
                chunk.n_tokens,
                chunk.grid,
                image.cells,
                kept,
                kept,
                selection.scores,
                vision_mass=selection.mass,
                decoder_mass=selection.mass,
                special=image.special,
                cached=image.cached,
            )
        )
        position += n_positions
    for name in ("encode", "vision_stage"):
        if reports:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return segments, reports, position


def vision_scorer(config: PruneConfig, has_attention: bool) -> str:
    """The config's vision scorer, or where it needs attention that cannot be read, diversity of the embeddings."""
    needs = VISION_SCORERS[config.vision_scorer].reads is not None
    return config.vision_scorer if has_attention or not needs else "maxmin"


def _tokens(image: Encoded, chunk: ImageChunk, config: PruneConfig) -> Tokens:
    tokens = Tokens(image.embeddings, image.cells, chunk.grid, attention=image.scores).checked()
    tokens.seed = zlib.crc32(image.embeddings.tobytes()) + config.seed if config.vision_scorer == "random" else 0
    return tokens


def _divide(chunks: Sequence[ImageChunk], images: Sequence[Encoded], plan: PromptPlan, group: Sequence[int]) -> list[int]:
    """How many tokens of each image of a group stay, special ones not counted.

    Crops go by score where tokens are chosen by it. Frames go by what is new in each: attention does not tell a repetition from what it
    repeats. The two baselines that look at nothing give every image the same part.
    """
    config = plan.config
    parts = []
    for chunk, image in zip(chunks, images):
        part = _tokens(image, chunk, config)
        if image.special is not None:
            part = part.part(~image.special)
        if part.attention is not None:  # a share of 1 for each image: of images of several sizes, that of a token depends on the size
            part.attention = part.attention / max(float(part.attention.mean()), 1e-30)
        parts.append(part)
    name = vision_scorer(config, all(image.scores is not None for image in images))
    by_score = config.chooses_by_score and (config.budget != "prompt" or name in ("uniform", "random"))
    if by_score:
        count = lambda tokens, k: budget.by_score(tokens, VISION_SCORERS[name].score(tokens, k), k)
    else:
        count = budget.by_distinctness
    total = sum(plan.n_vision[i] - plan.n_special[i] for i in group)
    return budget.divide(
        parts, [chunk.picture for chunk in chunks], [len(part) for part in parts], total, count, not by_score or name in ("maxmin", "scope")
    )


def _select(image: Encoded, chunk: ImageChunk, n_keep: int, config: PruneConfig) -> Selection:
    """n_keep of the tokens that are not special, and those that are."""
    tokens = _tokens(image, chunk, config)
    share = 0.0 if config.representatives == "none" else config.vision_share
    by_score = n_keep - round(share * n_keep)
    scorer = VISION_SCORERS[vision_scorer(config, image.scores is not None)]

    def choose(tokens: Tokens) -> Selection:
        scores = np.zeros(len(tokens)) if share == 1.0 else scorer.score(tokens, by_score)
        return select(config.representatives, tokens, scores, n_keep, share)

    selection = apart(image.special, tokens, choose)
    if share == 1.0:  # nothing is chosen by score
        selection.scores = None
    return selection


def _text_positions(start: int, n: int, mrope: bool) -> np.ndarray:
    positions = np.arange(start, start + n, dtype=np.int32)
    return np.stack([positions] * 3 + [np.zeros_like(positions)]) if mrope else positions
