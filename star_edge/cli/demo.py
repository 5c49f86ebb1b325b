"""star-edge demo: the shipped reference model on a real picture, stock beside pruned."""

from __future__ import annotations

import statistics
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import refvlm
from .options import (
    AFRESH,
    FilePath,
    check_picture_path,
    encoder_prune_options,
    in_cli_words,
    load_engine,
    make_config,
    print_json,
    prune_options,
    save_overlay,
)


@click.command()
@prune_options
@encoder_prune_options
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed runs of each question, stock and pruned in turn.",
)
@click.option("--overlay", type=FilePath(dir_okay=False), default="star-edge-demo.png", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def demo(
    preset: str,
    vision_keep: Any,
    vision_tolerance: float | None,
    decoder_keep: Any,
    decoder_layer: int | None,
    budget: str | None,
    image_max_tokens: Any,
    redundancy: str | float | None,
    encoder_keep: Any,
    encoder_layer: int | None,
    repeats: int,
    overlay: str,
    as_json: bool,
) -> None:
    """Ask the shipped reference model about a picture, stock beside pruned.

    Nothing is downloaded. The picture is the first of the held-out set that has a question of every family, all of
    which the unpruned model answers correctly; pruning may change that, and the table shows it.
    """
    config = make_config(
        preset,
        vision_keep,
        decoder_keep,
        decoder_layer,
        budget,
        redundancy=redundancy,
        encoder_keep=encoder_keep,
        encoder_layer=encoder_layer,
        image_max_tokens=image_max_tokens,
        vision_tolerance=vision_tolerance,
    )
    check_picture_path(overlay)
    rows: list[dict[str, Any]] = []
    with load_engine(None, None, **AFRESH) as vlm, in_cli_words():
        console = Console(stderr=True)
        for question in track(
            refvlm.demo_questions(), "asking", console=console, transient=True, disable=not console.is_terminal
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
    table = Table(title="Reference model, one picture: stock | pruned")
    for title in ("question", "truth", "answer", "first token, ms", "image tokens per layer", "KV cells"):
        table.add_column(title, justify="left" if title in ("question", "truth", "answer") else "right")

    def pair(row: dict[str, Any], key: str, form: str = "{}") -> str:
        return f"{form.format(row['stock'][key])} | {form.format(row['pruned'][key])}"

    for row in result["questions"]:
        wrong = row["pruned"]["answer"] != row["truth"]
        answers = pair(row, "answer") + (" (wrong)" if wrong else "")
        table.add_row(
            row["question"],
            row["truth"],
            answers,
            pair(row, "first_token_ms", "{:.1f}"),
            pair(row, "average_tokens", "{:.0f}"),
            pair(row, "kv_cells"),
            style="yellow" if wrong else None,
        )
    console = Console()
    console.print(table)
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
