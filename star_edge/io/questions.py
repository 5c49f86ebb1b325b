"""Files of questions about images, one JSON object a line: what `run --tasks`, `eval` and `tune` read."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import InputFileError
from ..suggestions import nearest
from .fingerprints import fingerprint
from .json_input import parse_json, read_lines

FORMAT = '{"image": "a.jpg", "question": "what is this?", "answer": "a cat"}'

# The first name that a line has is used. POPE: text, label. LLaVA: question_id, text. VQA and TextVQA: question_id,
# answers.
FIELDS = {
    "id": ("id", "question_id"),
    "image": ("image", "images"),
    "question": ("question", "prompt", "text"),
    "answer": ("answer", "answers", "label"),
    "category": ("category", "family"),
}
OPEN_FILE = "standard input"  # an open file, in messages
Fields = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """A question about images.

    Attributes:
        id: Unique in its file.
        images: Paths or URLs, as they are written.
        sources: The same with absolute paths, as `load_image` takes them.
        prompt: The question.
        answers: The true answer, or all that people gave (VQA has ten), or none.
        category: For a breakdown, or None.
        group: Questions of one group count together too, as right if all are (MMBench's rotations). None: no group.
    """

    id: str
    images: tuple[str, ...]
    sources: tuple[str, ...]
    prompt: str
    answers: tuple[str, ...] = ()
    category: str | None = None
    group: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the names of the images, the question and the answers."""
        return fingerprint([self.images, self.prompt, self.answers])


def read_questions(
    path: str | os.PathLike[str] | io.TextIOBase, image_root: str | os.PathLike[str] | None = None
) -> list[Question]:
    """Reads questions, one JSON object a line. Empty lines are skipped.

    Fields:

    - image (or images): a path, a data: or http(s): URL, or a list of them.
    - question (or prompt, text).
    - answer (or answers, label), optional: a string, or a list of people's answers.
    - category (or family), optional.
    - id (or question_id), optional: by default the number of the line.

    Args:
        path: The file, or one that is open as text.
        image_root: Folder that image paths are relative to. None: the file's folder, of an open file the current one.

    Raises:
        InputFileError: The file cannot be used. The message names the file and the line.
    """
    folder = image_folder(path, image_root)

    def make(fields: Fields, where: str, number: int) -> tuple[str, Question]:
        question = parse_question(fields, where, folder, str(number))
        if not question.images:
            raise InputFileError(f"{where} names no image", _missing("image", fields))
        return question.id, question

    return read_objects(path, make, "question", FORMAT)


def read_objects(
    path: str | os.PathLike[str] | io.TextIOBase,
    make: Callable[[Fields, str, int], tuple[str, Item]],
    noun: str,
    form: str,
) -> list[Item]:
    """Reads a file of JSON objects, one a line.

    Args:
        path: The file, or one that is open as text.
        make: make(object, where, number of the line) returns an id and what becomes of the object. `where` names the
            file and the line, for messages.
        noun: What a line is, for messages.
        form: An example of a line, for messages.

    Raises:
        InputFileError: The file cannot be read, a line is not an object, two have one id, or there is none.
    """
    name = OPEN_FILE if isinstance(path, io.TextIOBase) else os.fspath(path)
    remedy = f"write one JSON object per line: {form}"
    try:
        lines = list(read_lines(path))
    except UnicodeDecodeError as error:
        raise InputFileError(f"{name} is not UTF-8 text, and cannot be read", remedy) from error
    except (OSError, ValueError) as error:  # ValueError: an endless line, or a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(f"{name} cannot be read ({reason})", f"check the path of the {noun}s") from error

    def values() -> Iterator[tuple[int, Any]]:
        for number, line in lines:
            where = f"{name}, line {number}"
            try:
                fields = parse_json(line)
            except ValueError as error:
                raise InputFileError(f"{where} is not valid JSON ({error})", remedy) from error
            if not isinstance(fields, dict):
                raise InputFileError(f"{where} is a {type(fields).__name__}, not an object", remedy)
            yield number, fields

    return make_items(name, "line", values(), make, noun, remedy)


def make_items(
    name: str,
    unit: str,
    values: Iterable[tuple[int, Any]],
    make: Callable[[Any, str, int], tuple[str, Item]],
    noun: str,
    remedy: str,
) -> list[Item]:
    """What becomes of the values of a file.

    Args:
        name: The file.
        unit: What its parts are: "line", "entry".
        values: Number and value of each part.
        make: See `read_objects`.
        noun: What a part is, for messages.
        remedy: What to do about a file without any.

    Raises:
        InputFileError: Two have one id, or there is none.
    """
    items: list[Item] = []
    number_of: dict[str, int] = {}
    for number, value in values:
        where = f"{name}, {unit} {number}"
        id, item = make(value, where, number)
        if id in number_of:
            first = number_of[id]
            raise InputFileError(
                f"{where} repeats {unit} {first}: {unit}s {first} and {number} have the same id {id!r}",
                f"give each {noun} its own id",
            )
        number_of[id] = number
        items.append(item)
    if not items:
        raise InputFileError(f"{name} has no {noun}s", remedy)
    return items


def parse_question(
    fields: Fields, where: str, folder: str, default_id: str, default_prompt: str | None = None
) -> Question:
    """The question in an object. It may be about no image.

    Args:
        fields: The object.
        where: Its file and line, for messages.
        folder: Folder that image paths are relative to.
        default_id: The id if it has none.
        default_prompt: The question if it has none.

    Raises:
        InputFileError: There is no question, or a field has a value that it cannot have.
    """
    found = {field: find_field(fields, field) for field in FIELDS}
    given = [] if found["image"] is None else found["image"]
    images = given if isinstance(given, list) else [given]
    if not all(isinstance(image, str) and image for image in images):
        raise InputFileError(f"{where} has images={images!r}, which are not all str with text", "use paths or URLs")
    prompt = default_prompt if found["question"] is None else found["question"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputFileError(f"{where} has no question and no prompt", _missing("question", fields))
    answers = found["answer"] if isinstance(found["answer"], list) else [found["answer"]]
    texts = [text for answer in answers if (text := answer_text(answer, where))]
    id = default_id if found["id"] is None else found["id"]
    if not isinstance(id, (str, int)):
        raise InputFileError(f"{where} has the id {id!r}", "use a string or a whole number")
    return Question(
        str(id),
        tuple(images),
        tuple(locate(image, folder) for image in images),
        prompt,
        tuple(texts),
        None if found["category"] is None else str(found["category"]),
    )


def _missing(field: str, fields: Fields) -> str:
    """The remedy for a field that an object lacks. It may have it under a mistyped name."""
    known = {name for names in FIELDS.values() for name in names}
    for name in fields:
        near = nearest(name, FIELDS[field])
        if near is not None and name not in known:
            return f"did you mean {near} by {str(name)[:60]}?"
    return {
        "question": 'add "question" or "prompt" as a string',
        "image": 'add "image": a path or URL, or a list of them',
    }[field]


def find_field(fields: Fields, field: str) -> Any:
    """The value of the first of a field's names that has one, or None."""
    return next((fields[name] for name in FIELDS[field] if fields.get(name) is not None), None)


def answer_text(answer: Any, where: str) -> str:
    """An answer as text, "" for none. VQA has objects with an "answer"; some files have numbers and booleans.

    Raises:
        InputFileError: It is a list or another object.
    """
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if answer is None:
        return ""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, (str, int, float)):
        return str(answer).strip()
    raise InputFileError(
        f"{where} has an answer that is a {type(answer).__name__}", "use a string, or a list of strings"
    )


def sample_questions(questions: Sequence[Question], limit: int | None, seed: int | None) -> list[Question]:
    """The first `limit` questions, or with a seed a random sample of them, in the order of the file.

    A group counts as one question, and is taken whole.
    """
    units = list(dict.fromkeys((q.id, None) if q.group is None else (None, q.group) for q in questions))
    if limit is None or limit >= len(units):
        return list(questions)
    chosen = set(units[:limit] if seed is None else random.Random(seed).sample(units, limit))
    return [q for q in questions if (q.id, None) in chosen or (None, q.group) in chosen]


def image_folder(path: str | os.PathLike[str] | io.TextIOBase, image_root: str | os.PathLike[str] | None) -> str:
    """The folder that image paths of a file are relative to. Of an open file it is the current one.

    Raises:
        InputFileError: image_root is not a folder.
    """
    if image_root is None:
        return "" if isinstance(path, io.TextIOBase) else os.path.dirname(os.fspath(path))
    if not os.path.isdir(image_root):
        raise InputFileError(
            f"the image root {os.fspath(image_root)} is not a folder",
            "give the folder that image paths are relative to",
        )
    return os.fspath(image_root)


def is_url(image: str) -> bool:
    return re.match(r"data:|[a-z][a-z0-9+.-]+://", image, re.IGNORECASE) is not None


def locate(image: str, folder: str) -> str:
    """An absolute path, of a file in the folder. URLs stay as they are."""
    return image if is_url(image) else os.path.abspath(os.path.join(folder, image))
