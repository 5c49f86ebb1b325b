"""Pictures of a benchmark: where the time to the first token goes on each side, and how pruning shortens it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..evaluation.plots import check, drawing, set_legend, set_title
from .sides import STAGES
from .summary import SELECTION_STAGES

__all__ = ["check", "save"]

# Okabe and Ito's colours (2008): colour-blind readers can tell them apart
_COLORS = {
    "preprocess": "#999999",
    "redundancy": "#DDCC77",
    "encode": "#56B4E9",
    "encoder_stage": "#B3A000",
    "vision_stage": "#F0E442",
    "prefill": "#0072B2",
    "probe": "#009E73",
    "decoder_stage": "#E69F00",
    "resume": "#CC79A7",
    "first_token": "#555555",
}
_NAMES = {name: name.replace("_", " ") for name in STAGES} | {"prefill": "prefill (stock), or text before the image"}
_GREY = "#555555"
_LONGEST = 30  # characters of a name in one line


def save(result: Mapping[str, Any], path: str) -> None:
    """Draws the stages of each side as stacked bars (left), and a waterfall from the reference to the fastest star_edge
    side (right).

    Raises:
        EvaluationError: See `check`; or the file cannot be written.
    """
    sides = result["sides"]
    height = max(3.4, 0.42 * len(sides) + 1.8)
    with drawing(path, 9, figsize=(12, height), width_ratios=(3, 2)) as (figure, (bars, fall)):
        _bars(bars, sides)
        _waterfall(fall, sides, result["reference"])
        set_title(figure, result.get("title", ""))
        set_legend(figure, bars)


def _bars(axis: Any, sides: list[dict[str, Any]]) -> None:
    names = [textwrap.fill(row["name"], _LONGEST) for row in sides]
    left = [0.0] * len(sides)
    for stage in STAGES:
        widths = [row["stages_ms"].get(stage, 0.0) for row in sides]  # older results have fewer stages
        if any(widths):
            axis.barh(names, widths, left=left, color=_COLORS[stage], label=_NAMES[stage], height=0.7)
            left = [a + b for a, b in zip(left, widths)]
    for i, row in enumerate(sides):
        axis.text(left[i], i, f"  {row['speed_up']:.2f}x", va="center", color=_GREY)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("time to first token, ms (median)")


def waterfall(sides: list[dict[str, Any]], reference: str) -> tuple[str, list[tuple[str, float]]]:
    """How the fastest star_edge side differs from the reference.

    Returns:
        The side's name, and for each part the change of its time in ms, negative if shorter. The reference's time and
        the changes add up to the side's time.
    """
    base = next(row for row in sides if row["name"] == reference)
    best = min((row for row in sides if row["kind"] == "star_edge"), key=lambda row: row["first_token_ms"]["median"])

    def of(row: dict[str, Any], *names: str) -> float:
        return float(sum(row["stages_ms"].get(name, 0.0) for name in names))

    parts = {
        "encoder": ("encode",),
        "decoder": ("prefill", "probe", "resume"),
        "selection": SELECTION_STAGES,
        "rest": ("preprocess", "first_token"),
    }
    return best["name"], [(title, of(best, *names) - of(base, *names)) for title, names in parts.items()]


def _waterfall(axis: Any, sides: list[dict[str, Any]], reference: str) -> None:
    best, steps = waterfall(sides, reference)
    level = next(row for row in sides if row["name"] == reference)["first_token_ms"]["median"]
    reference, best = textwrap.fill(reference, _LONGEST), textwrap.fill(best, _LONGEST)
    axis.bar([reference], [level], color=_GREY, width=0.6)
    for title, change in steps:
        axis.bar([title], [change], bottom=[level], color="#009E73" if change <= 0 else "#D55E00", width=0.6)
        axis.annotate(
            f"{change:+.0f}",
            (title, max(level, level + change)),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        level += change
    label = best if best != reference else f"{best} "
    axis.bar([label], [level], color="#0072B2", width=0.6)
    axis.annotate(f"{level:.0f}", (label, level), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axis.set_ylabel("time to first token, ms")
    axis.margins(y=0.1)
    axis.tick_params(axis="x", labelrotation=20)
