"""Many requests to one engine: tasks, a JSON line with an answer or an error for each.

Knows the engine's public surface only. `batch_ray` hands the same tasks to several engines.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import PIL.Image

from .answers import Answer
from .arguments import checked
from .engine import StarVLM
from .errors import ConfigError, ImageError, InputFileError, StarEdgeError
from .io.configs import resolve_prune
from .io.fingerprints import changed_fields, fingerprint, fingerprint_file
from .io.images import FORMATS
from .io.questions import FIELDS, Fields, find_field, image_folder, is_url, locate, parse_question, read_objects
from .io.results_file import ResultsFile, Stamp
from .pruning.config import PruneConfig
from .pruning.presets import override
from .suggestions import use_one_of
from .verify import Agreement, compare, draw_seed

TASK_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "image": (str,),
    "images": (list,),
    "prompt": (str,),
    "preset": (str,),
    "vision_keep": (int, float),
    "vision_tolerance": (int, float),
    "decoder_keep": (int, float),
    "decoder_layer": (int,),
    "look_ahead": (int, float),
    "image_max_tokens": (int, float),
    "budget": (str,),
    "redundancy": (str, int, float),
    "encoder_tolerance": (int, float),
    "encoder_keep": (int, float),
    "encoder_layer": (int,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "seed": (int,),
    "raw": (bool,),
}
_JSON_NAMES: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_OVERRIDES = (
    "vision_keep",
    "vision_tolerance",
    "decoder_keep",
    "decoder_layer",
    "look_ahead",
    "budget",
    "redundancy",
    "encoder_tolerance",
    "encoder_keep",
    "encoder_layer",
    "image_max_tokens",
)
_QUESTION_FIELDS = {name for names in FIELDS.values() for name in names}


@dataclass(frozen=True)
class Settings:
    """Arguments of `StarVLM.generate` for a request. raw stands for chat=False."""

    prune: PruneConfig | None
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    raw: bool = False


@dataclass(frozen=True)
class Task:
    """One request about any number of images.

    Attributes:
        id: Unique in its batch.
        images: Paths and URLs as they were given. Results show them.
        sources: The same with absolute paths.
        prompt: The question.
        settings: How it is answered.
        verify: Whether it is answered unpruned as well.
    """

    id: str | int
    images: tuple[str, ...]
    sources: tuple[str, ...]
    prompt: str
    settings: Settings
    verify: bool = False

    @property
    def key(self) -> str:
        """A hash of everything that the answer depends on, except the model and the content of the image files."""
        prune = None if self.settings.prune is None else changed_fields(self.settings.prune)
        return fingerprint([self.images, self.prompt, {**vars(self.settings), "prune": prune}])


# ---- tasks ----


def each_image(images: Iterable[str], prompt: str, settings: Settings) -> list[Task]:
    """Makes a task of each image. Its id is the image's name as given.

    Args:
        images: Paths, URLs, folders and glob patterns. A folder stands for the image files in it, by their endings,
            without subfolders. In a pattern ** stands for any folders.
        prompt: The question.
        settings: How the requests are answered.

    Raises:
        ImageError: A path does not exist, or a pattern or folder has no images.
    """
    found = dict.fromkeys(path for image in images for path in _expand(image))
    return [Task(path, (path,), (locate(path, ""),), prompt, settings) for path in found]


def names_several(image: str) -> bool:
    """Whether an image argument is a folder or a pattern. A file whose name looks like a pattern is a file."""
    return not is_url(image) and (os.path.isdir(image) or (not os.path.exists(image) and glob.has_magic(image)))


def _expand(image: str) -> list[str]:
    if not names_several(image):
        if not is_url(image) and not os.path.exists(image):
            raise ImageError(f"{image} does not exist", "check the path of the image")
        return [image]
    if os.path.isdir(image):
        PIL.Image.init()
        endings = {ending for ending, kind in PIL.Image.registered_extensions().items() if kind in FORMATS}
        names = [
            name
            for name in os.listdir(image)
            if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
        ]
        paths = [os.path.join(image, name) for name in names]
    else:
        paths = glob.glob(image, recursive=True)
    paths = sorted(path for path in paths if os.path.isfile(path))
    if not paths:
        raise ImageError(
            f"there is no image in {image}",
            "check the folder or the pattern, and quote it so that the shell leaves it alone",
        )
    return paths


@checked()
def read_tasks(path: str | PathLike[str] | io.TextIOBase, prompt: str | None, settings: Settings) -> list[Task]:
    """Reads the tasks of a JSON Lines file. Images are not read yet.

    A line has "image" or "images" (a list), "prompt", and any of id, preset, vision_keep, vision_tolerance,
    decoder_keep, decoder_layer, look_ahead, image_max_tokens, budget, redundancy, encoder_keep, encoder_tolerance,
    encoder_layer, max_tokens, temperature, seed, raw. The names of question files (`io.questions`) are understood
    too, answers and categories are not used. Image paths are relative to the file's folder, of an open file to the
    current one. The id defaults to a hash of the task.

    Args:
        path: The file, or one that is open as text.
        prompt: The question of tasks without one.
        settings: The settings of tasks without their own.

    Raises:
        ConfigError: The file cannot be read, or a line is not a task. The message names the line.
    """

    def make(fields: Fields, where: str, number: int) -> tuple[str, Task]:
        try:
            _check_fields(fields)
            own = _read_settings(fields, settings)
        except ConfigError as error:
            raise InputFileError(f"{where}: {error.cause}", error.remedy) from error
        question = parse_question(fields, where, image_folder(path, None), "", prompt)
        task = Task("", question.images, question.sources, question.prompt, own)
        given = find_field(fields, "id")
        task = replace(task, id=task.key if given is None else given)
        return str(task.id), task

    return read_objects(path, make, "task", '{"image": "a.jpg", "prompt": "..."}')


def _check_fields(fields: Fields) -> None:
    for field, value in fields.items():
        if field in _QUESTION_FIELDS and field not in TASK_FIELDS:
            continue  # the reader of questions checks them
        if field not in TASK_FIELDS:
            raise ConfigError(f"{field[:60]!r} is not a field of a task", use_one_of(field, TASK_FIELDS))
        kinds = TASK_FIELDS[field]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(
                f"{field}={json.dumps(value)[:60]} is {_JSON_NAMES.get(type(value), 'null')}",
                f"use {' or '.join(_JSON_NAMES[kind] for kind in kinds if kind is not int or float not in kinds)}",
            )
    if "image" in fields and "images" in fields:
        raise ConfigError("it has both image and images", "give one of them")


def _read_settings(fields: Fields, settings: Settings) -> Settings:
    base = resolve_prune(fields["preset"]) if "preset" in fields else settings.prune
    prune = override(base, **{name: fields.get(name) for name in _OVERRIDES})
    changes = {name: fields[name] for name in ("max_tokens", "temperature", "seed", "raw") if name in fields}
    own = replace(settings, prune=prune, **changes)
    if own.max_tokens < 1 or not 0 <= own.temperature < float("inf"):
        raise ConfigError(
            "max_tokens is below 1, or temperature is not a finite number >= 0",
            "use max_tokens of 1 or more, and temperature 0 (greedy) or more",
        )
    return own


def mark_every(tasks: Sequence[Task], n: int | None) -> list[Task]:
    """The tasks, with every nth of those that are pruned and have images to be verified. None: none of them."""
    if n is None:
        return list(tasks)
    agreement = Agreement(n)
    return [
        replace(task, verify=task.settings.prune is not None and bool(task.images) and agreement.is_due())
        for task in tasks
    ]


# ---- answers ----


def run_tasks(
    tasks: Iterable[Task], load: Callable[[], StarVLM], emit: Callable[[dict[str, Any]], None], *, warm: bool = False
) -> None:
    """Answers tasks one by one on one engine.

    Args:
        tasks: The tasks.
        load: Makes the engine.
        emit: Called with the result of each task, see `answer`.
        warm: Read the first prompt once before, see `warm_up`.
    """
    with load() as vlm:
        for i, task in enumerate(tasks):
            if warm and not i:
                warm_up(vlm, task)
            emit(answer(vlm, task))


def warm_up(vlm: StarVLM, task: Task) -> None:
    """Reads a task's prompt once without using it: an engine's first request allocates and pages in."""
    with contextlib.suppress(Exception):  # the task's own result says what is wrong
        vlm.read_prompt(task.prompt, list(task.sources), task.settings.prune, chat=not task.settings.raw)


def answer(vlm: StarVLM, task: Task) -> dict[str, Any]:
    """Answers one task.

    Returns:
        Plain JSON values: id, image (or images, unless there is one), prompt; and either error, or text, finish_reason,
        image_tokens (before pruning), average_tokens (per decoder layer), first_token_ms, cached_images (pictures that
        were not encoded again), reused_tokens (see PruneReport) and notes. A pruned task to be verified has verified
        too: result ("same" or "different") and the unpruned text and first_token_ms; or result "failed" and error.
    """
    s = task.settings
    verify = task.verify and s.prune is not None and bool(task.images)
    if verify and s.temperature and s.seed is None:  # both answers need the same
        s = replace(s, seed=draw_seed())
    try:
        done = _generate(vlm, task, s)
    except StarEdgeError as error:
        return failure(task, str(error))
    except Exception as error:  # one task's failure must not end the others
        return failure(task, f"{type(error).__name__}: {error}")
    report = done.report
    return {
        **_about(task),
        "text": done.text,
        "finish_reason": done.finish_reason,
        "image_tokens": report.n_image_tokens,
        "average_tokens": report.average_tokens,
        "first_token_ms": round(report.milliseconds["first_token"], 1),
        "cached_images": report.n_cached,
        "reused_tokens": report.reused_tokens,
        "notes": report.notes,
        **({"verified": _verify(vlm, task, s, done.text)} if verify else {}),
    }


def _generate(vlm: StarVLM, task: Task, s: Settings) -> Answer:
    return vlm.generate(
        task.prompt,
        list(task.sources),
        s.prune,
        s.max_tokens,
        chat=not s.raw,
        temperature=s.temperature,
        seed=s.seed,
    )


def _verify(vlm: StarVLM, task: Task, s: Settings, text: str) -> dict[str, Any]:
    """The unpruned answer beside a pruned one."""
    try:
        unpruned = _generate(vlm, task, replace(s, prune=None))
    except Exception as error:  # such as a context that the whole picture does not fit
        return {"result": "failed", "error": " ".join(str(error).split())}
    milliseconds = round(unpruned.report.milliseconds["first_token"], 1)
    return {"result": compare(text, unpruned.text), "text": unpruned.text, "first_token_ms": milliseconds}


def failure(task: Task, message: str) -> dict[str, Any]:
    """The result of a task without an answer."""
    return {**_about(task), "error": " ".join(message.split())}


def _about(task: Task) -> dict[str, Any]:
    images = {"image": task.images[0]} if len(task.images) == 1 else {"images": list(task.images)}
    return {"id": task.id, **images, "prompt": task.prompt}


# ---- results ----


@checked()
def describe_model(model: str | PathLike[str], mmproj: str | PathLike[str] | None, options: dict[str, Any]) -> str:
    """Identifies a model and its options, as in "text.gguf+mmproj.gguf#0f1e2d3c4b5a6978".

    The hash is over the files' fingerprints and the options.

    Raises:
        ConfigError: A file cannot be read.
    """
    paths = [os.fspath(path) for path in (model, mmproj) if path is not None]
    content = fingerprint([options, [fingerprint_file(path) for path in paths]])
    return f"{'+'.join(os.path.basename(path) for path in paths)}#{content}"


def open_results(path: str | PathLike[str], tasks: Sequence[Task], model: str, fresh: bool = False) -> ResultsFile:
    """The file that a batch writes its results to: one line a task, with the model and the task's key.

    Args:
        path: The file.
        tasks: The tasks of this run. Those of `done` have an answer, keys are (str(id),).
        model: See `describe_model`.
        fresh: Drop the file's content when the first result comes.

    Raises:
        ResultsFileError: See `ResultsFile`.
    """

    def another_model(found: str) -> str:
        if re.search("#[0-9a-f]{8}$", found):
            return f"{path} was written by an earlier version of star_edge, which told models and tasks apart otherwise"
        return f"{path} was made with {found}, the model and options of this run are {model}"

    def another_task(task: Task) -> Stamp:
        return Stamp(task.key, lambda _: f"{path} has task {task.id} with another image, prompt or settings")

    return ResultsFile(
        path,
        {"id": "task"},
        {("id", str(task.id)): another_task(task) for task in tasks},
        common={"model": Stamp(model, another_model)},
        fresh=fresh,
    )
