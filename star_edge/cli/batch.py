"""star-edge run for many requests: --each and --tasks."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from typing import Any

import click

from ..batch import Settings, Task, describe_model, each_image, open_results, read_tasks, run_tasks
from ..errors import ConfigError
from .options import AFRESH, find_model, load_engine

SOME_FAILED = 3  # exit status
_CAUSES = 3  # reasons of failures that are shown
# What decides where a model runs and what it prints, not what it answers
_PLACE = ("model", "mmproj", "hf_repo", "no_mmproj", "n_threads", "n_gpu_layers", "verbose")


def run_batch(
    prompt: str | None,
    images: tuple[str, ...],
    tasks_file: str | None,
    settings: Settings,
    out: str | None,
    fresh: bool,
    use_ray: bool,
    workers: int | None,
    cache: bool,
    model: dict[str, Any],
) -> int:
    """Answers every task and returns the exit status: 0, or SOME_FAILED."""
    if tasks_file is not None:
        if out is not None and os.path.exists(out) and os.path.exists(tasks_file) and os.path.samefile(out, tasks_file):
            raise ConfigError(f"--out {out} is the file of tasks", "write the results to another file")
        tasks = read_tasks(tasks_file, prompt, settings)
    else:
        assert prompt is not None  # `run` has asked for it
        tasks = each_image(images, prompt, settings)
    files = find_model(**{name: model[name] for name in ("model", "mmproj", "hf_repo", "no_mmproj")})
    results = None
    if out is not None:
        results = open_results(
            out,
            tasks,
            describe_model(
                *files, {k: v for k, v in model.items() if k not in _PLACE and (k, v) != ("chat_template", None)}
            ),
            fresh,
        )
    waiting = [task for task in tasks if results is None or (str(task.id),) not in results.done]
    progress = _Progress(
        len(tasks),
        len(tasks) - len(waiting),
        shown=sys.stderr.isatty() and (out is not None or not sys.stdout.isatty()),
    )

    def emit(result: dict[str, Any]) -> None:
        if results is not None:
            results.add(result)
        else:
            click.echo(json.dumps(result, allow_nan=False))
        progress.step(result)

    if waiting:
        _answer(waiting, emit, use_ray, workers, cache, model)
    if results is not None:
        results.close()
    progress.end()
    return SOME_FAILED if progress.failed else 0


def _answer(
    tasks: list[Task], emit: Any, use_ray: bool, workers: int | None, cache: bool, model: dict[str, Any]
) -> None:
    afresh = {} if cache else AFRESH
    if not use_ray:
        run_tasks(tasks, functools.partial(load_engine, **model, **afresh), emit, warm=not cache)
        return
    from ..batch_ray import run_on_ray

    for name in ("model", "mmproj"):  # a worker has another current folder
        if model[name] is not None:
            model = {**model, name: os.path.abspath(model[name])}
    run_on_ray(
        tasks,
        functools.partial(load_engine, **model, **afresh),
        emit,
        workers,
        n_threads=model["n_threads"],
        use_gpu=model["n_gpu_layers"] != 0,
        warm=not cache,
    )


class _Progress:
    """A bar on stderr while it is shown, and a line at the end. Unlike rich's it does not hide the cursor, which Ctrl-C
    would leave hidden.
    """

    def __init__(self, total: int, before: int, shown: bool) -> None:
        self.total, self.before, self.shown = total, before, shown
        self.answered = self.failed = 0
        self._causes: dict[str, list[str]] = {}  # errors that differ in the image's name alone
        self._start = time.monotonic()
        self._draw()

    def step(self, result: dict[str, Any]) -> None:
        if "error" in result:
            self.failed += 1
            self._causes.setdefault(_without_names(result), []).append(result["error"])
        else:
            self.answered += 1
        self._draw()

    def _draw(self) -> None:
        if not self.shown:
            return
        now = self.answered + self.failed
        bar = "#" * (30 * (self.before + now) // self.total)
        left = (time.monotonic() - self._start) * (self.total - self.before - now) / now if now else 0
        rest = f", {left / 60:.0f} min left" if left >= 90 else f", {left:.0f} s left" if now else ""
        text = (
            f"[{bar:30}] {self.before + now} of {self.total}"
            + (f", {self.failed} failed" if self.failed else "")
            + rest
        )
        click.echo(f"\r\033[K{text}", nl=False, err=True)

    def end(self) -> None:
        parts = [f"{self.answered} answered"]
        parts += [f"{self.before} done before"] if self.before else []
        parts += [f"{self.failed} failed"] if self.failed else []
        click.echo(("\r\033[K" if self.shown else "") + ", ".join(parts), err=True)
        causes = sorted(self._causes.values(), key=len, reverse=True)
        for errors in causes[:_CAUSES]:
            click.echo(
                f"failed ({len(errors)}): {_shorten(errors[0])}" + (" (the first of them)" if len(errors) > 1 else ""),
                err=True,
            )
        if len(causes) > _CAUSES:
            click.echo(
                f"failed ({sum(map(len, causes[_CAUSES:]))}): for {len(causes) - _CAUSES} other reasons, see the "
                "results",
                err=True,
            )


def _without_names(result: dict[str, Any]) -> str:
    error: str = result["error"]
    for image in result.get("images", [result["image"]] if "image" in result else []):
        name = os.path.basename(str(image))
        if name:
            error = re.sub(rf"\S*{re.escape(name)}", "IMAGE", error)
    return error


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
