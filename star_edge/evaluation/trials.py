"""Tries configs on questions, a few at a time, and drops each as soon as it is known not to do."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..io.questions import Question
from ..io.results_file import Record
from .configs import OFF, NamedConfig
from .metrics import same_answer
from .sequential import ALPHA, cannot_reach_zero, odds_against

Ask = Callable[[Sequence[Question], Sequence[NamedConfig]], Mapping[tuple[str, str], Record]]

LEAST = 20  # questions of a part; with fewer it is not made
_SHARES = ((0.5, 0.25, 0.25), (0.6, 0.4, 0.0), (1.0, 0.0, 0.0))
_FIRST, _MOST = 10, 20  # questions of the first batch, and of later ones at most
_MIN_PAIRS = 5  # times, before a median is looked at


@dataclass(frozen=True)
class Parts:
    """Questions for the choice, to check it, and to report on. The last two may be empty.

    All questions about one image are in one part, and next to each other. The order is random, and the same in every
    run.
    """

    choice: list[Question]
    guard: list[Question]
    report: list[Question]


def split(questions: Sequence[Question]) -> Parts:
    """Half of the questions for the choice, a quarter to check it, a quarter to report on.

    Where a part would have fewer than LEAST questions there is no report, and the shares are 60 and 40%. Where that is
    too few as well, all questions are for the choice.
    """

    def place(question: Question) -> bytes:
        return hashlib.sha256(repr(question.images).encode()).digest()

    ordered = sorted(questions, key=place)
    images = [list(group) for _, group in groupby(ordered, key=lambda q: q.images)]
    for shares in _SHARES:
        parts: list[list[Question]] = [[], [], []]
        at, done = 0, 0
        for image in images:
            while at < 2 and done >= len(ordered) * sum(shares[: at + 1]) - 1e-9:
                at += 1
            parts[at] += image
            done += len(image)
        if all(len(part) >= LEAST for part, share in zip(parts, shares) if share):
            return Parts(*parts)
    return Parts(ordered, [], [])


@dataclass
class Trial:
    """What is known of a config on some questions.

    Attributes:
        config: The config.
        verdict: "kept": it keeps enough, and is fast enough. "accuracy": it loses too much. "time": it is not fast
            enough. "error": it fails on a question that the unpruned model answers. "unfinished": the time was up.
        n: Questions asked.
        kept_share: Score over the unpruned model's on those; None if the unpruned model scores nothing.
        loss: Score lost, for each question, on average. Negative: gained.
        surplus: Score over what has to be kept, in all. Below 0: too much is lost.
        speed: The unpruned model's time to the first token over the config's, within one question: median. None: no
            times.
    """

    config: NamedConfig
    verdict: str
    n: int
    kept_share: float | None
    loss: float
    surplus: float
    speed: float | None


class Part:
    """The questions of a part, and what the unpruned model answered.

    Args:
        ask: ask(questions, configs) answers what is missing and returns all records.
        questions: As `split` orders them.
        metric: The metric, or None without answers: the share of answers that equal the unpruned ones counts then.
        keep: Share of the unpruned model's score to keep, in 0..1.
    """

    def __init__(self, ask: Ask, questions: Sequence[Question], metric: str | None, keep: float) -> None:
        self.questions = list(questions)
        self.keep = keep
        self._ask, self._metric = ask, metric
        records = ask(self.questions, [OFF])
        self.unpruned: dict[str, float] = {}  # score by question; without those that fail or have no answer
        for question in self.questions:
            record = records.get((question.id, OFF.name), {"error": ""})
            score = None if "error" in record else 1.0 if metric is None else record["score"]
            if score is not None:
                self.unpruned[question.id] = score
        self.answered = {q.id for q in self.questions if "error" not in records.get((q.id, OFF.name), {"error": ""})}
        sizes = [len(list(group)) for _, group in groupby(self.questions, key=lambda q: q.images)]
        self._largest = max(sizes, default=1)
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]  # where an image's questions end

    @property
    def score(self) -> float | None:
        """The unpruned model's mean score. None: no question was answered."""
        return statistics.fmean(self.unpruned.values()) if self.unpruned else None

    @property
    def rounding(self) -> float:
        """What is missing to a whole answer in the loss that `keep` allows on all questions."""
        allowed = (1.0 - self.keep) * sum(self.unpruned.values())
        return math.ceil(allowed - 1e-9) - allowed

    def _up_to(self, n: int) -> int:
        """n, or as many more questions as the last image has."""
        return next((end for end in self._ends if end >= n), 0)

    def _batches(self, n: int) -> Iterator[tuple[int, int]]:
        """(start, end) of batches of the first n questions. None ends within an image's questions."""
        start = 0
        while start < n:
            end = self._up_to(min(max(_FIRST, 2 * start), start + _MOST, n))
            yield start, end
            start = end

    def try_all(
        self,
        configs: Sequence[NamedConfig],
        speed: float,
        n: int | None = None,
        is_over: Callable[[], bool] = lambda: False,
        rounding: float = 0.0,
    ) -> list[Trial]:
        """Asks with several configs in one pass, and goes on with those that may do.

        Args:
            configs: The configs.
            speed: How fast one must be, as `Trial.speed`.
            n: Only the first so many questions. None: all.
            is_over: Whether the time is up. Then nothing more is asked.
            rounding: So much may be lost beyond what `keep` allows.

        Returns:
            A trial of each.
        """
        n = self._up_to(len(self.questions) if n is None else min(n, len(self.questions)))
        trials: dict[str, Trial] = {}
        waiting = list(configs)
        for start, end in self._batches(n):
            if is_over() and self._is_missing(self.questions[start:end], [OFF, *waiting]):
                break
            records = self._ask(self.questions[start:end], [OFF, *waiting])
            for config in waiting:
                trials[config.name] = self._judge(config, end, n, speed, records, rounding)
            waiting = [c for c in waiting if trials[c.name].verdict == "unfinished"]
            if not waiting:
                break
        return [trials.get(c.name, Trial(c, "unfinished", 0, None, 0.0, 0.0, None)) for c in configs]

    def _is_missing(self, questions: Sequence[Question], configs: Sequence[NamedConfig]) -> bool:
        """Whether anything has to be asked: answers that are there are looked at whatever the time."""
        records = self._ask([], [])
        return any((question.id, config.name) not in records for question in questions for config in configs)

    def _judge(
        self,
        config: NamedConfig,
        n: int,
        most: int,
        speed: float,
        records: Mapping[tuple[str, str], Record],
        rounding: float,
    ) -> Trial:
        """The trial after n of `most` questions."""
        scores: list[tuple[tuple[str, ...], float, float]] = []  # images, the config's, the unpruned model's
        ratios: list[tuple[tuple[str, ...], float]] = []
        fails = False
        for question in self.questions[:n]:
            record = records.get((question.id, config.name), {"error": "not asked"})
            if "error" in record:
                fails = fails or question.id in self.answered
                continue
            if record["unpruned_first_token_ms"]:
                ratios.append((question.images, record["unpruned_first_token_ms"] / record["first_token_ms"]))
            if question.id in self.unpruned:
                score = record["score"]
                if self._metric is None:
                    score = float(same_answer(record["answer"], records[question.id, OFF.name]["answer"]))
                scores.append((question.images, score, self.unpruned[question.id]))
        surplus = [(images, score - self.keep * off) for images, score, off in scores]
        total = sum(x for _, x in surplus)
        to_come = sum(1.0 - self.keep * self.unpruned[q.id] for q in self.questions[n:most] if q.id in self.unpruned)
        median = statistics.median(ratio for _, ratio in ratios) if ratios else None
        if fails:
            verdict = "error"
        elif cannot_reach_zero(total + rounding, to_come) or self._is_unlikely(surplus):
            verdict = "accuracy"
        elif self._is_unlikely([(images, 1.0 if ratio >= speed else -1.0) for images, ratio in ratios]):
            verdict = "time"
        elif n < most:
            verdict = "unfinished"
        else:
            verdict = "time" if median is None or len(ratios) < min(_MIN_PAIRS, n) or median < speed else "kept"
        score, off = sum(score for _, score, _ in scores), sum(off for _, _, off in scores)
        kept_share = score / off if off else None
        return Trial(config, verdict, n, kept_share, (off - score) / len(scores) if scores else 0.0, total, median)

    def _is_unlikely(self, values: Sequence[tuple[tuple[str, ...], float]]) -> bool:
        """Whether values of -1..1, each with its images, speak against a mean of 0 or more."""
        by_image = [sum(x for _, x in group) / self._largest for _, group in groupby(values, key=lambda item: item[0])]
        return odds_against(by_image) >= 1 / ALPHA
