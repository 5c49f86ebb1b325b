"""star-edge eval: accuracy and speed of configs on questions with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..errors import ConfigError, EvaluationError
from ..evaluation import plots
from ..evaluation.metrics import METRICS, choose_metric
from ..evaluation.summary import summarise, tables
from ..evaluation.tasks import FORMAT, read_tasks, sample_tasks
from .asking import asking
from .grid import config_options, grid_configs
from .options import FilePath, model_options, print_json


@click.command()
@click.argument("tasks", required=False, type=FilePath())
@model_options
@click.option("--image-root", type=FilePath(), help="Folder that image paths are relative to. Default: that of TASKS.")
@config_options
@click.option("--metric", type=click.Choice(["auto", *METRICS]), default="auto", show_default=True)
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--prompt-suffix", default="", help=r"Put after each question; \n is a new line.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Only so many questions: the first ones, or with --seed a random choice.",
)
@click.option("--seed", type=int, help="Choose the --limit questions at random.")
@click.option(
    "--out",
    type=FilePath(dir_okay=False),
    help="Append results here as they come; the same command goes on where it stopped.",
)
@click.option("--fresh", is_flag=True, help="Start --out again.")
@click.option(
    "--plot",
    type=FilePath(dir_okay=False),
    help="Draw accuracy against tokens and time, .png or .svg (needs matplotlib).",
)
@click.option("--json", "as_json", is_flag=True)
def eval(
    tasks: str | None,
    image_root: str | None,
    presets: tuple[str, ...],
    vision_keep: str | None,
    decoder_keep: str | None,
    decoder_layer: str | None,
    sets: tuple[str, ...],
    config_file: str | None,
    metric: str,
    max_tokens: int,
    prompt_suffix: str,
    limit: int | None,
    seed: int | None,
    out: str | None,
    fresh: bool,
    plot: str | None,
    as_json: bool,
    **model: Any,
) -> None:
    """Ask the questions of TASKS with several configs and the unpruned model, and compare answers and times.

    TASKS is a JSONL file: image (path or URL), question, and as far as known answer, category and id; the names of
    POPE, LLaVA and VQA files are understood. Without answers, agreement with the unpruned model is what is compared.

    Times to the first token are medians over runs that are interleaved question by question; reading image files is not
    in them.
    """
    if tasks is None:
        raise EvaluationError(
            "there are no questions", f"give a JSONL file with one object for each line, such as {FORMAT}"
        )
    if seed is not None and limit is None:
        raise ConfigError("--seed chooses among questions, and no --limit was given", "add --limit N")
    if fresh and out is None:
        raise ConfigError("--fresh has no results to start again", "add --out FILE")
    if plot:
        plots.check(plot)
    questions = read_tasks(tasks, image_root)
    metric_name = choose_metric(metric, questions)
    questions = sample_tasks(questions, limit, seed)
    configs, dropped = grid_configs(
        presets, sets, config_file, vision_keep=vision_keep, decoder_keep=decoder_keep, decoder_layer=decoder_layer
    )
    with asking(
        model,
        questions,
        configs,
        out=out,
        fresh=fresh,
        metric=metric_name,
        max_tokens=max_tokens,
        prompt_suffix=prompt_suffix,
        quiet=as_json,
    ) as ask:
        summary = summarise(questions, configs, ask(questions, configs), metric_name)
    summary["notes"] = dropped
    if not any(row["n"] for row in summary["configs"]):
        first = summary["errors"][0]
        raise EvaluationError(f"no question could be answered; the first one ({first['task']}): {first['error']}")
    if plot:
        plots.save(summary, plot)
    if as_json:
        print_json(summary)
    else:
        _print(summary, [path for path in (out, plot) if path])


def _print(summary: dict[str, Any], written: list[str]) -> None:
    console = Console()
    for table in tables(summary):
        console.print(table)
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    for row in summary["configs"]:
        for note, n in row["notes"].items():
            console.print(f"note: {row['name']}: {note} ({n} of {row['n']} questions)", markup=False, highlight=False)
    for error in summary["errors"][:3]:
        console.print(
            f"failed: question {error['task']}, {error['config']}: {error['error']}", markup=False, highlight=False
        )
    if summary["n_errors"] > 3:
        console.print(f"failed: {summary['n_errors']} answers in all")
    for path in written:
        console.print(f"written: {Path(path)}", markup=False, highlight=False)
