"""What `star-edge eval` and `star-edge tune` share: options, the engine, the file of results and the progress bar."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import click
import llama_cpp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import __version__
from ..engine import StarVLM
from ..errors import ConfigError, EvaluationError
from ..evaluation.configs import NamedConfig
from ..evaluation.metrics import METRICS, choose_metric
from ..evaluation.published import QuestionSet, read_question_set
from ..evaluation.results import Records
from ..evaluation.runner import ask_questions
from ..io.fingerprints import fingerprint_file
from ..io.questions import FORMAT, Question, read_questions, sample_questions
from ..io.results_file import Record
from .options import AFRESH, LATER_OPTIONS, Choice, FilePath, load_engine, model_options, open_stdin, quiet_option

Ask = Callable[[Sequence[Question], Sequence[NamedConfig]], Mapping[tuple[str, str], Record]]


@dataclass(frozen=True)
class Asker:
    """ask(questions, configs), with the engine and the results behind it.

    Attributes:
        ask: See `asking`.
        vlm: The engine.
        results: The results so far.
        files: Fingerprints of the model's files, by "model" and "mmproj".
    """

    ask: Ask
    vlm: StarVLM
    results: Records
    files: dict[str, str | None]

    def __call__(
        self, questions: Sequence[Question], configs: Sequence[NamedConfig]
    ) -> Mapping[tuple[str, str], Record]:
        return self.ask(questions, configs)


@dataclass(frozen=True)
class QuestionOptions:
    """What is asked and where answers go, as it was typed.

    Attributes:
        tasks: TASKS, "-" for stdin.
        prompt_suffix: None: that of a published benchmark, or nothing.
        limit: Most questions, or None.
        seed: Of the choice among them, or None: the first ones.
        out: The file of results, or None.
        fresh: Discard what that file holds.
        quiet: No progress bar, no notes.
    """

    tasks: str
    image_root: str | None
    metric: str
    max_tokens: int
    prompt_suffix: str | None
    limit: int | None
    seed: int | None
    out: str | None
    fresh: bool
    as_json: bool
    quiet: bool

    def read(self) -> Asked:
        """The questions, with what the options and the file say of how they are asked and scored.

        Raises:
            EvaluationError: The file cannot be used, or the metric does not fit its answers.
        """
        if self.tasks == "-":  # a published file is read twice, and stdin once
            found = QuestionSet(read_questions(open_stdin(), self.image_root))
        else:
            found = read_question_set(self.tasks, self.image_root)
        labelled = any(question.answers for question in found.questions)
        name = found.metric if self.metric == "auto" and labelled else self.metric
        suffix = found.prompt_suffix if self.prompt_suffix is None else self.prompt_suffix.replace("\\n", "\n")
        return Asked(
            sample_questions(found.questions, self.limit, self.seed), choose_metric(name, found.questions), suffix
        )


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        questions: The questions, in the order in which they are asked.
        metric: Its name; None without answers.
        prompt_suffix: Text after each question.
    """

    questions: list[Question]
    metric: str | None
    prompt_suffix: str


def question_options(
    limit_help: str, seed: int | None, seed_help: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds TASKS, the options of a model, and those of how questions are asked.

    The last reach the command as `options`, a QuestionOptions.

    Args:
        limit_help: Says what --limit does.
        seed: Default of --seed.
        seed_help: Says what --seed does.
    """
    parameters = [
        click.argument("tasks", required=False, type=FilePath()),
        model_options,
        click.option(
            "--image-root",
            type=FilePath(),
            help="Folder that image paths are relative to. Default: the folder of TASKS.",
        ),
        click.option(
            "--metric",
            type=Choice(["auto", *METRICS]),
            metavar="NAME",
            default="auto",
            show_default=True,
            help=f"How answers are scored: {', '.join(['auto', *METRICS])}. auto takes the one that fits the answers.",
        ),
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Most tokens of an answer.",
        ),
        click.option(
            "--prompt-suffix",
            help=r"Text after each question; \n is a new line. Default: nothing, and for a published benchmark the "
            "text that LLaVA-1.5 was asked with.",
        ),
        click.option("--limit", type=click.IntRange(min=1), help=limit_help),
        click.option("--seed", type=int, default=seed, show_default=True, help=seed_help),
        click.option(
            "--out",
            type=FilePath(dir_okay=False),
            help="Append each result to this file. The same command, given again, goes on where it stopped.",
        ),
        click.option("--fresh", is_flag=True, help="Discard the results that the file of --out holds."),
        click.option("--json", "as_json", is_flag=True, help="Print one line of JSON in place of tables."),
        quiet_option,
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_options(**given: Any) -> Any:
            options = QuestionOptions(**{field.name: given.pop(field.name) for field in fields(QuestionOptions)})
            if options.tasks is None:
                raise EvaluationError(
                    "TASKS is missing", f"give a file of questions, one JSON object a line, such as {FORMAT}"
                )
            if options.fresh and options.out is None:
                raise ConfigError(
                    "--fresh discards the results of --out, and no --out was given", "add --out FILE, or leave it out"
                )
            return command(options=options, **given)

        for parameter in reversed(parameters):
            with_options = parameter(with_options)
        return with_options

    return decorate


@contextmanager
def asking(
    options: QuestionOptions,
    asked: Asked,
    model: dict[str, Any],
    configs: Sequence[NamedConfig],
) -> Iterator[Asker]:
    """Yields an Asker. It answers what the file of results does not have, and returns all records.

    On a terminal a progress bar shows how far it is, unless --quiet or --json is given.

    Args:
        options: The options.
        asked: What `options.read` gave.
        model: The parameters of `options.model_options`.
        configs: Some configs that may be asked. Others can follow.

    Raises:
        EvaluationError: As `Records`.
        StarEdgeError: As `load_engine`.
    """
    settings = {
        name: value for name, value in model.items() if name not in _FILES and (name, value) not in LATER_OPTIONS
    }
    header = {
        "star_edge": __version__,
        "llama_cpp_python": llama_cpp.__version__,
        "metric": asked.metric,
        "max_tokens": options.max_tokens,
    }
    header |= {"prompt_suffix": asked.prompt_suffix, **settings}
    console = Console(stderr=True)
    with load_engine(**model, **AFRESH) as vlm:
        text_model = vlm.llama.model_path
        mmproj = vlm.encoder.path if vlm.encoder is not None else None
        files = {"model": fingerprint_file(text_model), "mmproj": fingerprint_file(mmproj) if mmproj else None}
        with Records(options.out, {**files, **header}, asked.questions, configs, options.fresh) as results:
            progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                disable=options.as_json or options.quiet or not console.is_terminal,
            )

            def ask(questions: Sequence[Question], configs: Sequence[NamedConfig]) -> Mapping[tuple[str, str], Record]:
                results.expect(configs)
                bar = progress.add_task("asking", total=len(questions) * len(configs))
                ask_questions(
                    vlm,
                    questions,
                    configs,
                    results,
                    metric=asked.metric,
                    max_tokens=options.max_tokens,
                    prompt_suffix=asked.prompt_suffix,
                    progress=lambda n: progress.advance(bar, n),
                )
                progress.remove_task(bar)
                return results.records

            with progress:
                console.show_cursor(
                    True
                )  # rich hides it, and Ctrl-C, which ends the process where it stands, would leave it so
                yield Asker(ask, vlm, results, files)


# Their content is in the header, as fingerprints
_FILES = ("model", "mmproj", "hf_repo", "no_mmproj", "verbose")
