"""Questions about a scene, in six families, and their answers.

A question is asked only where it has one answer: colours and places of shapes that stand there once, places that are
clear of the picture's middle lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scenes import Scene, SceneObject
from vocabulary import COLOR_NAMES, DIGITS, PLATE, PLURALS, SHAPES

FAMILIES = ("exist", "color", "digit", "plate", "count", "where")
# Fourteen questions share one picture in training: the picture's rows cost more than theirs
TRAINING_PLAN = ("exist",) * 4 + ("color",) * 3 + ("digit",) * 2 + ("plate",) + ("count",) * 2 + ("where",) * 2
HELD_OUT_PLAN = ("exist", "exist", "color", "digit", "plate", "count", "where")
_ALWAYS_POSSIBLE = ("exist", "color", "count", "where")
_MIDDLE = 5  # pixels around the middle lines in which "left" or "top" is not asked

_YES_SHARE = 0.5
_HARD_SHARE = 0.6  # of the "no" questions name a colour and a shape that are both there, but not together
_NONZERO_SHARE = 0.8


@dataclass(frozen=True)
class Question:
    family: str
    question: str
    answer: str


Pair = tuple[str, str]  # question, answer


class QuestionPools:
    """Every question that can be asked about one scene, by family, in an order that depends on the scene alone."""

    def __init__(self, scene: Scene):
        shapes = [o for o in scene.objects if o.kind in SHAPES]
        digits = [o for o in scene.objects if o.kind in DIGITS]
        counts = {kind: sum(o.kind == kind for o in shapes) for kind in SHAPES}
        unique = digits + [o for o in shapes if counts[o.kind] == 1]
        self._exist(shapes, digits)
        self.color = [(f"what color is the {o.kind}?", o.color) for o in unique]
        self.digit = [(f"what digit is {o.color}?", o.kind) for o in digits]
        self.plate = [("what number is shown?", " ".join(map(str, o.digits))) for o in scene.objects if o.kind == PLATE]
        self.counted = [(f"how many {PLURALS[kind]}?", str(n)) for kind, n in counts.items() if n]
        self.absent = [(f"how many {PLURALS[kind]}?", "0") for kind, n in counts.items() if not n]
        size = scene.pixels.shape[0]
        self.where = [(f"where is the {o.kind}?", _quadrant(o, size)) for o in unique if _clear_of_middle(o, size)]

    def _exist(self, shapes: list[SceneObject], digits: list[SceneObject]) -> None:
        there = {(o.color, o.kind) for o in shapes}
        colors = {o.color for o in shapes + digits}
        kinds = {o.kind for o in shapes}
        self.present: list[Pair] = []
        self.hard: list[Pair] = []
        self.half_right: list[Pair] = []
        for color in COLOR_NAMES:
            for kind in SHAPES:
                question = f"is there a {color} {kind}?"
                if (color, kind) in there:
                    self.present.append((question, "yes"))
                elif color in colors and kind in kinds:
                    self.hard.append((question, "no"))
                elif color in colors or kind in kinds:
                    self.half_right.append((question, "no"))

    def draw(self, family: str, rng: np.random.Generator) -> Pair | None:
        """A random question of a family, or None where the scene gives none."""
        if family == "exist":
            if rng.random() < _YES_SHARE:
                pool = self.present
            else:
                pool = self.hard if self.hard and rng.random() < _HARD_SHARE else self.half_right
        elif family == "count":
            pool = self.counted if rng.random() < _NONZERO_SHARE else self.absent
        else:
            pool = getattr(self, family)
        return pool[rng.integers(len(pool))] if pool else None


def _quadrant(item: SceneObject, size: int) -> str:
    x, y = item.centre
    return f"{'top' if y < size / 2 else 'bottom'} {'left' if x < size / 2 else 'right'}"


def _clear_of_middle(item: SceneObject, size: int) -> bool:
    return all(abs(c - size / 2) >= _MIDDLE for c in item.centre)


def training_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question for each entry of TRAINING_PLAN; where a family has none, one of another family. Repeats occur."""
    pools = QuestionPools(scene)
    chosen = []
    for family in TRAINING_PLAN:
        pair = pools.draw(family, rng)
        while pair is None:
            family = _ALWAYS_POSSIBLE[rng.integers(len(_ALWAYS_POSSIBLE))]
            pair = pools.draw(family, rng)
        chosen.append(Question(family, *pair))
    return chosen


def held_out_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Up to one question for each entry of HELD_OUT_PLAN, all different."""
    pools = QuestionPools(scene)
    chosen: dict[str, Question] = {}
    for family in HELD_OUT_PLAN:
        pair = pools.draw(family, rng)
        if pair is not None:
            chosen.setdefault(pair[0], Question(family, *pair))
    return list(chosen.values())
