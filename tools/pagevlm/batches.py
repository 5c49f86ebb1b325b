"""Training batches as NumPy arrays: pictures of one size, with questions packed behind each. A batch depends on its
plan alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pictures import FAMILIES, Picture, choose_facts, draw
from vocabulary import IM_END, MAX_ANSWER, encode, encode_prompt

IGNORED = -100  # target of a position without loss
SLOT = (
    20  # tokens of the longest question and answer; the answer's end is predicted from its last token, so it takes none
)
N_TARGETS = MAX_ANSWER + 1


@dataclass(frozen=True)
class BatchPlan:
    """grid: tokens (high, wide) that the model sees. drawn: those of the picture as it is drawn, where it is then made
    smaller.
    """

    split: str
    seed: int
    first: int
    grid: tuple[int, int]
    pictures: int
    questions: int
    drawn: tuple[int, int] | None = None

    @property
    def drawn_grid(self) -> tuple[int, int]:
        return self.drawn or self.grid


def make_batch(plan: BatchPlan) -> dict[str, np.ndarray]:
    """Families in turn.

    cells uint8 (B, 4, rows, columns); palette uint8 (B, colours, 3); noise, shade float32 (B,); labels int16 (B, 2
    high, 2 wide, 1 or 2, N_LABELS): of each patch that the model sees, see `seen_labels`; ids int16 (B, Q, SLOT); at
    int16 (B, Q, N_TARGETS): slot positions whose next token is the answer's; targets int16 alike; place int16 (B, Q,
    N_TARGETS, 4): first and last row, first and last column of the patches that a token of the answer is read from, -1
    for none; family int8 (B,).
    """
    pictures = [
        draw(plan.split, plan.seed, plan.first + i, FAMILIES[(plan.first + i) % len(FAMILIES)], plan.drawn_grid)
        for i in range(plan.pictures)
    ]
    ids = np.zeros((plan.pictures, plan.questions, SLOT), np.int16)
    at = np.zeros((plan.pictures, plan.questions, N_TARGETS), np.int16)
    targets = np.full((plan.pictures, plan.questions, N_TARGETS), IGNORED, np.int16)
    place = np.full((plan.pictures, plan.questions, N_TARGETS, 4), -1, np.int16)
    for b, p in enumerate(pictures):
        for q, fact in enumerate(choose_facts(p, plan.questions)):
            prompt, answer = encode_prompt(fact.question), encode(fact.answer)
            n, m = len(prompt), len(answer)
            ids[b, q, :n] = prompt
            ids[b, q, n : n + m] = answer
            at[b, q, : m + 1] = np.arange(n - 1, n + m)
            targets[b, q, : m + 1] = [*answer, IM_END]
            row, column, length = fact.place
            place[b, q, : m + 1] = row, row, column // 2, (column + length - 1) // 2
            if fact.spelled:  # letter by letter; its end is seen from all of it
                place[b, q, :m, 2] = place[b, q, :m, 3] = (column + np.arange(m)) // 2
    return {
        **cells(pictures),
        "labels": seen_labels(np.stack([p.labels for p in pictures]), plan),
        "ids": ids,
        "at": at,
        "targets": targets,
        "place": seen_place(place, plan),
        "family": np.array([(plan.first + i) % len(FAMILIES) for i in range(plan.pictures)], np.int8),
    }


def seen_labels(labels: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """Labels (B, rows, columns, N_LABELS) of the patches of the picture as drawn, for the patches that the model sees:
    (B, 2 high, 2 wide, sets, N_LABELS).

    One set at full size. Where the picture was made smaller, down to half of its side, a patch shows up to two rows of
    text: its two sets are what stood at a quarter and at three quarters of its height, in its middle.
    """
    if plan.drawn is None:
        return labels[:, :, :, None]
    (high, wide), (drawn_high, drawn_wide) = plan.grid, plan.drawn
    rows = (np.arange(4 * high) + 0.5) * drawn_high / (2 * high)
    columns = (np.arange(2 * wide) + 0.5) * drawn_wide / wide
    seen = labels[:, rows.astype(int)][:, :, columns.astype(int)]
    return seen.reshape(len(labels), 2 * high, 2, 2 * wide, -1).transpose(0, 1, 3, 2, 4)


def seen_place(place: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """Patches (..., 4) of the picture as drawn, as those that the model sees them in."""
    if plan.drawn is None:
        return place
    (high, wide), (drawn_high, drawn_wide) = plan.grid, plan.drawn
    scale = np.array([high / drawn_high] * 2 + [wide / drawn_wide] * 2)
    first = np.floor(place * scale + 1e-6)
    last = np.ceil((place + 1) * scale - 1e-6) - 1
    return np.where(place < 0, -1, np.stack([first, last], -1)[..., range(4), [0, 1, 0, 1]]).astype(np.int16)


def cells(pictures: list[Picture]) -> dict[str, np.ndarray]:
    """What render.py needs."""
    return {
        "cells": np.stack([np.stack([p.tile, p.face, p.ink, p.paper]) for p in pictures]),
        "palette": np.stack([p.palette for p in pictures]),
        "noise": np.array([p.noise for p in pictures], np.float32),
        "shade": np.array([p.shade for p in pictures], np.float32),
    }
