"""The vision stage: encode each image, keep the tokens that say most about it.

Turns the chunks of a prompt into the segments that the decoder runs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import Keep, PruneConfig, keep_count
from ..decoder.context import Rows
from ..decoder.prefill import Segment
from ..report import ImageReport
from ..representatives import merge, select
from ..scorers import VISION_SCORERS
from ..selection import Selection, Tokens
from .encoder import Encoded, ImageChunk, TextChunk, VisionEncoder


@dataclass
class PromptPlan:
    """What a prompt will take, known before anything is computed.

    n_vision: tokens of each image that the vision stage leaves. windows: (layer K, tokens of each image that stay from there on) for
    each decoder stage.
    """

    chunks: Sequence[TextChunk | ImageChunk]
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


def plan_prompt(chunks: Sequence[TextChunk | ImageChunk], config: PruneConfig | None, windows: Sequence[tuple[int, Keep]]) -> PromptPlan:
    """Counts tokens. windows: (layer, keep) of the decoder stages that are possible.

    Raises:
        ConfigError: a count over an image's tokens.
    """
    sizes = [chunk.n_tokens for chunk in chunks if isinstance(chunk, ImageChunk)]
    n_vision = sizes
    if config is not None:
        n_vision = [keep_count("vision_keep", config.vision_keep, n) for n in sizes]
    counts, left = [], n_vision
    for layer, keep in windows:
        left = [min(n, keep_count("decoder_keep", keep, size)) for n, size in zip(left, sizes)]
        counts.append((layer, left))
    n_text = sum(len(c.tokens) for c in chunks if isinstance(c, TextChunk))
    return PromptPlan(chunks, n_vision, counts, n_text)


def run_vision_stage(
    plan: PromptPlan, encoder: VisionEncoder | None, mrope: bool, config: PruneConfig | None, seconds: dict[str, float]
) -> tuple[list[Segment], list[ImageReport], int]:
    """Encodes and prunes. Returns the segments, a report for each image, and the RoPE position after the prompt.

    seconds gets "encode" and, within it, "vision_stage".

    Raises:
        EngineError: the encoder failed.
    """
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
        n_keep = plan.n_vision[len(reports)]
        start = time.perf_counter()
        encoded = encoder.encode_once(chunk, config.encoder_attention if config else None, want_cells=config is not None)
        chosen = time.perf_counter()
        if n_keep < chunk.n_tokens:
            selection = _select(encoded, chunk, n_keep, config)
            embeddings = merge(encoded.embeddings, selection)
        else:
            selection = Selection(np.arange(chunk.n_tokens))
            embeddings = encoded.embeddings if encoded.cached else encoded.embeddings.copy()  # the encoder's own memory is used again
        kept = selection.kept
        end = time.perf_counter()
        seconds["encode"] = seconds.get("encode", 0.0) + end - start
        seconds["vision_stage"] = seconds.get("vision_stage", 0.0) + encoded.score_seconds + end - chosen
        positions, n_positions = chunk.positions[..., kept], chunk.n_positions
        if config is not None and config.positions == "renumbered" and n_keep < chunk.n_tokens:
            positions, n_positions = _text_positions(0, n_keep, mrope), n_keep
        offset = np.array([[position]] * 3 + [[0]], np.int32) if mrope else position
        segments.append(Segment(Rows(positions + offset, embeddings=embeddings), len(reports), chunk.causal, selection.mass))
        reports.append(
            ImageReport(
                chunk.n_tokens,
                chunk.grid,
                encoded.cells,
                kept,
                kept,
                selection.scores,
                vision_mass=selection.mass,
                decoder_mass=selection.mass,
                cached=encoded.cached,
                picture=chunk.picture,
            )
        )
        position += n_positions
    return segments, reports, position


def vision_scorer(config: PruneConfig, has_attention: bool) -> str:
    """The config's vision scorer, or where it needs attention that cannot be read, diversity of the embeddings."""
    needs = VISION_SCORERS[config.vision_scorer].reads is not None
    return config.vision_scorer if has_attention or not needs else "maxmin"


def _select(encoded: Encoded, chunk: ImageChunk, n_keep: int, config: PruneConfig) -> Selection:
    tokens = Tokens(encoded.embeddings, encoded.cells, chunk.grid, attention=encoded.scores)
    tokens.seed = zlib.crc32(encoded.embeddings.tobytes()) + config.seed if config.vision_scorer == "random" else 0
    share = 0.0 if config.representatives == "none" else config.vision_share
    by_score = n_keep - round(share * n_keep)
    if share == 1.0:  # nothing is chosen by score
        selection = select(config.representatives, tokens, np.zeros(len(tokens)), n_keep, share)
        selection.scores = None
        return selection
    scorer = VISION_SCORERS[vision_scorer(config, encoded.scores is not None)]
    return select(config.representatives, tokens, scorer.score(tokens, by_score), n_keep, share)


def _text_positions(start: int, n: int, mrope: bool) -> np.ndarray:
    positions = np.arange(start, start + n, dtype=np.int32)
    return np.stack([positions] * 3 + [np.zeros_like(positions)]) if mrope else positions
