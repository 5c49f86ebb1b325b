"""star-edge tune: the cheapest config that keeps the accuracy that is asked for, on the user's own questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .. import __version__
from ..errors import ConfigError, EvaluationError
from ..evaluation.configs import OFF
from ..evaluation.summary import summarise
from ..evaluation.tuning import candidates, split
from ..evaluation.tuning import tune as search
from .asking import QuestionOptions, asking, question_options
from .options import FilePath, Number, examples, print_json
from .tables import make_console, print_table


@click.command(
    epilog=examples(
        "star-edge tune questions.jsonl -m text.gguf --mmproj mmproj.gguf",
        "star-edge tune questions.jsonl --keep 0.98 --limit 300 -o mine.json",
    )
)
@question_options("Ask only this many questions, chosen at random.", 0, "Seed of that choice.")
@click.option(
    "--keep",
    type=Number(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Keep this share of the unpruned model's accuracy.",
)
@click.option(
    "-o",
    "--config-out",
    type=FilePath(dir_okay=False),
    default="star-edge.json",
    show_default=True,
    help="The config is written to this file.",
)
def tune(
    options: QuestionOptions,
    keep: float,
    config_out: str,
    **model: Any,
) -> None:
    """Find the cheapest config that keeps the accuracy on your own questions, and write it to a file.

    TASKS is a file of questions as for `star-edge eval`. Without answers, agreement with the unpruned model is kept.
    The file that is written can be given to --preset, and as `prune` in Python.

    Where there are enough questions, a third of the images is held out. The choice is made on the others, and its
    accuracy on the held-out ones is reported.
    """
    if not config_out.endswith(".json"):
        raise ConfigError(
            f"--config-out {config_out} does not end in .json", "name it so: --preset tells files from presets by it"
        )
    asked = options.read()
    metric = asked.metric
    choosing, reporting = split(asked.questions)
    everything = [OFF, *(config for family in candidates() for config in family)]
    with asking(options, asked, model, everything) as ask:
        best, rows = search(lambda configs: ask(choosing, configs), choosing, metric, keep)
        reported = (
            summarise(reporting, [best], ask(reporting, [OFF, best]), metric)["configs"][0] if reporting else None
        )
    if not any(row["n"] for row in rows):
        raise EvaluationError("no question could be answered", "see star-edge eval with the same file for the errors")
    chosen = next((row for row in rows if row["name"] == best.name), None)
    result = {
        "star_edge": __version__,
        "config": None if best.prune is None else best.prune.to_dict(),
        "name": best.name,
        "keep": keep,
        "measured_by": "relative_accuracy" if metric is not None else "agreement",
        "n_choosing": len(choosing),
        "on_choosing": None if chosen is None else _figures(chosen),
        "n_held_out": len(reporting),
        "on_held_out": None if reported is None else _figures(reported),
    }
    try:
        with open(config_out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise ConfigError(
            f"{config_out} cannot be written ({error.strerror})", "use an existing folder that can be written"
        ) from error
    if options.as_json:
        print_json({**result, "asked": [{"name": row["name"], **_figures(row)} for row in rows], "written": config_out})
    else:
        _print(result, rows, config_out)


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "accuracy",
        "relative_accuracy",
        "agreement",
        "interval",
        "kl",
        "average_tokens",
        "first_token_ms",
        "speed_up",
        "n_errors",
    )
    return {name: row[name] for name in names}


def _print(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: str) -> None:
    console = make_console()

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    columns = ("config", "tokens per layer", "relative accuracy, %", "same answer, %", "first token, ms", "errors")
    cells, styles = [], []
    for row in sorted(rows, key=lambda row: -(row["average_tokens"] or 0)):
        cells.append(
            [
                row["name"],
                number(row["average_tokens"]),
                share(row["relative_accuracy"]),
                share(row["agreement"]),
                number(row["first_token_ms"]),
                str(row["n_errors"] or ""),
            ]
        )
        styles.append("bold" if row["name"] == result["name"] else None)
    print_table(console, f"asked about {result['n_choosing']} questions", columns, cells, styles=styles)
    if result["config"] is None:
        console.print(f"no config keeps {100 * result['keep']:g}%: {path} says not to prune", highlight=False)
        return
    what = "relative accuracy" if result["measured_by"] == "relative_accuracy" else "agreement"
    held_out = result["on_held_out"]
    if held_out:
        value = share(held_out[result["measured_by"]])
        console.print(
            f"{result['name']}: on {result['n_held_out']} questions held out of the choice, {what} {value}%",
            highlight=False,
        )
    else:
        console.print(
            f"{result['name']}: too few questions to hold some out, so {what} is as good as it looks at best",
            highlight=False,
        )
    console.print(f"written: {path} (--preset {path}, or prune={path!r} in Python)", markup=False, highlight=False)
