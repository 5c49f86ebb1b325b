"""Many requests to one engine: tasks, a JSON line with an answer or an error for each, and a resumable results file.

Knows the engine's public surface only. `batch_ray` hands the same tasks to several engines.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, BinaryIO

import PIL.Image

from .arguments import checked
from .engine import StarVLM
from .errors import ConfigError, ImageError, OutputError, StarEdgeError
from .io.configs import resolve_prune
from .io.images import FORMATS
from .io.json_input import parse_json, read_lines
from .io.results_file import open_alone
from .pruning.config import PruneConfig, override

_TASK_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "image": (str,),
    "images": (list,),
    "prompt": (str,),
    "preset": (str,),
    "vision_keep": (int, float),
    "decoder_keep": (int, float),
    "decoder_layer": (int,),
    "budget": (str,),
    "redundancy": (str, int, float),
    "encoder_keep": (int, float),
    "encoder_layer": (int,),
    "max_tokens": (int,),
    "temperature": (int, float),
    "seed": (int,),
    "raw": (bool,),
}
_OVERRIDES = (
    "vision_keep",
    "decoder_keep",
    "decoder_layer",
    "budget",
    "redundancy",
    "encoder_keep",
    "encoder_layer",
)
_LINE_START = b'{"id": '  # every line of a results file begins so


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
    """

    id: str | int
    images: tuple[str, ...]
    sources: tuple[str, ...]
    prompt: str
    settings: Settings

    @property
    def key(self) -> str:
        """A hash of everything that the answer depends on, except the model and the content of the image files."""
        return _hash([self.images, self.prompt, asdict(self.settings)])


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
    return [Task(path, (path,), (_locate(path, ""),), prompt, settings) for path in found]


def names_several(image: str) -> bool:
    """Whether an image argument is a folder or a pattern. A file whose name looks like a pattern is a file."""
    return not _is_url(image) and (os.path.isdir(image) or (not os.path.exists(image) and glob.has_magic(image)))


def _expand(image: str) -> list[str]:
    if not names_several(image):
        if not _is_url(image) and not os.path.exists(image):
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
def read_tasks(path: str | PathLike[str], prompt: str | None, settings: Settings) -> list[Task]:
    """Reads the tasks of a JSON Lines file. Images are not read yet.

    A line has "image" or "images" (a list), "prompt", and any of id, preset, vision_keep, decoder_keep, decoder_layer,
    budget, redundancy, encoder_keep, encoder_layer, max_tokens, temperature, seed, raw. Image paths are relative to the
    file's folder. The id defaults to a hash of the task.

    Args:
        path: The file.
        prompt: The question of tasks without one.
        settings: The settings of tasks without their own.

    Raises:
        ConfigError: The file cannot be read, or a line is not a task. The message names the line.
    """
    name = os.fspath(path)
    try:
        lines = list(read_lines(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be read ({getattr(error, 'strerror', None) or error})", "give a JSON Lines file"
        ) from error
    tasks: list[Task] = []
    line_of: dict[str, int] = {}
    for number, line in lines:
        try:
            data = parse_json(line)
        except ValueError as error:
            raise ConfigError(
                f"{name}, line {number} is not valid JSON ({error})", 'write {"image": "a.jpg", "prompt": "..."}'
            ) from error
        try:
            task = _read_task(data, os.path.dirname(name), prompt, settings)
        except ConfigError as error:
            raise ConfigError(f"{name}, line {number}: {error.cause}", error.remedy) from error
        if str(task.id) in line_of:
            raise ConfigError(
                f"{name}, line {number} repeats line {line_of[str(task.id)]}", "give each task its own id"
            )
        line_of[str(task.id)] = number
        tasks.append(task)
    if not tasks:
        raise ConfigError(f"{name} has no tasks", 'write lines such as {"image": "a.jpg", "prompt": "..."}')
    return tasks


def _read_task(data: Any, folder: str, prompt: str | None, settings: Settings) -> Task:
    if not isinstance(data, dict):
        raise ConfigError(f"a {type(data).__name__} is not a task", 'write {"image": "a.jpg", "prompt": "..."}')
    for field, value in data.items():
        if field not in _TASK_FIELDS:
            raise ConfigError(f"{field!r} is not a field of a task", f"use {', '.join(_TASK_FIELDS)}")
        kinds = _TASK_FIELDS[field]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(
                f"{field}={value!r} is a {type(value).__name__}", f"use {' or '.join(kind.__name__ for kind in kinds)}"
            )
    if "image" in data and "images" in data:
        raise ConfigError("it has both image and images", "give one of them")
    images = tuple(data.get("images", [data["image"]] if "image" in data else []))
    if not all(isinstance(image, str) for image in images):
        raise ConfigError(f"images={list(images)!r} are not all str", "use paths or URLs")
    text = data.get("prompt", prompt)
    if not text:
        raise ConfigError("it has no prompt", "give one in the line, or one for all tasks as PROMPT")
    base = resolve_prune(data["preset"]) if "preset" in data else settings.prune
    prune = override(
        base, **{name: data.get(name) for name in _OVERRIDES}
    )
    changes = {name: data[name] for name in ("max_tokens", "temperature", "seed", "raw") if name in data}
    task = Task(
        "", images, tuple(_locate(image, folder) for image in images), text, replace(settings, prune=prune, **changes)
    )
    if task.settings.max_tokens < 1 or not 0 <= task.settings.temperature < float("inf"):
        raise ConfigError(
            "max_tokens is below 1, or temperature is not a finite number >= 0",
            "use max_tokens of 1 or more, and temperature 0 (greedy) or more",
        )
    return replace(task, id=data.get("id", task.key))


def _is_url(image: str) -> bool:
    return re.match(r"data:|[a-z][a-z0-9+.-]+://", image, re.IGNORECASE) is not None


def _locate(image: str, folder: str) -> str:
    return image if _is_url(image) else os.path.abspath(os.path.join(folder, image))


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
        were not encoded again), reused_tokens (see PruneReport) and notes.
    """
    s = task.settings
    try:
        done = vlm.generate(
            task.prompt,
            list(task.sources),
            s.prune,
            s.max_tokens,
            chat=not s.raw,
            temperature=s.temperature,
            seed=s.seed,
        )
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
    }


def failure(task: Task, message: str) -> dict[str, Any]:
    """The result of a task without an answer."""
    return {**_about(task), "error": " ".join(message.split())}


def _about(task: Task) -> dict[str, Any]:
    images = {"image": task.images[0]} if len(task.images) == 1 else {"images": list(task.images)}
    return {"id": task.id, **images, "prompt": task.prompt}


# ---- results ----


@checked()
def describe_model(model: str | PathLike[str], mmproj: str | PathLike[str] | None, options: dict[str, Any]) -> str:
    """Identifies a model and its options, as in "text.gguf+mmproj.gguf#1f2e3d4c".

    The hash is over the files' sizes, their first and last MiB, and the options.

    Raises:
        ConfigError: A file cannot be read.
    """
    parts: list[Any] = [options]
    paths = [os.fspath(path) for path in (model, mmproj) if path is not None]
    for path in paths:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                for start in (0, max(0, size - (1 << 20))):
                    file.seek(start)
                    parts.append(hashlib.sha256(file.read(1 << 20)).hexdigest())
        except StarEdgeError:
            raise
        except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path} cannot be read ({reason})", "check the path of the model") from error
        parts.append(size)
    return f"{'+'.join(os.path.basename(path) for path in paths)}#{_hash(parts)[:8]}"


class Results:
    """A JSON Lines file with one result for each task. A later run goes on with it.

    A last line that was cut off is dropped. So are errors of the given tasks, which are tried again. Lines of other
    tasks stay. Each line also has the model and the task's key.

    Args:
        path: The file.
        tasks: The tasks of this run.
        model: See `describe_model`.
        fresh: Drop the file's content when the first result comes. A run that fails before leaves it.

    Attributes:
        done: Ids, as str, of the tasks that are finished.

    Raises:
        OutputError: The file has other content, or results of another model, prompt or settings; another run is writing
            it; or it cannot be written.
    """

    def __init__(self, path: str | PathLike[str], tasks: Sequence[Task], model: str, fresh: bool = False) -> None:
        self._model = model
        self._keys = {str(task.id): task.key for task in tasks}
        self.done: set[str] = set()
        self._drop = fresh
        try:
            self.path = os.path.realpath(path)  # a link stays a link when the file is replaced
            self._file = self._open(self.path)
            data = b"" if fresh else self._file.read()
            kept = self._keep(data)
            if kept != data:
                self._replace(kept)
        except StarEdgeError:
            raise
        except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{path} cannot be written ({reason})", "use an existing folder with space") from error

    def add(self, result: dict[str, Any]) -> None:
        """Writes one result, as one write."""
        line = {**result, "model": self._model, "task": self._keys[str(result["id"])]}
        try:
            if self._drop:
                self._replace(b"")
                self._drop = False
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror})", "make room, and run again: what is done stays done"
            ) from error

    def close(self) -> None:
        self._file.close()

    def _keep(self, data: bytes) -> bytes:
        """The lines that stay; fills `done`."""
        kept = []
        lines = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                result = parse_json(line)
                name, model, key = str(result["id"]), result["model"], result["task"]
            except (ValueError, KeyError, TypeError):
                # Only a line that begins like a result was cut off: the file may be something else
                if number == len(lines) and line[: len(_LINE_START)] == _LINE_START[: len(line)]:
                    continue
                raise OutputError(
                    f"{self.path}, line {number} is not a result of star-edge",
                    "use another --out, or --fresh to drop it",
                ) from None
            if name in self._keys and "error" in result:
                continue
            if model != self._model:
                raise OutputError(
                    f"{self.path} was made with {model}, the model and options of this run are {self._model}",
                    "use another --out, or --fresh to drop what it holds",
                )
            if name in self._keys:
                if key != self._keys[name]:
                    raise OutputError(
                        f"{self.path} has task {name} with another image, prompt or settings",
                        "use another --out, or --fresh to drop what it holds",
                    )
                if name in self.done:
                    continue
                self.done.add(name)
            kept.append(line + b"\n")
        return b"".join(kept)

    def _replace(self, data: bytes) -> None:
        """Replaces the file's content. A reader sees the old content or the new, never a part."""
        beside = f"{self.path}.{os.getpid()}.tmp"
        file = self._open(beside)
        try:
            file.truncate(0)
            file.write(data)
            os.fsync(file.fileno())
            os.replace(beside, self.path)
        except OSError:
            file.close()
            os.unlink(beside)
            raise
        self._file.close()
        self._file = file

    def _open(self, path: str) -> BinaryIO:
        try:
            return open_alone(path, buffering=0)  # unbuffered: a line is with the system when `add` returns
        except BlockingIOError:
            raise OutputError(
                f"{path} is being written by another run", "wait until that ends, or use another --out"
            ) from None


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
