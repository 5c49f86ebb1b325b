"""How a run of train.py goes: its rates and shares of the time, and which pictures come when."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from batches import BatchPlan

Grid = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Rates are AdamW's; Muon, on the matrices of the blocks, takes twice that. Shares are of the time for training."""

    tokens: int = 8192  # image tokens in a step
    dense_share: tuple[float, float] = (
        0.09,
        0.22,
    )  # patch labels alone, between these: until the labels of a text's keys are right
    dense_accuracy: float = 0.85
    # then the encoder waits: the decoder learns to find places in what stands still, and steps take half the time
    frozen_share: float = 0.25
    smaller_from: float = 0.25  # pictures that were made smaller
    decay_from: float = 0.4
    passed_at: float = 0.5  # of the answers right: until then pictures stay small and rates level, but no longer than
    passed_by: float = 0.65
    rate: float = 1.1e-3
    encoder_factor: float = 0.5  # of the rate, in the joint phase
    dense_weight: float = 0.3  # of the patch loss in the joint phase
    # where a run goes on from files without the heads that name labels: these learn alone, then with the encoder
    new_heads_alone: float = 0.03
    new_heads_dense: float = 0.15
    pointing_weight: float = 0.5  # of the loss of heads that do not look where the answer is
    pointing_until: float = 0.5
    pointing_gone: float = 0.8
    end_weight: float = 0.2  # of the end of an answer, which is learnt at once
    # of the batches: pictures that were made smaller, down to half of their sides, as one who wants fewer tokens does
    smaller_share: float = 0.1
    log_every: int = 20
    save_seconds: float = 60.0
    evaluation_seconds: float = 16.0
    evaluation_sides: tuple[float, ...] = (0.7, 0.5)  # of smaller pictures
    evaluation_pictures: int = 2  # of each family and grid, times a batch's size


# Share of the time until which a mixture of grids holds, and weights of (tokens high, tokens wide). Either may stand
# upright.
STAGES: list[tuple[float, dict[Grid, float]]] = [
    (0.10, {(8, 8): 4, (10, 12): 2, (12, 12): 2, (16, 16): 2}),
    (0.40, {(8, 8): 5, (8, 12): 2, (12, 12): 2, (10, 12): 1, (16, 16): 1.5}),
    (0.70, {(8, 8): 3, (8, 16): 2, (12, 12): 2, (16, 16): 3, (16, 24): 2, (24, 24): 1.5}),
    (
        9.99,
        {
            (8, 8): 2,
            (8, 16): 1,
            (12, 12): 1,
            (10, 12): 1,
            (16, 16): 2.5,
            (16, 24): 2,
            (20, 28): 1.5,
            (24, 24): 1.5,
            (16, 32): 1,
            (32, 32): 3,
        },
    ),
]
EVALUATION_GRIDS: tuple[Grid, ...] = ((8, 8), (16, 16), (24, 24), (32, 32))
SMOKE_STAGES: list[tuple[float, dict[Grid, float]]] = [(9.99, {(8, 8): 1})]


def questions_for(tokens: int) -> int:
    """Questions behind a picture: more where there is more to ask about. Odd, so that rows of the mask are multiples of
    8.
    """
    return 2 * round((3 + 0.055 * tokens) / 2) + 1


def smaller(grid: Grid, side: float) -> Grid:
    """Tokens (high, wide) of a picture of `side` of its sides."""
    return max(4, round(side * grid[0])), max(4, round(side * grid[1]))


class Curriculum:
    """Which batch comes at a step."""

    def __init__(self, plan: Plan, seed: int, stages: list[tuple[float, dict[Grid, float]]]):
        self.plan, self.seed, self.stages = plan, seed, stages
        self.rng = Random(f"curriculum/{seed}")
        self.pictures = 0

    def next(self, share: float) -> BatchPlan:
        plan, rng = self.plan, self.rng
        mixture = next(m for until, m in self.stages if share < until)
        grid = rng.choices(list(mixture), list(mixture.values()))[0]
        if rng.random() < 0.5:
            grid = grid[::-1]
        drawn = None
        if share > plan.smaller_from and rng.random() < plan.smaller_share:
            drawn, grid = grid, smaller(grid, rng.uniform(0.5, 1.0))
        tokens = grid[0] * grid[1]
        batch = BatchPlan(
            "train", self.seed, self.pictures, grid, max(4, round(plan.tokens / tokens)), questions_for(tokens), drawn
        )
        self.pictures += batch.pictures
        return batch
