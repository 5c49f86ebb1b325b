"""The summary of a run for each config: plain data for JSON, and tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..io.questions import Question
from ..io.results_file import Record
from .configs import OFF, NamedConfig
from .metrics import pope_scores, same_answer
from .statistics import mcnemar_p, mean_interval, sign_counts

METRIC_TITLES = {
    "exact": "exact match",
    "vqa": "VQA accuracy",
    "pope": "POPE accuracy",
    "anls": "ANLS",
    "relaxed": "relaxed accuracy",
    "ocrbench": "OCRBench accuracy",
    "choice": "accuracy of choices",
    None: "no answers",
}


def summarise(
    questions: Sequence[Question],
    configs: Sequence[NamedConfig],
    records: Mapping[tuple[str, str], Record],
    metric: str | None,
) -> dict[str, Any]:
    """Plain values for each config. Shares are in 0..1; None stands for what cannot be computed.

    Over the questions that the config answered:

    - n, n_errors: questions answered, and failed.
    - n_scored: answered questions with a true answer.
    - accuracy, accuracy_by_category: mean scores over those.
    - group_accuracy: share of the groups with no wrong answer (MMBench's circular evaluation); None without groups.
    - average_tokens: image tokens per decoder layer, mean.
    - first_token_ms: time to the first token, median.
    - kl: KL divergence of the first token from the unpruned model's, mean, in nats.
    - speed_up: the unpruned model's first-token time over the config's, both from one pass, median.
    - pope: see `metrics.pope_scores`.
    - notes: notes of the engine, with the number of questions.

    Over the questions that the unpruned model answered too:

    - relative_accuracy: mean score over the unpruned model's.
    - difference: mean score less the unpruned model's.
    - interval: 95% bootstrap interval of the difference, over images.
    - mcnemar_p: see `statistics`.
    - agreement: share of answers that equal the unpruned model's.
    """
    rows = [_summarise(questions, config, records, metric) for config in configs]
    errors = [r for q in questions for c in configs if "error" in (r := records.get((q.id, c.name), {}))]
    return {
        "metric": metric,
        "n_tasks": len(questions),
        "n_images": len({q.images for q in questions}),
        "configs": rows,
        "n_errors": len(errors),
        "errors": [{key: r[key] for key in ("task", "config", "error")} for r in errors[:20]],
    }


def _summarise(
    questions: Sequence[Question], config: NamedConfig, records: Mapping[tuple[str, str], Record], metric: str | None
) -> dict[str, Any]:
    mine = [(q, records[q.id, config.name]) for q in questions if (q.id, config.name) in records]
    answered = [(q, r) for q, r in mine if "error" not in r]
    scored = [(q, r) for q, r in answered if r["score"] is not None]
    paired = [(q, r, off) for q, r in answered if "error" not in (off := records.get((q.id, OFF.name), {"error": ""}))]
    both = [(q, r["score"], off["score"]) for q, r, off in paired if r["score"] is not None]
    by_category = defaultdict(list)
    for question, record in scored:
        if question.category is not None:
            by_category[question.category].append(record["score"])
    groups: dict[str, float] = {}
    for question, record in scored:
        if question.group is not None:
            groups[question.group] = min(groups.get(question.group, 1.0), record["score"])
    unpruned = _mean(off for _, _, off in both)
    accuracy_of_both = _mean(score for _, score, _ in both)
    row: dict[str, Any] = {
        "name": config.name,
        "method": config.method,
        "config": None if config.prune is None else config.prune.to_dict(),
        "n": len(answered),
        "n_scored": len(scored),
        "n_errors": len(mine) - len(answered),
        "accuracy": _mean(r["score"] for _, r in scored),
        "accuracy_by_category": {category: _mean(scores) for category, scores in by_category.items()},
        "group_accuracy": _mean(float(score == 1) for score in groups.values()),
        "relative_accuracy": accuracy_of_both / unpruned if accuracy_of_both is not None and unpruned else None,
        "agreement": _mean(same_answer(r["answer"], off["answer"]) for _, r, off in paired),
        "kl": _mean(r["kl"] for _, r in answered if r["kl"] is not None),
        "average_tokens": _mean(r["average_tokens"] for _, r in answered),
        "first_token_ms": _median(r["first_token_ms"] for _, r in answered),
        "speed_up": _median(
            r["unpruned_first_token_ms"] / r["first_token_ms"] for _, r in answered if r["unpruned_first_token_ms"]
        ),
        "difference": None,
        "interval": None,
        "mcnemar_p": None,
        "pope": None,
        "notes": dict(Counter(note for _, r in answered for note in r["notes"])),
    }
    if both and config != OFF:
        differences = [score - off for _, score, off in both]
        row["difference"] = _mean(differences)
        row["interval"] = mean_interval(differences, [q.images for q, _, _ in both])
        row["mcnemar_p"] = mcnemar_p(*sign_counts([off for *_, off in both], [score for _, score, _ in both]))
    if metric == "pope" and scored:
        row["pope"] = pope_scores([r["answer"] for _, r in scored], [q.answers[0] for q, _ in scored]).to_dict()
    return row


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.median(values)) if values else None


# ---- tables ----


@dataclass(frozen=True)
class TextTable:
    """A table as texts: the title above it, titles of columns, and rows. The first column has the names."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(summary: Mapping[str, Any]) -> list[TextTable]:
    """Tables of accuracy, of POPE's figures if they apply, and of the comparison with the unpruned model."""
    result = []
    rows = summary["configs"]
    title = f"{summary['n_tasks']} questions, {summary['n_images']} images"
    if summary["metric"] is not None:
        categories = list(dict.fromkeys(c for row in rows for c in row["accuracy_by_category"]))
        grouped = any(row["group_accuracy"] is not None for row in rows)
        header = ["config", "n", *categories, "all", *(["whole groups"] if grouped else [])]
        header += ["95% interval of difference", "p"]
        result.append(
            TextTable(
                f"{METRIC_TITLES[summary['metric']]} in %: {title}",
                header,
                [_accuracy_cells(row, categories, grouped) for row in rows],
            )
        )
    if summary["metric"] == "pope":
        figures = {
            "accuracy": "accuracy",
            "precision": "precision",
            "recall": "recall",
            "F1": "f1",
            "yes ratio": "yes_ratio",
        }
        result.append(
            TextTable(
                "POPE, yes is positive, in %",
                ["config", *figures],
                [[row["name"], *(_percent((row["pope"] or {}).get(key)) for key in figures.values())] for row in rows],
            )
        )
    header = ["config", "tokens per layer", "relative accuracy, %", "same answer, %", "KL, nats", "first token, ms"]
    header += ["speed-up", "errors"]
    cells = [
        [
            row["name"],
            _number(row["average_tokens"], ".1f"),
            _percent(row["relative_accuracy"]),
            _percent(row["agreement"]),
            _number(row["kl"], ".3f"),
            _number(row["first_token_ms"], ".1f"),
            _number(row["speed_up"], ".2f"),
            str(row["n_errors"] or ""),
        ]
        for row in rows
    ]
    result.append(TextTable(f"Beside the unpruned model: {title}", header, cells))
    return result


def _accuracy_cells(row: Mapping[str, Any], categories: Sequence[str], grouped: bool) -> list[str]:
    interval = "" if row["interval"] is None else " to ".join(f"{100 * x:+.1f}" for x in row["interval"])
    p = "" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.2g}"
    shares = [_percent(row["accuracy_by_category"].get(c)) for c in categories]
    shares += [_percent(row["accuracy"]), *([_percent(row["group_accuracy"])] if grouped else [])]
    return [row["name"], str(row["n_scored"]), *shares, interval, p]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
