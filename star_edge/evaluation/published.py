"""Files of benchmarks as they are published: POPE, TextVQA, DocVQA, ChartQA, OCRBench, MMBench and GQA.

A file is recognised by its fields. Files of one JSON object a line are read by `io.questions`. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputFileError
from ..io.json_input import MAX_CHARACTERS, bounded_lines, parse_json, read_json, read_lines
from ..io.questions import FORMAT, Fields, Question, image_folder, make_items, parse_question, read_questions

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

_ROTATION = 1_000_000  # MMBench: rows of one question have indices that differ by multiples of it
_LONGEST_INDEX = 64  # MMBench: a shorter image is the index of the row that has it
_PICTURE = "data:image/jpeg;base64,"


@dataclass(frozen=True)
class QuestionSet:
    """Questions of a file, and how they are asked and scored where nothing else is said.

    Attributes:
        questions: The questions.
        metric: A name in `metrics.METRICS`, or "auto": what fits the answers.
        prompt_suffix: Text after each question. For published files LLaVA-1.5's (arXiv 2310.03744, appendix).
    """

    questions: list[Question]
    metric: str = "auto"
    prompt_suffix: str = ""


@dataclass(frozen=True)
class _Layout:
    """A published layout of JSON.

    name: For messages.
    marks: Fields of its first entry that tell it from others.
    translate: Fields as `io.questions` names them, from an entry and its key (a number from 1, or GQA's id).
    folders: Where its images are, beside the file; the first that exists, otherwise the file's own folder.
    """

    name: str
    marks: tuple[str, ...]
    translate: Callable[[Fields, str], Fields]
    metric: str
    prompt_suffix: str = SHORT
    folders: tuple[str, ...] = ()


def _named(directory: str, name: Any, ending: str) -> Any:
    """An image's path from its id; what is no id stays, for the reader to refuse."""
    return f"{directory}{name}{ending}" if isinstance(name, (str, int)) else name


_LAYOUTS = (
    # textvqa.org: {"data": [...]}, ten answers a question
    _Layout(
        "TextVQA",
        ("question_id", "image_id", "question", "set_name"),
        lambda e, key: {
            "id": e.get("question_id"),
            "image": _named("", e.get("image_id"), ".jpg"),
            "question": e.get("question"),
            "answers": e.get("answers"),
        },
        "vqa",
        folders=("train_images", "train_val_images/train_images"),  # those of its validation set are there too
    ),
    # docvqa.org, task 1: {"data": [...]}
    _Layout(
        "DocVQA",
        ("questionId", "question", "image", "docId"),
        lambda e, key: {
            "id": e.get("questionId"),
            "image": e.get("image"),
            "question": e.get("question"),
            "answers": e.get("answers"),
            "category": _first(e.get("question_types")),
        },
        "anls",
    ),
    # github.com/vis-nlp/ChartQA: [...]
    _Layout(
        "ChartQA",
        ("imgname", "query", "label"),
        lambda e, key: {"id": key, "image": e.get("imgname"), "question": e.get("query"), "answer": e.get("label")},
        "relaxed",
        folders=("png",),
    ),
    # github.com/Yuliang-Liu/MultimodalOCR: [...]. Its ids are unique within one source alone
    _Layout(
        "OCRBench",
        ("dataset_name", "image_path", "question", "type"),
        lambda e, key: {
            "id": key,
            "image": e.get("image_path"),
            "question": e.get("question"),
            "answers": e.get("answers"),
            "category": e.get("type"),
        },
        "ocrbench",
        "",
        folders=("OCRBench_Images",),
    ),
    # cs.stanford.edu/people/dorarad/gqa: {id: {...}}
    _Layout(
        "GQA",
        ("imageId", "question", "semantic"),
        lambda e, key: {
            "id": key,
            "image": _named("", e.get("imageId"), ".jpg"),
            "question": e.get("question"),
            "answer": e.get("answer"),
            "category": e["types"].get("structural") if isinstance(e.get("types"), dict) else None,
        },
        "exact",
        folders=("images", "../images"),
    ),
)


def read_question_set(path: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None) -> QuestionSet:
    """Reads a file of questions, in a published layout or with one JSON object a line.

    Published layouts, by their fields:

    - POPE (JSON Lines: text, label), scored by POPE's rule.
    - TextVQA (TextVQA_0.5.1_val.json), VQA accuracy.
    - DocVQA (val_v1.0.json), ANLS.
    - ChartQA (test_human.json, test_augmented.json), relaxed accuracy.
    - OCRBench (OCRBench.json), its own rule.
    - GQA (testdev_balanced_questions.json), exact match.
    - MMBench (mmbench_dev_en.tsv), the option's letter. Rotations of one question are one group.

    Args:
        path: The file.
        image_root: Folder that image paths are relative to. None: where the benchmark's archive has them beside the
            file, otherwise the file's folder. MMBench has its pictures in the file.

    Raises:
        InputFileError: The file cannot be used. The message names the file and the line or item.
    """
    name = os.fspath(path)
    if name.lower().endswith(".tsv"):
        return _read_mmbench(name)
    whole = _read_whole(name)
    if whole is None:
        return QuestionSet(read_questions(path, image_root))
    entries = whole["data"] if isinstance(whole, dict) and isinstance(whole.get("data"), list) else whole
    keyed = list(entries.items()) if isinstance(entries, dict) else [(str(i), e) for i, e in enumerate(entries, 1)]
    first = keyed[0][1] if keyed else None
    layout = next((a for a in _LAYOUTS if isinstance(first, dict) and all(mark in first for mark in a.marks)), None)
    if layout is None:
        known = ", ".join(layout.name for layout in _LAYOUTS)
        raise InputFileError(
            f"{name} is JSON, but in no layout of {known}", f"write one JSON object per line: {FORMAT}"
        )
    chosen = layout  # for the function below: it is not None
    folder = image_folder(path, image_root)
    if image_root is None:
        folder = next((f for f in (os.path.join(folder, sub) for sub in layout.folders) if os.path.isdir(f)), folder)

    def make(value: Any, where: str, number: int) -> tuple[str, Question]:
        if not isinstance(value, dict):
            raise InputFileError(f"{where} is a {type(value).__name__}, not an object", "take the file as published")
        question = parse_question(chosen.translate(value, keyed[number - 1][0]), where, folder, str(number))
        return question.id, _with_image(question, where)

    questions = make_items(
        name, "item", ((i, entry) for i, (_, entry) in enumerate(keyed, 1)), make, "question", "take another file"
    )
    return QuestionSet(questions, layout.metric, layout.prompt_suffix)


def _read_whole(name: str) -> Any:
    """The value of a file that is one JSON text, or None for a file with one JSON object a line.

    Errors of the latter are left to its reader.
    """
    try:
        texts = [line.strip() for _, line in itertools.islice(read_lines(name), 2)]
    except (OSError, ValueError):
        return None
    text = texts[0] if texts else ""
    try:
        value = parse_json(text)
    except ValueError:
        if text[:1] not in ("[", "{"):
            return None
    else:
        return value if len(texts) == 1 and _is_published(value) else None
    try:  # it goes on over several lines
        value = read_json(name)
    except (OSError, ValueError) as error:
        if text[:1] == "{" and len(text) > 1:
            return None  # more likely a broken line
        raise InputFileError(f"{name} is not valid JSON ({error})", "take the file as published") from error
    return value if _is_published(value) else None


def _is_published(value: Any) -> bool:
    """Whether a JSON value holds questions: a list of them, or an object of objects, or one with a list of data."""
    if isinstance(value, dict):
        return isinstance(value.get("data"), list) or (bool(value) and all(isinstance(v, dict) for v in value.values()))
    return isinstance(value, list) and bool(value)


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _with_image(question: Question, where: str) -> Question:
    if not question.images:
        raise InputFileError(f"{where} names no image", "take the file as published")
    return question


# ---- MMBench ----


def _read_mmbench(name: str) -> QuestionSet:
    """Reads MMBench's table (github.com/open-compass/MMBench): index, question, hint, A, B, ..., answer, image, ...

    Its circular evaluation (arXiv 2307.06281, section 4) asks each question with its options rotated, and counts it as
    right if all rotations are. A file that holds the rotations has them in rows whose indices differ by multiples of
    1,000,000.
    """
    rows = list(_rows(name))
    pictures = {row.get("index", ""): row["image"] for _, row in rows if len(row["image"]) > _LONGEST_INDEX}

    def make(row: Mapping[str, str], where: str, number: int) -> tuple[str, Question]:
        letters = [letter for letter in string.ascii_uppercase if row.get(letter, "").strip()]
        if len(letters) < 2:
            raise InputFileError(f"{where} has fewer than two options", "take the file as published")
        answer = row.get("answer", "").strip()
        if answer and answer not in letters:
            raise InputFileError(f"{where} has the answer {answer!r}", f"use one of {', '.join(letters)}")
        picture = pictures.get(row["image"], row["image"])
        if len(picture) <= _LONGEST_INDEX:
            raise InputFileError(
                f"{where} has no picture, and no row {picture!r} has one", "take the file as published"
            )
        parts = [row.get("hint", "").strip(), row.get("question", ""), *(f"{c}. {row[c].strip()}" for c in letters)]
        fields = {
            "id": row.get("index") or None,
            "image": "sha256:" + hashlib.sha256(picture.encode()).hexdigest()[:16],  # as a name it stands for itself
            "question": "\n".join(part for part in parts if part),
            "answers": [answer, row[answer].strip()] if answer else None,
            "category": row.get("category") or None,
        }
        question = parse_question(fields, where, "", str(number))
        group = str(int(question.id) % _ROTATION) if question.id.isdecimal() else question.id
        return question.id, replace(question, sources=(_PICTURE + picture,), group=group)

    return QuestionSet(make_items(name, "line", rows, make, "question", "take another file"), "choice", LETTER)


def _rows(name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a table with tabs; empty fields are "". Fields may be quoted, and hold
    newlines.
    """
    before = csv.field_size_limit(MAX_CHARACTERS)
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(bounded_lines(file), delimiter="\t", restval="")
            columns = reader.fieldnames or []
            missing = [column for column in ("index", "question", "A", "B", "image") if column not in columns]
            if missing:
                raise InputFileError(
                    f"{name} is a table without the columns {', '.join(missing)}", "take MMBench's file as published"
                )
            for row in reader:
                # pandas leaves missing values empty; some tools that go over such tables write "nan"
                yield reader.line_num, {column: "" if row[column] == "nan" else row[column] for column in columns}
    except InputFileError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(f"{name} cannot be read ({reason})", "check the path of the questions") from error
    finally:
        csv.field_size_limit(before)
