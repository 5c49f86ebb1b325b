"""The experiments of README.md: for each, its methods. A layer is a share of the decoder's layers."""

from __future__ import annotations

from typing import Any

from methods import Method

LATE = 2 / 3


def _depth() -> list[Method]:
    """Question 1, and 5: a quarter of the rows, chosen at different layers; what the answer sees below them."""
    return [
        Method(f"K = {share:.2f} L, {'seen' if seen else 'gone'}", ((share, 0.25),), seen_below=seen)
        for share in (1 / 3, 0.5, 0.6, 2 / 3, 0.75)
        for seen in (False, True)
    ]


def _ranking() -> list[Method]:
    """Question 2: rankings at one layer."""
    return [
        Method(f"{ranked}{f', maximum of {pool}' if pool > 1 else ''}", ((LATE, 0.125),), ranked, pool, seen_below=True)
        for ranked, pool in (
            ("text", 1),
            ("last", 1),
            ("last", 5),
            ("last4", 1),
            ("max", 1),
            ("raters", 1),
            ("random", 1),
        )
    ]


def _representatives() -> list[Method]:
    """Question 3: how much of the budget represents dropped rows, and how."""
    return [
        Method(f"{kind} {part:.0%}", ((LATE, 0.125),), "last", 1, kind, part, seen_below=True)
        for kind, part in (
            ("cluster", 0.0),
            ("cluster", 0.1),
            ("cluster", 0.25),
            ("cluster", 0.5),
            ("even", 0.25),
        )
    ]


def _schedule() -> list[Method]:
    """Question 4: one stage, or several from mild to strong, at the same average (64% of the rows)."""
    return [
        Method("one: 10% from 0.6 L", ((0.6, 0.1),), seen_below=True),
        Method("two: 50% from 0.5 L, 17% from 0.67 L", ((0.5, 0.5), (LATE, 0.17)), seen_below=True),
        Method(
            "three: 60% from 0.5 L, 30% from 0.6 L, 14% from 0.7 L",
            ((0.5, 0.6), (0.6, 0.3), (0.7, 0.14)),
            seen_below=True,
        ),
    ]


def _late() -> list[Method]:
    """More of question 1: later layers, more rows, and what rounding alone changes (one row in a hundred dropped)."""
    return [
        Method("K = 0.7 L, keep 50%", ((0.7, 0.5),), seen_below=True),
        Method("K = 0.7 L, keep 25%", ((0.7, 0.25),), seen_below=True),
        Method("K = 0.7 L, keep 50%, maximum of 5", ((0.7, 0.5),), pool=5, seen_below=True),
        Method("K = 0.7 L, keep 25%, maximum of 5", ((0.7, 0.25),), pool=5, seen_below=True),
        Method("K = 0.8 L, keep 50%", ((0.8, 0.5),), seen_below=True),
        Method("K = 0.9 L, keep 25%", ((0.9, 0.25),), seen_below=True),
        Method("K = 0.9 L, keep 99%", ((0.9, 0.99),), seen_below=True),
    ]


def _rivals() -> list[Method]:
    """On the test split: the proposed stage against others at equal token-layers, and what no method reaches."""

    def keep(average: float, share: float) -> float:
        return (average - share) / (1 - share)

    first = 0.1  # the second or third layer, as FastV
    return [
        Method("last row, K = 0.67 L, keep 50%", ((LATE, 0.5),), seen_below=True),
        Method("last row, K = 0.67 L, keep 25%", ((LATE, 0.25),), seen_below=True),
        Method("last row, K = 0.75 L, keep 25%", ((0.75, 0.25),), seen_below=True),
        Method("last row, K = 0.8 L, keep 50%", ((0.8, 0.5),), seen_below=True),
        Method("last row, K = 0.8 L, keep 25%", ((0.8, 0.25),), seen_below=True),
        Method("K = 0.9 L, keep 99%: rounding", ((0.9, 0.99),), seen_below=True),
        Method("FastV (0.1 L), 75%", ((first, keep(0.75, first)),), seen_below=True),
        Method("random from 0.1 L, 75%", ((first, keep(0.75, first)),), "random", seen_below=True),
        Method("uniform from 0.1 L, 75%", ((first, keep(0.75, first)),), "uniform", seen_below=True),
        Method("default (K = L/3, clusters), 75%", ((1 / 3, keep(0.75, 1 / 3)),), "text", 1, "cluster", 0.5),
        Method("default (K = L/3, clusters), 50%", ((1 / 3, keep(0.5, 1 / 3)),), "text", 1, "cluster", 0.5),
        Method("words of the question, K = 1, 50%", ((1, 0.48),), "words", seen_below=True),
        Method("words of the question, K = 1, 25%", ((1, 0.215),), "words", seen_below=True),
    ]


def _today() -> list[Method]:
    """On the test split: today's defaults and presets, and what reaches averages of 50% and 25%, against others at
    equal token-layers. All are seen below, as published methods are.
    """

    def seen(name: str, windows: tuple[tuple[float, float], ...], scorer: str = "last", **fields: Any) -> Method:
        return Method(name, windows, scorer, seen_below=True, **fields)

    clusters: dict[str, Any] = {"representatives": "cluster", "share": 0.25}
    methods = [
        seen("preset balanced", ((LATE, 0.15),), first=0.3, tolerance=0.2, **clusters),
        seen("preset document", ((0.8, 0.15),), first=0.3, tolerance=0.1),
        seen("default stage, 25% kept", ((LATE, 0.25),), **clusters),
        seen("the same, no representatives", ((LATE, 0.25),)),
    ]
    schedules = {
        0.5: ((1 / 6, 0.75), (1 / 3, 0.55), (0.5, 0.4), (LATE, 0.15)),
        0.25: ((0.1, 0.45), (0.2, 0.3), (1 / 3, 0.15), (0.5, 0.1)),
    }
    early = 0.1  # the second or third layer, as FastV
    for average in (0.5, 0.25):
        from_early = ((early, (average - early) / (1 - early)),)
        name = f", {average:.0%}"
        if average > 1 / 3:
            methods.append(seen("K = L/3, last row" + name, ((1 / 3, (average - 1 / 3) / (2 / 3)),)))
            methods.append(seen("plain STAR's decoder stage (K = L/3, text)" + name, methods[-1].windows, "text"))
        else:
            methods.append(seen("plain STAR's decoder stage (K = 0.1 L, text)" + name, from_early, "text"))
        methods += [
            seen("four stages, mild to strong" + name, schedules[average]),
            seen("both stages (clusters first)" + name, ((LATE, 0.6 * average),), first=1.2 * average, **clusters),
            seen("FastV (0.1 L)" + name, from_early),
            seen("random from 0.1 L" + name, from_early, "random"),
            seen("uniform from 0.1 L" + name, from_early, "uniform"),
            seen("the answer's rows are known, 0.1 L" + name, from_early, "facts"),
        ]
    return methods


def _ahead() -> list[Method]:
    """The question looks ahead: at the averages of `_today`, from early layers. Rows are words, of which an answer
    takes some neighbours, so a maximum over neighbours is compared as well.
    """
    methods = []
    for average in (0.5, 0.25):
        for share in (0.1, 1 / 3) if average > 1 / 3 else (0.1,):
            windows = ((share, (average - share) / (1 - share)),)
            for pool in (1, 5):
                name = f"ahead from {share:.2f} L{f', maximum of {pool}' if pool > 1 else ''}, {average:.0%}"
                methods.append(Method(name, windows, "last", pool, seen_below=True, look_ahead=0.75))
    return methods


EXPERIMENTS: dict[str, list[Method]] = {
    "depth": _depth(),
    "ranking": _ranking(),
    "representatives": _representatives(),
    "schedule": _schedule(),
    "late": _late(),
    "rivals": _rivals(),
    "today": _today(),
    "ahead": _ahead(),
}
