"""star-edge run: one prompt, any number of images, an answer."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..errors import ConfigError, ImageError
from ..report import PruneReport
from .options import load_engine, make_config, model_options, print_json, prune_options, save_overlay


@click.command()
@click.argument("prompt", required=False)
@click.option("--image", "images", multiple=True, help="Image file or URL; repeat for several.")
@model_options
@prune_options
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temp", "temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--seed", type=int)
@click.option("--raw", is_flag=True, help="The prompt is used as it is, without the model's chat template.")
@click.option("--overlay", type=click.Path(dir_okay=False), help="Draw the image with dropped tokens dimmed for each stage.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and the whole report as JSON.")
def run(
    prompt: str | None, images: tuple[str, ...], preset: str, vision_keep: Any, decoder_keep: Any, decoder_layer: int | None,
    max_tokens: int, temperature: float, seed: int | None, raw: bool, overlay: str | None, as_json: bool, **model: Any,
) -> None:  # fmt: skip
    """Answer PROMPT about the images.

    PROMPT may hold <__media__> where each image belongs; without it the images stand first. `-` or no PROMPT reads stdin.
    """
    config = make_config(preset, vision_keep, decoder_keep, decoder_layer)
    if overlay and config is None:
        raise ConfigError("--overlay has nothing to show with --preset off", "use another preset or --vision-keep")
    if overlay and not images:
        raise ImageError("--overlay needs an image", "add --image FILE")
    if prompt is None or prompt == "-":
        prompt = sys.stdin.read().strip() if not sys.stdin.isatty() else ""
    if not prompt:
        raise ConfigError("there is no prompt", "give it as an argument or on stdin")
    with load_engine(**model) as vlm:
        answer = vlm.generate(
            prompt, list(images), config, max_tokens, stream=not as_json, chat=not raw, temperature=temperature, seed=seed
        )
        written = save_overlay(answer.report, list(images), overlay, vlm.image_limits) if overlay else []
        if not as_json:
            for piece in answer:
                click.echo(piece, nl=False)
            click.echo()
            click.echo(summary(answer.report), err=True)
        if as_json:
            print_json({"text": answer.text, "finish_reason": answer.finish_reason, "overlay": written, "report": answer.report.to_dict()})
        for path in written:
            click.echo(f"overlay: {path}", err=True)


def summary(report: PruneReport) -> str:
    """One line on what was pruned, and one for each note."""
    ms = report.milliseconds
    parts = [f"first token {ms['first_token']:.0f} ms"]
    if report.images:
        tokens = f"image tokens {report.n_image_tokens}"
        if report.config is not None:
            tokens += f" -> {report.n_vision_kept}"
            if report.decoder_layer is not None:
                tokens += f" -> {report.n_decoder_kept} from layer {report.decoder_layer}"
            tokens += f" (average {report.average_tokens:.1f} per layer)"
        parts += [tokens, f"encode {ms['encode']:.0f} ms"]
    parts.append(f"{report.n_kv_cells} KV cells")
    if report.n_generated > 1 and ms.get("generate"):
        parts.append(f"{1e3 * report.n_generated / ms['generate']:.1f} tokens/s")
    return "\n".join(["; ".join(parts)] + [f"note: {note}" for note in report.notes])
