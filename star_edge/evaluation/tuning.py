"""Finds the cheapest config that keeps a given share of the unpruned model's accuracy on the user's own questions.

Candidates are ordered by average tokens. Apart from noise, accuracy falls along them. A binary search asks each
question with about log2(candidates) configs. One part of the questions is for the choice and the other for the report,
because the best of several configs looks too good on the questions that chose it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..io.questions import Question
from ..io.results_file import Record
from ..pruning.config import PruneConfig
from .configs import OFF, NamedConfig
from .summary import summarise

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
LEAST_HELD_OUT = 20  # questions: with fewer, all are used for the choice


def candidates() -> list[list[NamedConfig]]:
    """Two families of configs, each from expensive to cheap.

    "both" prunes at both stages, with twice as many tokens below layer K as from it on. "vision" prunes after the
    encoder only. With K at two thirds of the layers, both leave `budget` times the image's tokens per layer.
    """
    both, vision = [], []
    for budget in BUDGETS:
        # over 5/6 the first stage keeps all, and the second makes up the budget: 2/3 + 1/3 n2 = budget
        config = PruneConfig(1.2 * budget, 0.6 * budget) if budget < 5 / 6 else PruneConfig(1.0, 3 * budget - 2)
        both.append(NamedConfig(f"both {budget:g}", "both", config))
        vision.append(NamedConfig(f"vision {budget:g}", "vision", PruneConfig(budget)))
    return [both, vision]


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Questions for the choice, and questions for the report; the latter are empty if they would be too few.

    All questions about one image are on one side. The split is the same in every run.
    """

    def place(question: Question) -> float:
        return int.from_bytes(hashlib.sha256(repr(question.images).encode()).digest()[:4], "big") / 2**32

    choosing = [q for q in questions if place(q) >= HELD_OUT]
    reporting = [q for q in questions if place(q) < HELD_OUT]
    return (choosing, reporting) if choosing and len(reporting) >= LEAST_HELD_OUT else (list(questions), [])


def retained(row: Mapping[str, Any], metric: str | None) -> float:
    """Accuracy over the unpruned model's, >= 0. Without answers, the share of answers that equal the unpruned ones."""
    value = row["relative_accuracy"] if metric is not None else row["agreement"]
    return 0.0 if value is None else value


def tune(
    ask: Callable[[Sequence[NamedConfig]], Mapping[tuple[str, str], Record]],
    questions: Sequence[Question],
    metric: str | None,
    keep: float,
) -> tuple[NamedConfig, list[dict[str, Any]]]:
    """Searches the candidates.

    Args:
        ask: ask(configs) answers what is missing for `questions`, and returns all records.
        questions: Questions for the choice.
        metric: The metric, or None without answers.
        keep: Share of the unpruned model's accuracy to keep, in 0..1.

    Returns:
        The cheapest candidate that keeps it, OFF if none does; and the summary rows of all that were asked.
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
            unpruned, rows[config.name] = summarise(questions, [OFF, config], ask([OFF, config]), metric)["configs"]
            # a question that fails unpruned too (a broken image) does not count against a config
            if rows[config.name]["n_errors"] <= unpruned["n_errors"] and retained(rows[config.name], metric) >= keep:
                passed.append(config)
                low = middle + 1
            else:
                high = middle
        cheapest = low
    best = min(passed, key=lambda config: rows[config.name]["average_tokens"], default=OFF)
    return best, list(rows.values())
