"""Training batches as NumPy arrays. A batch depends on the seed, the phase and the step, and on nothing that came
before it.
"""

from __future__ import annotations

import numpy as np
from questions import FAMILIES, TRAINING_PLAN, Question, training_questions
from scenes import KINDS, Scene, SceneConfig, SceneGenerator
from vocabulary import COLOR_NAMES, EOS, PLATE, encode, encode_question

IGNORED = -100  # target of a position without loss
N_QUESTIONS = len(TRAINING_PLAN)
N_PRESENCE = (len(KINDS) - 1) * len(COLOR_NAMES) + 1


def slot_length(config: SceneConfig) -> int:
    """Tokens of the longest question and answer; the answer's end is predicted from its last token, so it takes
    none.
    """
    plate = len(encode_question("what number is shown?")) + config.plate_digits
    other = max(
        len(encode_question(f"{q}?")) + n
        for q, n in (("is there a red circle", 1), ("what color is the circle", 1), ("where is the 0", 2))
    )
    return max(plate, other)


def encode_questions(questions: list[Question], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and next-token targets, both int64 (questions, length). Only the answer and its end have targets."""
    ids = np.zeros((len(questions), length), np.int64)
    targets = np.full((len(questions), length), IGNORED, np.int64)
    for row, q in enumerate(questions):
        prompt, answer = encode_question(q.question), encode(q.answer)
        ids[row, : len(prompt) + len(answer)] = prompt + answer
        targets[row, len(prompt) - 1 : len(prompt) + len(answer)] = [*answer, EOS]
    return ids, targets


def presence(scene: Scene) -> np.ndarray:
    """Which (kind, colour) pairs stand in the scene, and at the end whether a plate does; float32 (N_PRESENCE,)."""
    there = np.zeros(N_PRESENCE, np.float32)
    for item in scene.objects:
        there[
            -1 if item.kind == PLATE else KINDS.index(item.kind) * len(COLOR_NAMES) + COLOR_NAMES.index(item.color)
        ] = 1
    return there


def make_batch(generator: SceneGenerator, phase: str, step: int, n_pictures: int) -> dict[str, np.ndarray]:
    """Arrays of one training step, B pictures, Q questions of T tokens each:

    pixels uint8 (B, size, size, 3); labels (B, patches, 2 + plate digits); presence (B, N_PRESENCE); ids, targets (B,
    Q, T); families (B, Q).
    """
    rng = generator.rng(phase, step)
    length = slot_length(generator.config)
    rows: dict[str, list[np.ndarray]] = {
        name: [] for name in ("pixels", "labels", "presence", "ids", "targets", "families")
    }
    for _ in range(n_pictures):
        scene = generator.scene(rng)
        questions = training_questions(scene, rng)
        ids, targets = encode_questions(questions, length)
        families = np.array([FAMILIES.index(q.family) for q in questions])
        for name, value in zip(rows, (scene.pixels, scene.labels, presence(scene), ids, targets, families)):
            rows[name].append(value)
    return {name: np.stack(values) for name, values in rows.items()}
