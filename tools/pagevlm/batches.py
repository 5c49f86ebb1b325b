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
    """grid: tokens (high, wide) that the model sees. scale: 0.5 and 2 for pictures drawn twice or half as large and
    resized.
    """

    split: str
    seed: int
    first: int
    grid: tuple[int, int]
    pictures: int
    questions: int
    scale: float = 1.0

    @property
    def drawn_grid(self) -> tuple[int, int]:
        return round(self.grid[0] / self.scale), round(self.grid[1] / self.scale)


def make_batch(plan: BatchPlan) -> dict[str, np.ndarray]:
    """Families in turn.

    cells uint8 (B, 4, rows, columns); palette uint8 (B, colours, 3); noise, shade float32 (B,); labels int16 (B, rows,
    columns / 2, N_LABELS); ids int16 (B, Q, SLOT); at int16 (B, Q, N_TARGETS): slot positions whose next token is the
    answer's; targets int16 alike; place int16 (B, Q, N_TARGETS, 3): row, first and last column of the patches that a
    token of the answer is read from, -1 for none; family int8 (B,).
    """
    pictures = [
        draw(plan.split, plan.seed, plan.first + i, FAMILIES[(plan.first + i) % len(FAMILIES)], plan.drawn_grid)
        for i in range(plan.pictures)
    ]
    ids = np.zeros((plan.pictures, plan.questions, SLOT), np.int16)
    at = np.zeros((plan.pictures, plan.questions, N_TARGETS), np.int16)
    targets = np.full((plan.pictures, plan.questions, N_TARGETS), IGNORED, np.int16)
    place = np.full((plan.pictures, plan.questions, N_TARGETS, 3), -1, np.int16)
    for b, p in enumerate(pictures):
        for q, fact in enumerate(choose_facts(p, plan.questions)):
            prompt, answer = encode_prompt(fact.question), encode(fact.answer)
            n, m = len(prompt), len(answer)
            ids[b, q, :n] = prompt
            ids[b, q, n : n + m] = answer
            at[b, q, : m + 1] = np.arange(n - 1, n + m)
            targets[b, q, : m + 1] = [*answer, IM_END]
            if plan.scale == 1.0:
                row, column, length = fact.place
                place[b, q, : m + 1] = row, column // 2, (column + length - 1) // 2
                if fact.spelled:  # letter by letter; its end is seen from all of it
                    place[b, q, :m, 1] = place[b, q, :m, 2] = (column + np.arange(m)) // 2
    return {
        **cells(pictures),
        "labels": np.stack([p.labels for p in pictures]),
        "ids": ids,
        "at": at,
        "targets": targets,
        "place": place,
        "family": np.array([(plan.first + i) % len(FAMILIES) for i in range(plan.pictures)], np.int8),
    }


def cells(pictures: list[Picture]) -> dict[str, np.ndarray]:
    """What render.py needs."""
    return {
        "cells": np.stack([np.stack([p.tile, p.face, p.ink, p.paper]) for p in pictures]),
        "palette": np.stack([p.palette for p in pictures]),
        "noise": np.array([p.noise for p in pictures], np.float32),
        "shade": np.array([p.shade for p in pictures], np.float32),
    }
