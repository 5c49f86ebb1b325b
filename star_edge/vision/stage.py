"""The vision stage: encode each image, keep the tokens that its encoder attends to.

Turns the chunks of a prompt into the segments that the decoder runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import PruneConfig, keep_count
from ..decoder.context import Rows
from ..decoder.prefill import Segment
from ..report import ImageReport
from ..selection import Selection, keep_by_score
from .encoder import ImageChunk, TextChunk, VisionEncoder


@dataclass
class PromptPlan:
    """What a prompt will take, known before anything is computed.

    n_vision: tokens of each image that the vision stage leaves, n_decoder: those that the decoder stage leaves.
    """

    chunks: Sequence[TextChunk | ImageChunk]
    n_vision: list[int]
    n_decoder: list[int]
    n_text: int

    @property
    def images(self) -> list[ImageChunk]:
        return [c for c in self.chunks if isinstance(c, ImageChunk)]

    @property
    def n_cells(self) -> int:
        """KV cells that the prompt takes at most: while probing."""
        return self.n_text + sum(self.n_vision)


def plan_prompt(
    chunks: Sequence[TextChunk | ImageChunk], config: PruneConfig | None, can_score: bool, can_prune_decoder: bool
) -> PromptPlan:
    """Counts tokens. can_score: the encoder has scores; can_prune_decoder: the decoder stage is possible.

    Raises:
        ConfigError: a count over an image's tokens, or a decoder stage that would keep more than the vision stage leaves.
    """
    n_vision, n_decoder = [], []
    for chunk in chunks:
        if not isinstance(chunk, ImageChunk):
            continue
        n1 = n2 = chunk.n_tokens
        if config is not None and can_score:
            n1 = n2 = keep_count("vision_keep", config.vision_keep, chunk.n_tokens)
        if config is not None and can_prune_decoder:
            n2 = min(n1, keep_count("decoder_keep", config.decoder_keep, chunk.n_tokens))
        n_vision.append(n1)
        n_decoder.append(n2)
    n_text = sum(len(c.tokens) for c in chunks if isinstance(c, TextChunk))
    return PromptPlan(chunks, n_vision, n_decoder, n_text)


def run_vision_stage(
    plan: PromptPlan, encoder: VisionEncoder | None, mrope: bool, prune: bool, seconds: dict[str, float], mass_share: float = 0.0
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
        encoded = encoder.encode(chunk, want_scores=prune)
        chosen = time.perf_counter()
        if n_keep < chunk.n_tokens:
            selection = keep_by_score(encoded.scores, n_keep, mass_share)
        else:
            selection = Selection(np.arange(chunk.n_tokens))
        kept = selection.kept
        embeddings = encoded.embeddings[kept]  # a copy of what stays: the encoder's own memory is used again
        end = time.perf_counter()
        seconds["encode"] = seconds.get("encode", 0.0) + end - start
        seconds["vision_stage"] = seconds.get("vision_stage", 0.0) + encoded.score_seconds + end - chosen
        positions = chunk.positions[..., kept]
        offset = np.array([[position]] * 3 + [[0]], np.int32) if mrope else position
        segments.append(Segment(Rows(positions + offset, embeddings=embeddings), len(reports), chunk.causal, selection.mass))
        reports.append(
            ImageReport(
                chunk.n_tokens,
                chunk.grid,
                encoded.cells,
                kept,
                kept,
                encoded.scores,
                vision_mass=selection.mass,
                decoder_mass=selection.mass,
            )
        )
        position += chunk.n_positions
    return segments, reports, position


def _text_positions(start: int, n: int, mrope: bool) -> np.ndarray:
    positions = np.arange(start, start + n, dtype=np.int32)
    return np.stack([positions] * 3 + [np.zeros_like(positions)]) if mrope else positions
