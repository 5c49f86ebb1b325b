"""Questions about images, read from a JSONL file. Field names of POPE, LLaVA and VQA files work too."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..io.json_input import parse_json, read_lines

FORMAT = '{"image": "a.jpg", "question": "what is this?", "answer": "a cat"}'

# The first name that a line has is used. POPE: text, label. LLaVA: question_id, text. VQA and TextVQA: question_id,
# answers.
_NAMES = {
    "id": ("id", "question_id"),
    "image": ("image", "images"),
    "question": ("question", "prompt", "text"),
    "answer": ("answer", "answers", "label"),
    "category": ("category", "family"),
}


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        id: Unique in its file.
        images: Paths or URLs, as `load_image` takes them.
        question: The question.
        answers: The true answer, or all that people gave (VQA has ten), or none.
        category: For a breakdown, or None.
        fingerprint: A hash of the names of the images, the question and the answers.
    """

    id: str
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    category: str | None
    fingerprint: str


def read_tasks(path: str | os.PathLike, image_root: str | os.PathLike | None = None) -> list[Task]:
    """Reads questions, one JSON object per line. Empty lines are skipped.

    Fields:

    - image (or images): a path, a data: or http(s): URL, or a list of them.
    - question (or prompt, text).
    - answer (or answers, label), optional: a string, or a list of people's answers.
    - category (or family), optional.
    - id (or question_id), optional: by default the number of the line.

    Args:
        path: The file.
        image_root: Folder that image paths are relative to. None: the file's folder.

    Raises:
        EvaluationError: The file cannot be used. The message names the file and the line.
    """
    name = os.fspath(path)
    folder = Path(image_root) if image_root is not None else Path(path).parent
    if image_root is not None and not folder.is_dir():
        raise EvaluationError(
            f"the image root {folder} is not a folder", "give the folder that image paths are relative to"
        )
    try:
        lines = list(read_lines(path))
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{name} is not UTF-8 text", f"write one JSON object per line: {FORMAT}") from error
    except (OSError, ValueError) as error:  # ValueError: an endless line, or a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(f"{name} cannot be read ({reason})", "check the path of the questions") from error
    tasks, line_of_id = [], {}
    for number, line in lines:
        task = _parse_line(line, f"{name}, line {number}", str(number), folder)
        if task.id in line_of_id:
            raise EvaluationError(
                f"{name}: lines {line_of_id[task.id]} and {number} have the same id {task.id!r}",
                "make ids unique, or leave them out",
            )
        line_of_id[task.id] = number
        tasks.append(task)
    if not tasks:
        raise EvaluationError(f"{name} has no questions", f"write one JSON object per line: {FORMAT}")
    return tasks


def sample_tasks(tasks: Sequence[Task], limit: int | None, seed: int | None) -> list[Task]:
    """The first `limit` tasks, or with a seed a random sample of them, in the order of the file."""
    if limit is None or limit >= len(tasks):
        return list(tasks)
    if seed is None:
        return list(tasks[:limit])
    return [tasks[i] for i in sorted(random.Random(seed).sample(range(len(tasks)), limit))]


def _parse_line(line: str, where: str, default_id: str, folder: Path) -> Task:
    try:
        data = parse_json(line)
    except ValueError as error:
        raise EvaluationError(f"{where} is not valid JSON ({error})", f"write one object per line: {FORMAT}") from error
    if not isinstance(data, dict):
        raise EvaluationError(
            f"{where} is a {type(data).__name__}, not an object", f"write one object per line: {FORMAT}"
        )
    fields = {field: next((data[n] for n in names if data.get(n) is not None), None) for field, names in _NAMES.items()}
    images = fields["image"] if isinstance(fields["image"], list) else [fields["image"]]
    if not images or not all(isinstance(image, str) and image for image in images):
        raise EvaluationError(f"{where} names no image", 'add "image": a path or URL, or a list of them')
    question = fields["question"]
    if not isinstance(question, str) or not question.strip():
        raise EvaluationError(f"{where} has no question", 'add "question" as a string')
    answers = [
        _answer_text(a, where) for a in (fields["answer"] if isinstance(fields["answer"], list) else [fields["answer"]])
    ]
    answers = [a for a in answers if a]
    task_id = fields["id"] if fields["id"] is not None else default_id
    if not isinstance(task_id, (str, int)):
        raise EvaluationError(f"{where} has the id {task_id!r}", "use a string or a whole number")
    category = None if fields["category"] is None else str(fields["category"])
    content = json.dumps([images, question, answers]).encode()
    return Task(
        str(task_id),
        tuple(_locate(i, folder) for i in images),
        question,
        tuple(answers),
        category,
        hashlib.sha256(content).hexdigest()[:16],
    )


def _answer_text(answer: Any, where: str) -> str:
    """An answer as text, "" for none. VQA has objects with an "answer"; some files have numbers and booleans."""
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if answer is None:
        return ""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, (str, int, float)):
        return str(answer).strip()
    raise EvaluationError(
        f"{where} has an answer that is a {type(answer).__name__}", "use a string, or a list of strings"
    )


def _locate(image: str, folder: Path) -> str:
    """A path within the folder; URLs stay as they are."""
    return image if re.match(r"data:|[a-z][a-z0-9+.-]+://", image, re.IGNORECASE) else str(folder / image)
