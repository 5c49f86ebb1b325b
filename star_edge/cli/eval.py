"""star-edge eval: accuracy and speed of configs on questions with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, EvaluationError
from ..evaluation import plots
from ..evaluation.summary import summarise, tables
from .asking import QuestionOptions, asking, question_options
from .grid import Grid, config_options
from .options import FilePath, cli_words, examples, print_json
from .tables import make_console, print_table


@click.command(
    epilog=examples(
        "star-edge eval questions.jsonl --preset balanced --preset fast",
        "star-edge eval questions.jsonl -m text.gguf --mmproj mmproj.gguf \\",
        "    --image-max-tokens 0.5,0.25 --out results.jsonl --plot accuracy.png",
    )
)
@question_options(
    "Ask only this many questions: the first ones, or with --seed a random choice.",
    None,
    "Choose the questions of --limit at random.",
)
@config_options
@click.option(
    "--plot",
    type=FilePath(dir_okay=False),
    help="Draw accuracy against tokens and time into this file, .png or .svg. It needs matplotlib.",
)
def eval(
    options: QuestionOptions,
    grid: Grid,
    plot: str | None,
    **model: Any,
) -> None:
    """Ask questions with several configs and with the unpruned model, and compare answers and times.

    TASKS is a file with one JSON object a line: image (a path or URL), question, and optionally answer, category and
    id. Field names of POPE, LLaVA and VQA files are understood. TASKS may also be a file of TextVQA, DocVQA, ChartQA,
    OCRBench, MMBench or GQA as it is published. `-` reads JSON lines from stdin. Without answers, the score is
    agreement with the unpruned model.

    A time to the first token is a median. Configs take turns question by question. Reading image files does not
    count.
    """
    if options.seed is not None and options.limit is None:
        raise ConfigError("--seed chooses among questions, and no --limit was given", "add --limit N")
    if plot:
        plots.check(plot)
    asked = options.read()
    configs, dropped = grid.configs()
    with asking(options, asked, model, configs) as ask:
        summary = summarise(asked.questions, configs, ask(asked.questions, configs), asked.metric)
    summary["notes"] = dropped
    if not any(row["n"] for row in summary["configs"]):
        first = summary["errors"][0]
        raise EvaluationError(f"no question could be answered; question {first['task']}: {first['error']}")
    if plot:
        plots.save(summary, plot)
    if options.as_json:
        print_json(summary)
    else:
        _print(summary, [path for path in (options.out, plot) if path])


def _print(summary: dict[str, Any], written: list[str]) -> None:
    console = make_console()
    for table in tables(summary):
        print_table(console, table.title, table.header, table.rows)
    for note in summary["notes"]:
        console.print(f"note: {cli_words(note)}", markup=False, highlight=False)
    for row in summary["configs"]:
        for note, n in row["notes"].items():
            console.print(
                f"note: {row['name']}: {cli_words(note)} ({n} of {row['n']} questions)", markup=False, highlight=False
            )
    for error in summary["errors"][:3]:
        console.print(
            f"failed: question {error['task']}, {error['config']}: {cli_words(error['error'])}",
            markup=False,
            highlight=False,
        )
    if summary["n_errors"] > 3:
        console.print(f"failed: {summary['n_errors']} answers in all")
    for path in written:
        console.print(f"written: {Path(path)}", markup=False, highlight=False)
