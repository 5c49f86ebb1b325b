"""star-edge tune: the fastest config that keeps the accuracy that is asked for, on the user's own questions."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .. import __version__
from ..benchmarking.run import machine
from ..errors import ConfigError, EvaluationError
from ..evaluation.axes import STAGES, Supported, find_axes
from ..evaluation.configs import OFF, NamedConfig
from ..evaluation.summary import summarise
from ..evaluation.trials import LEAST, Part, Parts, Trial, split
from ..evaluation.tuning import Choice, Guarded, Plan, Search, check_score, guard, plan
from ..io.questions import Question
from ..io.results_file import Record
from .asking import Asked, Asker, QuestionOptions, asking, question_options
from .options import FilePath, Number, examples, print_json, why_not_writable
from .tables import make_console, print_table

_SPARE_TIME = 1.25  # of the time that guard and report are expected to take


def _stages(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not an axis: use some of {', '.join(STAGES)}.", ctx, param)
    return names


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
    default=0.98,
    show_default=True,
    help="Keep this share of the unpruned model's accuracy.",
)
@click.option(
    "--axes",
    "stages",
    default=",".join(STAGES),
    show_default=True,
    callback=_stages,
    help="Axes that may vary. Those that the model does not support are left out.",
)
@click.option(
    "--minutes",
    type=Number(0, min_open=True),
    help="Time limit. The search stops early enough for its checks, but not before half of the time is gone, and the "
    "best config so far is taken. Default: no limit.",
)
@click.option(
    "-o",
    "--config-out",
    type=FilePath(dir_okay=False),
    default="star-edge.json",
    show_default=True,
    help="Write the config to this file.",
)
def tune(
    options: QuestionOptions,
    keep: float,
    stages: tuple[str, ...],
    minutes: float | None,
    config_out: str,
    **model: Any,
) -> None:
    """Find the fastest config that keeps the accuracy on your own questions, and write it to a file.

    TASKS is a file of questions as for `star-edge eval`. Without answers, agreement with the unpruned model is kept.
    --preset takes the file that is written, and so does `prune` in Python.

    Half of the images serve to choose. A quarter checks the choice, and can reject it. The last quarter is for the
    report alone. With few questions the report's part is left out, with fewer the check's as well. With --out, the same
    command goes on where it stopped.
    """
    _check_target(config_out)
    asked = options.read()
    parts = split(asked.questions)
    with asking(options, asked, model, [OFF]) as ask:
        run = _Run(ask, parts, asked, keep, minutes, quiet=options.as_json or options.quiet)
        supported = run.find_axes(stages, options.max_tokens)
        choice, guarded = run.search(supported)
        result = run.result(choice, guarded, supported)
    _write(result, config_out)
    if options.as_json:
        print_json({**result, "trials": [_trial(t) for t in choice.trials.values()], "written": config_out})
    else:
        _print(result, choice, guarded, config_out)


class _Run:
    """One run of the command: its clock, what it has asked, and what it says on the way."""

    def __init__(
        self, ask: Asker, parts: Parts, asked: Asked, keep: float, minutes: float | None, *, quiet: bool
    ) -> None:
        self._asker, self._parts, self._asked, self._keep = ask, parts, asked, keep
        self._start = time.monotonic()
        self._end = None if minutes is None else self._start + 60 * minutes
        self._quiet = quiet
        self._answers, self._seconds = 0, 0.0
        self._answer_seconds = 0.0

    def ask(self, questions: Sequence[Question], configs: Sequence[NamedConfig]) -> Mapping[tuple[str, str], Record]:
        """Asks, and counts answers and seconds."""
        results = self._asker.results
        new = sum(not results.done(question, config) for question in questions for config in configs)
        start = time.monotonic()
        records = self._asker(questions, configs)
        self._answers += new
        self._seconds += time.monotonic() - start
        return records

    def find_axes(self, stages: Sequence[str], max_tokens: int) -> Supported:
        """What can be varied.

        Raises:
            EvaluationError: Nothing can be varied, or no question can be answered.
        """
        supported = find_axes(self._asker.vlm, self._parts.choice, stages, max_tokens, self._asked.prompt_suffix)
        for stage, reason in supported.left_out.items():
            self._say(f"{stage} is left out: {reason}")
        if not supported.axes:
            raise EvaluationError(
                f"none of the axes can be varied: {'; '.join(supported.left_out.values())}", "see star-edge doctor"
            )
        self._answer_seconds = supported.answer_seconds
        return supported

    def search(self, supported: Supported) -> tuple[Choice, Guarded]:
        """Chooses, and checks the choice.

        Raises:
            ConfigError: The time is too short for the unpruned answers.
            EvaluationError: The unpruned model answers nothing, or nothing right.
        """
        parts, metric = self._parts, self._asked.metric
        planned = plan(supported.axes, parts, supported.answer_seconds)
        self._show(supported, planned)
        unpruned = sum(map(len, (parts.choice, parts.guard, parts.report))) * supported.answer_seconds
        if self._end is not None and unpruned > self._end - time.monotonic() and not self._asker.results.records:
            raise ConfigError(
                f"--minutes {(self._end - self._start) / 60:g} is too short: the unpruned answers alone take about "
                f"{unpruned / 60:.1f} minutes",
                "raise it, or ask fewer questions with --limit",
            )
        part = Part(self.ask, parts.choice, metric, self._keep)
        check_score(part)
        choice = Search(
            supported.axes, part, self._is_over(2 * (len(parts.guard) + len(parts.report))), self._tell
        ).run()
        checking = Part(self.ask, parts.guard, metric, self._keep) if parts.guard and choice.best else None
        guarded = guard(choice, part, checking, self._is_over(2 * len(parts.report)))
        for trial in guarded.checked:
            self._tell(trial, "checked")
        return choice, guarded

    def _is_over(self, n_answers: int) -> Any:
        """Whether there is no time left but that for so many answers."""

        def is_over() -> bool:
            if self._end is None:
                return False
            each = self._seconds / self._answers if self._answers > 20 else self._answer_seconds
            latest = self._end - _SPARE_TIME * n_answers * each
            return time.monotonic() > max(latest, (self._start + self._end) / 2)

        return is_over

    def result(self, choice: Choice, guarded: Guarded, supported: Supported) -> dict[str, Any]:
        """What the file says."""
        vlm, metric = self._asker.vlm, self._asked.metric
        best = OFF if guarded.best is None else guarded.best.config
        n_chosen = len(self._parts.choice) if guarded.best is None else guarded.best.n
        figures: dict[str, dict[str, Any] | None] = {}
        for name, questions in (
            ("choosing", self._parts.choice[:n_chosen]),
            ("guard", self._parts.guard if guarded.is_checked or guarded.best is None else []),
            ("held_out", self._parts.report),
        ):
            row = summarise(questions, [best], self.ask(questions, [OFF, best]), metric)["configs"][0]
            figures[name] = _figures(row) if questions else None
        last = next(row for row in reversed(figures.values()) if row is not None)
        return {
            "star_edge": __version__,
            "config": None if best.prune is None else best.prune.to_dict(),
            "name": best.name,
            "keep": self._keep,
            "measured_by": "relative_accuracy" if metric is not None else "agreement",
            "speed_up": last["speed_up"],
            "n_choosing": n_chosen,
            "n_guard": len(self._parts.guard),
            "n_held_out": len(self._parts.report),
            **{f"on_{name}": row for name, row in figures.items()},
            "is_checked": guarded.is_checked,
            "rejected_by_guard": [t.config.name for t in guarded.checked if t.verdict != "kept"],
            "is_complete": choice.is_complete,
            "axes": [axis.name for axis in supported.axes],
            "left_out": supported.left_out,
            "asked": {
                "answers": self._answers,
                "configs": len(choice.trials),
                "minutes": round((time.monotonic() - self._start) / 60, 1),
            },
            "model": {
                "model": os.path.basename(vlm.llama.model_path),
                "mmproj": None if vlm.encoder is None else os.path.basename(vlm.encoder.path),
                "fingerprints": self._asker.files,
            },
            "machine": machine(vlm.decoder.n_threads),
        }

    # ---- what is said on the way ----

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text, err=True)

    def _tell(self, trial: Trial, phase: str) -> None:
        share = "" if trial.kept_share is None else f", {_share(trial.kept_share)}%"
        speed = "" if trial.speed is None else f", {trial.speed:.2f} times as fast"
        about = "checked, " if phase == "checked" else ""
        self._say(f"{about}{trial.config.name}: {_VERDICTS[trial.verdict]} ({trial.n} questions{share}{speed})")

    def _show(self, supported: Supported, planned: Plan) -> None:
        parts = self._parts
        if len(parts.choice) < LEAST:
            self._say(f"{len(parts.choice)} questions are few: the choice is mostly chance, in accuracy and in time")
        for axis in supported.axes:
            self._say(f"axis {axis.name}: {len(axis.values)} values")
        said = f"{len(parts.choice)} questions for the choice"
        said += f", {len(parts.guard)} to check it" if parts.guard else ", too few for a check"
        said += f", {len(parts.report)} to report on" if parts.report else ""
        self._say(
            f"{said}; at most {planned.most_answers} answers, about {planned.minutes:.1f} minutes at "
            f"{supported.answer_seconds:.2f} s an unpruned answer"
        )


_VERDICTS = {
    "kept": "keeps enough",
    "accuracy": "loses too much",
    "time": "not faster",
    "error": "fails",
    "unfinished": "not finished",
}


def _check_target(path: str) -> None:
    if not path.endswith(".json"):
        raise ConfigError(
            f"--config-out {path} does not end in .json", "use that ending: --preset tells files from presets by it"
        )
    reason = why_not_writable(path)
    if reason:
        raise _cannot_be_written(path, reason)


def _cannot_be_written(path: str, reason: str | None) -> ConfigError:
    return ConfigError(f"{path} cannot be written ({reason})", "use an existing folder that can be written")


def _write(result: Mapping[str, Any], path: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise _cannot_be_written(path, error.strerror) from error


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


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.config.name,
        "verdict": trial.verdict,
        "n": trial.n,
        "kept_share": trial.kept_share,
        "speed_up": trial.speed,
    }


def _share(share: float | None) -> str:
    """In %, rounded down: 97.96% is not 98%."""
    return "" if share is None else f"{math.floor(1000 * share + 1e-9) / 10:.1f}"


def _print(result: Mapping[str, Any], choice: Choice, guarded: Guarded, path: str) -> None:
    console = make_console()
    columns = ("config", "result", "questions", "of the unpruned score, %", "speed-up")
    cells, styles = [], []
    for trial in sorted(choice.trials.values(), key=lambda t: t.speed or 0.0):
        cells.append(
            [
                trial.config.name,
                _VERDICTS[trial.verdict],
                str(trial.n),
                _share(trial.kept_share),
                "" if trial.speed is None else f"{trial.speed:.2f}",
            ]
        )
        styles.append("bold" if trial.config.name == result["name"] else None)
    print_table(console, "configs that were tried for the choice", columns, cells, n_left=2, styles=styles)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    for name in result["rejected_by_guard"]:
        say(f"rejected by the check: {name}")
    if not result["is_complete"]:
        say("the time was up: this is the best so far")
    if result["config"] is None:
        say(f"no config is faster and keeps {100 * result['keep']:g}%: {path} says not to prune")
        return
    say(f"{result['name']}:")
    what = "relative accuracy" if result["measured_by"] == "relative_accuracy" else "agreement"
    for name, title in (("choosing", "chosen on"), ("guard", "checked on"), ("held_out", "held out")):
        row = result[f"on_{name}"]
        if row is not None and row[result["measured_by"]] is not None:
            share = _share(row[result["measured_by"]])
            say(f"  {title} {result[f'n_{name}']} questions: {what} {share}%, {row['speed_up']:.2f} times as fast")
    if not guarded.is_checked:
        why = "the time was up" if result["n_guard"] else "there are too few questions"
        say(f"  not checked, because {why}: on other questions it may lose more")
    asked = result["asked"]
    say(f"asked {asked['answers']} times, {asked['configs']} configs, {asked['minutes']:g} minutes")
    say(f"written: {path} (--preset {path}, or prune={path!r} in Python)")
