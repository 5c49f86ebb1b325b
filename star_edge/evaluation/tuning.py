"""The cheapest config that keeps a stated share of the unpruned model's accuracy, on the user's own questions.

Candidates are ordered by average tokens. Accuracy falls along them but for noise, so the search halves the range each
time and each question is asked of about log2(candidates) configs. The choice is made on one part of the questions and
reported on the other: the best of several looks better than it is on the questions that it was chosen by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..pruning.config import PruneConfig
from .configs import OFF, NamedConfig
from .results import Record
from .summary import summarise
from .tasks import Task

BUDGETS = (
    0.9,
    0.75,
    0.6,
    0.5,
    0.4,
    0.32,
    0.25,
    0.2,
    0.16,
    0.125,
    0.1,
    0.08,
    0.0625,
    0.05,
)  # average tokens over the image's tokens
HELD_OUT = 1 / 3
LEAST_HELD_OUT = 20  # questions: fewer say too little to be kept from the choice


def candidates() -> list[list[NamedConfig]]:
    """Two families, each from expensive to cheap: "both" prunes at both stages, with twice as many tokens before layer
    K as from it on; "vision" only after the encoder. With K at a third of the layers both have `budget` times the
    image's tokens for each layer.
    """
    both, vision = [], []
    for budget in BUDGETS:
        # over 2/3 the first stage keeps all, and the second makes up the budget: 1/3 + 2/3 n2 = budget
        config = PruneConfig(1.5 * budget, 0.75 * budget) if budget < 2 / 3 else PruneConfig(1.0, (3 * budget - 1) / 2)
        both.append(NamedConfig(f"both {budget:g}", "both", config))
        vision.append(NamedConfig(f"vision {budget:g}", "vision", PruneConfig(budget)))
    return [both, vision]


def split(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Questions to choose by, and questions to report on: all about one image on one side, the same in every run.

    The second part is empty where it would be too small.
    """

    def place(task: Task) -> float:
        return int.from_bytes(hashlib.sha256(repr(task.images).encode()).digest()[:4], "big") / 2**32

    choosing = [t for t in tasks if place(t) >= HELD_OUT]
    reporting = [t for t in tasks if place(t) < HELD_OUT]
    return (choosing, reporting) if choosing and len(reporting) >= LEAST_HELD_OUT else (list(tasks), [])


def retained(row: Mapping[str, Any], metric: str | None) -> float:
    """Accuracy over the unpruned model's, in 0..; without answers, the share of answers that are the unpruned
    model's.
    """
    value = row["relative_accuracy"] if metric is not None else row["agreement"]
    return 0.0 if value is None else value


def tune(
    ask: Callable[[Sequence[NamedConfig]], Mapping[tuple[str, str], Record]],
    tasks: Sequence[Task],
    metric: str | None,
    keep: float,
) -> tuple[NamedConfig, list[dict[str, Any]]]:
    """The cheapest candidate that keeps `keep` (in 0..1), OFF if none does, and a summary row for each that was asked.

    ask(configs): answers what is missing for `tasks` and returns all records.
    """
    rows: dict[str, dict[str, Any]] = {}
    passed: list[NamedConfig] = []
    cheapest = 0
    for family in candidates():
        low, high = (
            cheapest,
            len(family),
        )  # family[:low] keeps enough or is not cheaper than what does; family[high:] does not
        while low < high:
            middle = (low + high) // 2
            config = family[middle]
            unpruned, rows[config.name] = summarise(tasks, [OFF, config], ask([OFF, config]), metric)["configs"]
            # a question that nobody can answer (a broken image) speaks against no config
            if rows[config.name]["n_errors"] <= unpruned["n_errors"] and retained(rows[config.name], metric) >= keep:
                passed.append(config)
                low = middle + 1
            else:
                high = middle
        cheapest = low
    best = min(passed, key=lambda config: rows[config.name]["average_tokens"], default=OFF)
    return best, list(rows.values())
