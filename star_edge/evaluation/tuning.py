"""The search of `star-edge tune`: the fastest config that keeps a given share of the unpruned model's accuracy.

1. Alone: a binary search along each axis finds its strongest value that keeps enough. All axes are asked in one pass.
2. Together: what the axes lose and save alone predicts what combinations do. A bisection over the predicted loss asks
   the fastest combination within it. Then single steps from the best one, and exchanges of two, are asked.
3. Guard: the fastest one is asked on questions that had no part in the choice. If it loses too much there, a slower one
   has its turn.

Accuracy falls along an axis, apart from noise. So what is stronger in every way than a config that loses too much is
not asked. Time is measured, and never assumed: a config that is not faster than the best so far is dropped.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import EvaluationError
from ..io.questions import Question
from .axes import Axis, Point, excludes, make_config
from .trials import Part, Parts, Trial

MIN_GAIN = 1.03  # a step is worth taking if the first token comes by this factor sooner
ALONE = 100  # questions for an axis alone, at most
FRONT_ROUNDS, LOCAL_ROUNDS, LOCAL_BATCH = 6, 2, 3
GUARD_TRIES, GUARD_STEP = 6, 1.05  # configs that are checked, and how much slower each is than the one before

Verdict = Callable[[Trial, str], None]


@dataclass
class Choice:
    """What the search found.

    Attributes:
        best: The fastest that keeps enough, as far as is known. None: no config does.
        kept: All that keep enough, the fastest first. Their n says whether on all questions of the choice.
        trials: Every trial by the config's name, the last of each.
        is_complete: False: the time was up.
    """

    best: Trial | None
    kept: list[Trial]
    trials: dict[str, Trial]
    is_complete: bool


@dataclass
class _Curve:
    """What an axis does alone, by the number of its value: predicted loss, and log of the speed."""

    limit: int = 0  # the strongest value that may be used
    loss: list[float] = field(default_factory=lambda: [0.0])
    speed: list[float] = field(default_factory=lambda: [0.0])


class Search:
    """One search.

    Args:
        axes: The axes.
        part: The questions for the choice.
        is_over: Whether the time is up.
        tell: Called with each trial that has a verdict, and what it was about: "alone" or "together".
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        part: Part,
        is_over: Callable[[], bool] = lambda: False,
        tell: Verdict = lambda trial, phase: None,
    ) -> None:
        self._axes, self._part, self._is_over, self._tell = list(axes), part, is_over, tell
        self._spare = (1.0 - part.keep) * (part.score or 0.0)  # loss for each question that is allowed
        self._trials: dict[Point, Trial] = {}
        self._seen: dict[str, Trial] = {}
        self._whole = len(part.questions)

    def run(self) -> Choice:
        """Searches."""
        limits, failed = self._alone()
        self._together(self._curves(limits, failed))
        kept = sorted(self._kept(0), key=lambda t: -(t.speed or 0.0))
        complete = all(t.verdict != "unfinished" for t in self._trials.values())
        return Choice(self._best_trial() or next(iter(kept), None), kept, self._seen, complete)

    def _kept(self, n: int) -> list[Trial]:
        return [t for t in self._seen.values() if t.verdict == "kept" and t.n >= n]

    def _ask(self, points: Sequence[Point], speed: float, phase: str, n: int | None = None) -> list[Trial]:
        """Trials of points that have none with as many questions yet."""
        configs = {point: make_config(self._axes, point) for point in points}
        new = {config.name: config for config in configs.values()}
        for trial in self._part.try_all(list(new.values()), speed, n, self._is_over):
            self._seen[trial.config.name] = trial
            if trial.verdict != "unfinished":
                self._tell(trial, phase)
        for point, config in configs.items():
            self._trials[point] = self._seen[config.name]
        return [self._trials[point] for point in points]

    # ---- 1: alone ----

    def _single(self, axis: int, number: int) -> Point:
        return tuple(number if i == axis else 0 for i in range(len(self._axes)))

    def _alone(self) -> tuple[list[int], list[int]]:
        """The strongest value of each axis that keeps enough (0: none), and the mildest that does not."""
        low = [0] * len(self._axes)
        high = [len(axis.values) + 1 for axis in self._axes]
        while True:
            points = {
                i: self._single(i, (low[i] + high[i]) // 2) for i in range(len(self._axes)) if high[i] - low[i] > 1
            }
            if not points:
                return low, high
            trials = self._ask(list(points.values()), MIN_GAIN, "alone", min(ALONE, self._whole))
            for (i, point), trial in zip(points.items(), trials):
                if trial.verdict == "unfinished":
                    return low, high
                if trial.verdict in ("accuracy", "error"):
                    high[i] = point[i]
                else:  # kept, or not faster: a stronger one may be
                    low[i] = point[i]

    def _curves(self, limits: Sequence[int], failed: Sequence[int]) -> list[_Curve]:
        curves = []
        for i, axis in enumerate(self._axes):
            trials = {
                n: t
                for n in range(1, limits[i] + 1)
                if (t := self._trials.get(self._single(i, n))) is not None and t.verdict in ("kept", "time")
            }
            faster = [n for n, t in trials.items() if t.verdict == "kept"]
            limit = max(faster, default=0)
            known_loss = {0: 0.0} | {n: max(0.0, t.loss) for n, t in trials.items()}
            known_speed = {0: 0.0} | {n: math.log(t.speed) for n, t in trials.items() if t.speed}
            # Where the next value loses too much, this one may be close to it without showing it
            edge = self._spare * (0.5 if failed[i] <= len(axis.values) else 0.1)
            steps = range(limit + 1)
            curves.append(
                _Curve(
                    limit,
                    [max(_between(known_loss, n), edge * (n / limit) ** 2 if limit else 0.0) for n in steps],
                    [_between(known_speed, n) for n in steps],
                )
            )
        return curves

    # ---- 2: together ----

    def _together(self, curves: list[_Curve]) -> None:
        points = [
            point
            for point in itertools.product(*(range(curve.limit + 1) for curve in curves))
            if any(point) and not excludes(self._axes, point)
        ]
        loss = {p: sum(curve.loss[n] for curve, n in zip(curves, p)) for p in points}
        speed = {p: sum(curve.speed[n] for curve, n in zip(curves, p)) for p in points}
        points.sort(key=lambda p: (-speed[p], loss[p], p))
        least, most = 0.0, math.inf  # predicted losses: what was kept, and what was not
        within = max(self._spare, 0.5 / max(1, self._whole))
        for _ in range(FRONT_ROUNDS):
            best = self._best_speed()
            goal = math.log(best * MIN_GAIN) / self._optimism(speed)
            point = next((p for p in points if loss[p] <= within and speed[p] > goal and self._is_open(p)), None)
            if point is None:
                if most < math.inf or within > 8 * self._spare + 1:
                    break
                within = 2 * max(within, least)
                continue
            trial = self._ask([point], best * MIN_GAIN if self._best_trial() else MIN_GAIN, "together")[0]
            if trial.verdict == "unfinished":
                return
            if trial.verdict in ("accuracy", "error"):
                most = min(most, loss[point])
            else:
                least = max(least, loss[point])
            within = 2 * max(within, least) if most == math.inf else (min(least, most) + most) / 2
        self._climb(points, speed)

    def _climb(self, points: Sequence[Point], speed: dict[Point, float]) -> None:
        """Single steps and exchanges from the best point, as long as one is faster and keeps enough."""
        for _ in range(LOCAL_ROUNDS):
            at = self._best_point()
            if at is None:
                return
            best = self._best_speed()
            steps = [p for p in points if _is_step(at, p) and speed[p] > speed.get(at, 0.0) and self._is_open(p)]
            asked: list[Point] = []
            for step in steps:
                if len(asked) < LOCAL_BATCH and not any(_covers(step, p) or _covers(p, step) for p in asked):
                    asked.append(step)
            if not asked:
                return
            trials = self._ask(asked, best * MIN_GAIN, "together")
            if any(t.verdict == "unfinished" for t in trials):
                return

    def _best_trial(self) -> Trial | None:
        return max(self._kept(self._whole), key=lambda t: t.speed or 0.0, default=None)

    def _best_speed(self) -> float:
        best = self._best_trial()
        return 1.0 if best is None or best.speed is None else best.speed

    def _best_point(self) -> Point | None:
        best = self._best_trial()
        return next((p for p, t in self._trials.items() if t is best), None)

    def _optimism(self, speed: dict[Point, float]) -> float:
        """Measured over predicted log of the speed, for combinations. Gains of axes that save the same do not add."""
        seen = [
            math.log(t.speed) / speed[p]
            for p, t in self._trials.items()
            if sum(map(bool, p)) > 1 and t.speed and speed.get(p, 0.0) > 0 and t.n >= 10
        ]
        return min(1.5, max(0.3, statistics.median(seen))) if seen else 1.0

    def _is_open(self, point: Point) -> bool:
        """Whether nothing is known of it: no trial, and nothing milder in every way lost too much."""
        name = make_config(self._axes, point).name
        known = self._seen.get(name)
        if known is not None and not (known.verdict == "kept" and known.n < self._whole):
            return False
        lost = (p for p, t in self._trials.items() if t.verdict in ("accuracy", "error"))
        return not any(_covers(point, p) for p in lost)


def _between(known: dict[int, float], n: int) -> float:
    """The value at n, on the line between its neighbours; beyond the last one, that of the last."""
    if n in known:
        return known[n]
    below = max(k for k in known if k < n)
    above = min((k for k in known if k > n), default=None)
    if above is None:
        return known[below]
    return known[below] + (known[above] - known[below]) * (n - below) / (above - below)


def _covers(strong: Point, mild: Point) -> bool:
    """Whether the first is as strong as the second on every axis."""
    return all(a >= b for a, b in zip(strong, mild))


def _is_step(a: Point, b: Point) -> bool:
    """Whether b is a step from a: one axis by one or two values, or one axis stronger and one milder, by one or two."""
    moved = [y - x for x, y in zip(a, b) if x != y]
    return len(moved) in (1, 2) and all(abs(m) <= 2 for m in moved) and (len(moved) == 1 or moved[0] * moved[1] < 0)


# ---- 3: guard ----


@dataclass
class Guarded:
    """What the guard said.

    Attributes:
        best: What may be used. None: do not prune.
        checked: Trials on the guard's questions, in order.
        is_checked: Whether `best` was checked. False: there are too few questions, or the time was up.
    """

    best: Trial | None
    checked: list[Trial]
    is_checked: bool


def guard(choice: Choice, chosen_on: Part, part: Part | None, is_over: Callable[[], bool] = lambda: False) -> Guarded:
    """Checks what the search found on questions that had no part in it.

    There a config may lose what `keep` allows, rounded up to a whole answer: with 40 questions and 98% that is one. On
    both parts together it may lose what `keep` allows. Otherwise the next one has its turn that is slower by
    GUARD_STEP. After GUARD_TRIES it is best not to prune.

    Args:
        choice: What the search found.
        chosen_on: The questions of the choice.
        part: The guard's questions. None: there are too few.
        is_over: Whether the time is up. The first config is checked all the same.
    """
    whole = len(chosen_on.questions)
    checked: list[Trial] = []
    speed = math.inf if choice.best is None else choice.best.speed or 1.0
    for trial in choice.kept:
        if len(checked) >= GUARD_TRIES or choice.best is None:
            break
        if (trial.speed or 1.0) > speed:
            continue
        if trial.n < whole:  # alone it was asked about a part of the questions
            whole_trial = chosen_on.try_all([trial.config], 1.0, None, is_over)[0]
            if whole_trial.verdict != "unfinished":
                trial = whole_trial
            if trial.verdict != "kept":
                continue
        if part is None:
            return Guarded(trial, checked, False)
        late = is_over if checked else lambda: False  # the first is always checked
        seen = part.try_all([trial.config], 1.0, None, late, part.rounding)[0]
        if seen.verdict == "unfinished":
            return Guarded(trial, checked, False)
        if seen.verdict == "kept" and seen.surplus + trial.surplus < -1e-9:
            seen = replace(seen, verdict="accuracy")
        checked.append(seen)
        if seen.verdict == "kept":
            return Guarded(trial, checked, True)
        speed = (trial.speed or 1.0) / GUARD_STEP
    return Guarded(None, checked, part is not None)


def check_score(part: Part) -> None:
    """Raises EvaluationError unless the unpruned model scores on some question, so that there is something to keep."""
    if not part.answered:
        raise EvaluationError("no question could be answered", "see star-edge eval with the same file for the errors")
    if not part.score:
        raise EvaluationError(
            "the unpruned model has no answer right", "check the answers and --metric: there is nothing to keep"
        )


# ---- the plan ----


@dataclass(frozen=True)
class Plan:
    """What a search asks, at most and as expected.

    Attributes:
        most_answers: Answers, at most.
        most_reads: Prompts that are read again unpruned, for times within one pass, at most.
        minutes: Expected time, if each answer takes as long as an unpruned one and half of the configs are dropped
            after a quarter of the questions.
    """

    most_answers: int
    most_reads: int
    minutes: float


def plan(axes: Sequence[Axis], parts: Parts, answer_seconds: float) -> Plan:
    """The plan.

    Args:
        axes: The axes.
        parts: The questions.
        answer_seconds: Seconds of an unpruned answer.
    """
    n, alone = len(parts.choice), _rounded(parts.choice, min(ALONE, len(parts.choice)))
    rounds = [_rounds(len(axis.values)) for axis in axes]
    together = FRONT_ROUNDS + LOCAL_ROUNDS * LOCAL_BATCH if axes else 0
    trials = sum(rounds) * alone + together * n
    guarded = GUARD_TRIES * (len(parts.guard) + n - alone)
    unpruned = n + len(parts.guard) + len(parts.report)
    most_answers = unpruned + trials + guarded + len(parts.report)
    reads = max(rounds, default=0) * alone + (FRONT_ROUNDS + LOCAL_ROUNDS) * n + guarded + len(parts.report)
    share = 0.5 + 0.5 * 0.25
    expected = unpruned + share * (trials + reads) + len(parts.guard) + len(parts.report)
    return Plan(most_answers, reads, expected * answer_seconds / 60)


def _rounds(n_values: int) -> int:
    """Questions of a binary search among n values and none."""
    return math.ceil(math.log2(n_values + 1))


def _rounded(questions: Sequence[Question], n: int) -> int:
    """n, and the rest of the last image's questions."""
    while 0 < n < len(questions) and questions[n].images == questions[n - 1].images:
        n += 1
    return n
