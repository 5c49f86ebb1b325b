"""star-edge demo: the shipped reference model on a real picture, stock beside pruned."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from .. import refvlm
from .options import (
    AFRESH,
    FilePath,
    check_picture_path,
    examples,
    load_engine,
    print_json,
    quiet_option,
    save_overlay,
)
from .pruning import Pruning, prune_options
from .tables import make_console, print_table


@click.command(epilog=examples("star-edge demo", "star-edge demo --preset fast --overlay kept.png"))
@prune_options
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed runs of each question, stock and pruned in turn.",
)
@click.option(
    "--overlay",
    type=FilePath(dir_okay=False),
    default="star-edge-demo.png",
    show_default=True,
    help="The picture with dropped tokens dimmed is written to this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON in place of the table.")
@quiet_option
def demo(
    pruning: Pruning,
    repeats: int,
    overlay: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Ask the shipped reference model about a picture, stock beside pruned.

    Nothing is downloaded. The picture is the first of the held-out set that has a question of every family, all of
    which the unpruned model answers correctly; pruning may change that, and the table shows it.
    """
    config = pruning.config()
    check_picture_path(overlay)
    rows: list[dict[str, Any]] = []
    with load_engine(None, None, **AFRESH) as vlm:
        console = Console(stderr=True)
        for question in track(
            refvlm.demo_questions(),
            "asking",
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        ):
            times: dict[str, list[float]] = {"stock": [], "pruned": []}
            row: dict[str, Any] = {"question": question["question"], "truth": question["answer"]}
            for repeat in range(repeats + 1):  # the first is a warm-up
                sides = (("stock", None), ("pruned", config))
                for name, prune in sides[:: -1 if repeat % 2 else 1]:  # neither always follows the other
                    answer = vlm.generate(question["question"], refvlm.DEMO_IMAGE, prune, max_tokens=8)
                    if repeat:
                        times[name].append(answer.report.milliseconds["first_token"])
                    row[name] = {
                        "answer": answer.text.strip(),
                        "average_tokens": answer.report.average_tokens,
                        "kv_cells": answer.report.n_kv_cells,
                        "first_token_ms": statistics.median(times[name]) if times[name] else None,
                    }
                    if name == "pruned":
                        report = answer.report
            rows.append(row)
        if config is None:
            written: list[str] = []
        else:
            written, problems = save_overlay(report, [refvlm.DEMO_IMAGE], overlay, vlm.image_limits)
            for problem in problems:
                click.echo(f"no overlay of {problem}", err=True)
    medians = {name: statistics.median(r[name]["first_token_ms"] for r in rows) for name in ("stock", "pruned")}
    right = {name: sum(r[name]["answer"] == r["truth"] for r in rows) for name in ("stock", "pruned")}
    result = {
        "model": "refvlm",
        "image": str(refvlm.DEMO_IMAGE),
        "overlay": written,
        "questions": rows,
        "n_right": right,
        "first_token_ms": medians,
        "speed_up": medians["stock"] / medians["pruned"],
        "token_layer_ratio": report.token_layer_ratio,
    }
    if as_json:
        print_json(result)
        return
    _print(result)


def _print(result: dict[str, Any]) -> None:
    def pair(row: dict[str, Any], key: str, form: str = "{}") -> str:
        return f"{form.format(row['stock'][key])} | {form.format(row['pruned'][key])}"

    rows, styles = [], []
    for row in result["questions"]:
        wrong = row["pruned"]["answer"] != row["truth"]
        answers = pair(row, "answer") + (" (wrong)" if wrong else "")
        times, tokens = pair(row, "first_token_ms", "{:.1f}"), pair(row, "average_tokens", "{:.0f}")
        rows.append([row["question"], row["truth"], answers, times, tokens, pair(row, "kv_cells")])
        styles.append("yellow" if wrong else None)
    console = make_console()
    print_table(
        console,
        "Reference model, one picture: stock | pruned",
        ["question", "truth", "answer", "first token, ms", "image tokens per layer", "KV cells"],
        rows,
        n_left=3,
        styles=styles,
    )
    n = len(result["questions"])
    console.print(
        f"Right: stock {result['n_right']['stock']} of {n}, pruned {result['n_right']['pruned']} of {n}. First token "
        f"(median, image encoding included): {result['first_token_ms']['stock']:.1f} ms stock, "
        f"{result['first_token_ms']['pruned']:.1f} ms pruned, {result['speed_up']:.2f}x; the decoder alone computes "
        f"{result['token_layer_ratio']:.1f}x fewer token-layers."
    )
    console.print(
        "This model is tiny, so encoding the image and fixed costs weigh more than in a real one: `make bench` "
        "measures a 1.1B decoder."
    )
    for path in result["overlay"]:
        console.print(f"Kept tokens for the last question: {path}")
    click.echo(_next_steps())  # not by the console, which would break a long path into lines


def program() -> str:
    """How this command is called from any folder: by name where the shell finds it, else by its path. `make demo` puts
    it where no shell looks.
    """
    own = Path(sysconfig.get_path("scripts"), "star-edge.exe" if os.name == "nt" else "star-edge")
    found = shutil.which("star-edge")
    if found and own.exists() and os.path.samefile(found, own):
        return "star-edge"
    words = [str(own)] if own.exists() else [sys.executable, "-m", "star_edge"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _next_steps() -> str:
    call, picture = program(), shlex.quote(str(refvlm.DEMO_IMAGE))
    return "\n".join(
        (
            "",
            "Next, with a model of yours (docs/first-steps.md goes on from here):",
            f'  {call} run -m text.gguf --mmproj mmproj.gguf --image receipt.png "What is the total?"',
            f"  {call} serve -m text.gguf --mmproj mmproj.gguf",
            "Or with this small one, and any of the questions above:",
            f'  {call} run --image {picture} "what digit is green?"',
        )
    )
