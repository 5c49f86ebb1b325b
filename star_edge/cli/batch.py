"""`star-edge run` with many requests: --each and --tasks."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

from ..batch import (
    TASK_FIELDS,
    Settings,
    Task,
    describe_model,
    each_image,
    mark_every,
    names_several,
    open_results,
    read_tasks,
    run_tasks,
)
from ..errors import ConfigError, ImageError
from ..verify import Agreement
from .options import (
    AFRESH,
    LATER_OPTIONS,
    cli_words,
    complete_file,
    find_model,
    load_engine,
    open_stdin,
)

SOME_FAILED = 3  # exit status
_CAUSES = 3  # reasons of failures that are shown
# What decides where a model runs and what it prints, not what it answers
_PLACE = ("model", "mmproj", "hf_repo", "no_mmproj", "n_threads", "n_gpu_layers", "verbose")


@dataclass(frozen=True)
class BatchOptions:
    """The options of many requests, as they were typed.

    Attributes:
        each: Each image is a request.
        tasks_file: The file of tasks, "-" for stdin.
        out: The file of results. None: stdout.
        fresh: Discard what that file holds.
        use_ray: Answer on Ray.
        workers: Engines there.
        cache: Reuse what an earlier request has encoded or read.
        verify: Answer every Nth pruned request unpruned as well; None for none.
    """

    each: bool
    tasks_file: str | None
    out: str | None
    fresh: bool
    use_ray: bool
    workers: int | None
    cache: bool
    verify: int | None

    @property
    def is_wanted(self) -> bool:
        """Whether there are many requests."""
        return self.each or self.tasks_file is not None

    def check(self, images: tuple[str, ...], overlay: str | None, prompt: str | None = None) -> None:
        """Checks options against each other. A folder or a pattern needs --each: it is no single request by accident.

        Raises:
            ConfigError: Options exclude each other, or are for many requests and there is one.
            ImageError: There is no image.
        """
        if self.each and self.tasks_file is not None:
            raise ConfigError("--each and --tasks exclude each other", "the tasks name their images")
        if self.tasks_file is not None and images:
            raise ConfigError("--image and --tasks exclude each other", "the tasks name their images")
        if self.tasks_file == "-" and prompt == "-":
            raise ConfigError(
                "the prompt and --tasks both read stdin", "give the prompt as an argument, or the tasks as a file"
            )
        if self.each and not images:
            raise ImageError("--each needs images", "add --image 'FOLDER/*.jpg'")
        if self.is_wanted:
            if overlay:
                raise ConfigError("--overlay is for one request", "leave it out")
        else:
            several = next((image for image in images if names_several(image)), None)
            if several is not None:
                raise ConfigError(
                    f"--image {several} names a folder or several files",
                    "add --each to ask about each of them on its own",
                )
            for name, given in (
                ("--out", self.out),
                ("--fresh", self.fresh),
                ("--ray", self.use_ray),
                ("--no-cache", not self.cache),
                ("--verify", self.verify),
            ):
                if given:
                    raise ConfigError(f"{name} is for many requests", "add --each or --tasks FILE")
        if self.fresh and self.out is None:
            raise ConfigError(
                "--fresh discards the results of --out, and no --out was given", "add --out FILE, or leave it out"
            )
        if self.workers is not None and not self.use_ray:
            raise ConfigError("--workers is for --ray", "add --ray, or leave it out")


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of many requests; they reach the command as `batch`, a BatchOptions."""
    parameters = [
        click.option("--each", is_flag=True, help="Ask about each image in a request of its own."),
        click.option(
            "--tasks",
            "tasks_file",
            metavar="FILE|-",
            shell_complete=complete_file,
            help="Answer the requests of this file. Each line is a JSON object: image or images, prompt, and "
            "optionally id, preset, max_tokens, ... `-` reads stdin.",
        ),
        click.option(
            "--out",
            metavar="FILE",
            shell_complete=complete_file,
            help="With --each or --tasks: write results to this file, one JSON object a line. The same command, given "
            "again, goes on where it stopped. Default: stdout.",
        ),
        click.option("--fresh", is_flag=True, help="Discard the results that the file of --out holds."),
        click.option(
            "--ray",
            "use_ray",
            is_flag=True,
            help="With --each or --tasks: answer with several engines on Ray, in the cluster of RAY_ADDRESS or in "
            "one that is started here.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="With --ray: number of engines. Default: one for each GPU with -ngl, otherwise one for each machine.",
        ),
        click.option(
            "--cache/--no-cache",
            default=True,
            help="With --each or --tasks: reuse what an earlier request has encoded or read. Results say where. "
            "--no-cache makes times comparable: nothing is reused, and one request is read first, to warm up.",
        ),
        click.option(
            "--verify",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --each or --tasks: answer every Nth pruned request unpruned as well, and count how many agree.",
        ),
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> Any:
        options = BatchOptions(**{field.name: given.pop(field.name) for field in fields(BatchOptions)})
        return command(batch=options, **given)

    for parameter in reversed(parameters):
        with_options = parameter(with_options)
    return with_options


def run_batch(
    prompt: str | None,
    images: tuple[str, ...],
    settings: Settings,
    options: BatchOptions,
    model: dict[str, Any],
    quiet: bool = False,
) -> int:
    """Answers every task and returns the exit status: 0, or SOME_FAILED.

    Args:
        prompt: The question of tasks without one.
        images: Values of --image.
        settings: Settings of tasks without their own.
        options: The options of many requests.
        model: The parameters of `options.model_options`.
        quiet: No progress bar, no counts at the end.
    """
    tasks_file, out = options.tasks_file, options.out
    if tasks_file == "-":
        tasks = read_tasks(open_stdin(), prompt, settings)
    elif tasks_file is not None:
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
            describe_model(*files, {k: v for k, v in model.items() if k not in _PLACE and (k, v) not in LATER_OPTIONS}),
            options.fresh,
        )
    waiting = [task for task in tasks if results is None or (str(task.id),) not in results.done]
    waiting = mark_every(waiting, options.verify)
    progress = _Progress(
        len(tasks),
        len(tasks) - len(waiting),
        shown=not quiet and sys.stderr.isatty() and (out is not None or not sys.stdout.isatty()),
        quiet=quiet,
    )
    own_words = TASK_FIELDS if tasks_file is not None else ()

    def in_words(result: dict[str, Any]) -> dict[str, Any]:
        if "error" in result:
            return {**result, "error": cli_words(result["error"], keep=own_words)}
        return {**result, "notes": [cli_words(note, keep=own_words) for note in result.get("notes", ())]}

    def emit(result: dict[str, Any]) -> None:
        result = in_words(result)
        if results is not None:
            results.add(result)
        else:
            click.echo(json.dumps(result, allow_nan=False))
        progress.step(result)

    if waiting:
        _answer(waiting, emit, options, model)
    if results is not None:
        results.close()
    progress.end()
    return SOME_FAILED if progress.failed else 0


def _answer(tasks: list[Task], emit: Any, options: BatchOptions, model: dict[str, Any]) -> None:
    afresh = {} if options.cache else AFRESH
    if not options.use_ray:
        run_tasks(tasks, functools.partial(load_engine, **model, **afresh), emit, warm=not options.cache)
        return
    from ..batch_ray import run_on_ray

    for name in ("model", "mmproj"):  # a worker has another current folder
        if model[name] is not None:
            model = {**model, name: os.path.abspath(model[name])}
    run_on_ray(
        tasks,
        functools.partial(load_engine, **model, **afresh),
        emit,
        options.workers,
        n_threads=model["n_threads"],
        use_gpu=model["n_gpu_layers"] != 0,
        warm=not options.cache,
    )


class _Progress:
    """A bar on stderr while it is shown, and at the end how many failed and why.

    Unlike rich's bar it does not hide the cursor, which Ctrl-C would leave hidden.
    """

    def __init__(self, total: int, before: int, shown: bool, quiet: bool = False) -> None:
        self.total, self.before, self.shown, self.quiet = total, before, shown, quiet
        self.answered = self.failed = 0
        self.agreement = Agreement(1)
        self._causes: dict[str, list[str]] = {}  # errors that differ in the image's name alone
        self._start = time.monotonic()
        self._draw()

    def step(self, result: dict[str, Any]) -> None:
        if "error" in result:
            self.failed += 1
            self._causes.setdefault(_without_names(result), []).append(result["error"])
        else:
            self.answered += 1
        if "verified" in result:
            self.agreement.count(result["verified"]["result"])
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
        if not self.quiet:
            click.echo(("\r\033[K" if self.shown else "") + ", ".join(parts), err=True)
            verified = self.agreement.to_dict()
            if verified["same"] + verified["different"] + verified["failed"]:
                share = "" if verified["share"] is None else f" ({100 * verified['share']:.1f}%)"
                failed = f", {verified['failed']} not answered unpruned" if verified["failed"] else ""
                same = f"{verified['same']} the same as unpruned{share}"
                click.echo(f"verified: {same}, {verified['different']} different{failed}", err=True)
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
