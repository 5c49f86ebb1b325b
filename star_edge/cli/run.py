"""star-edge run: one prompt, any number of images, an answer; or a batch of such requests."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..batch import Settings
from ..errors import ConfigError, ImageError
from ..io.images import ImageLimits
from ..io.json_input import MAX_CHARACTERS
from ..io.video import MAX_FRAMES, Video
from ..report import PruneReport
from .batch import SOME_FAILED, BatchOptions, batch_options, run_batch
from .options import (
    FilePath,
    Number,
    check_picture_path,
    cli_words,
    complete_file,
    examples,
    in_cli_words,
    load_engine,
    model_options,
    print_json,
    quiet_option,
    report_json,
    save_overlay,
)
from .pruning import Pruning, prune_options
from .sampling import Sampling, sampling_options
from .waiting import Waiting


@click.command(
    epilog=examples(
        'star-edge run -m text.gguf --mmproj mmproj.gguf --image a.jpg "What is it?"',
        "star-edge run --image 'photos/*.jpg' --each --out out.jsonl \"How many?\"",
    )
)
@click.argument("prompt", required=False)
@click.option(
    "--image",
    "images",
    multiple=True,
    shell_complete=complete_file,
    help="Image file or URL, or - for stdin; repeat for several in one request. With --each also a folder or a quoted "
    "pattern.",
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    help="Video file, animated GIF, WebP or PNG, or folder of pictures; after the images. Video files need PyAV.",
)
@click.option(
    "--frames",
    type=click.IntRange(1, MAX_FRAMES),
    help="Most frames of a video. Default: 8, or all that --fps asks for.",
)
@click.option("--fps", type=Number(min=0, max=1000, min_open=True), help="Frames of a video for each second of it.")
@batch_options
@model_options
@prune_options
@sampling_options
@click.option("--raw", is_flag=True, help="The prompt is used as it is, without the model's chat template.")
@click.option(
    "--overlay", type=FilePath(dir_okay=False), help="Draw the image with dropped tokens dimmed for each stage."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer and the report as one line of JSON.")
@quiet_option
@click.option("--kept", is_flag=True, help="With --json: add which tokens are kept, and their scores.")
def run(
    prompt: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    frames: int | None,
    fps: float | None,
    batch: BatchOptions,
    pruning: Pruning,
    sampling: Sampling,
    raw: bool,
    overlay: str | None,
    as_json: bool,
    kept: bool,
    quiet: bool,
    **model: Any,
) -> int:
    """Answer PROMPT about the images.

    PROMPT may hold <__media__> where each image belongs; without it the images stand first. `-` or no PROMPT reads
    stdin.

    With --each or --tasks there is one line of JSON for each request. The exit status is 3 when some of them failed, or
    when the answer is there and an overlay could not be drawn.
    """
    config = pruning.config()
    batch.check(images, overlay, prompt)
    if batch.each and pruning.budget == "prompt":
        raise ConfigError(
            "--budget prompt is for several images of one request, and --each makes a request of each",
            "leave out one of them",
        )
    if overlay and config is None:
        raise ConfigError("--overlay has nothing to show with --preset off", "use another preset or --vision-keep")
    if videos and batch.is_wanted:
        raise ConfigError("--video is for one request, and --each and --tasks make several", "leave out one of them")
    if not videos and (frames is not None or fps is not None):
        raise ConfigError("--frames and --fps are for videos", "add --video FILE")
    if overlay and not (images or videos):
        raise ImageError("--overlay needs an image", "add --image FILE or --video FILE")
    if overlay:
        check_picture_path(overlay)
    options = sampling.options()
    if batch.is_wanted:
        sampling.check_batch()
    if raw and sampling.system is not None:
        raise ConfigError("--system needs the chat template, and --raw leaves it out", "leave out one of them")
    sources = [*_read_images(images, prompt, batch), *(Video(path, frames, fps) for path in videos)]
    if prompt == "-" or (prompt is None and batch.tasks_file is None):
        prompt = _read_stdin()
    if not prompt and batch.tasks_file is None:
        raise ConfigError("there is no prompt", "give it as an argument or on stdin")
    if batch.is_wanted:
        return run_batch(
            prompt,
            images,
            Settings(config, sampling.max_tokens, sampling.temperature, sampling.seed, raw),
            batch,
            model,
            quiet,
        )
    assert prompt is not None  # only tasks do without
    waiting = Waiting(quiet)
    with waiting:
        waiting.say("loading the model")
        vlm = load_engine(**model)
    with vlm:
        with waiting, in_cli_words():
            limits: dict[str, Any] = {"max_tokens": sampling.max_tokens, "progress": waiting.tell, **options}
            if sampling.system is None:
                answer = vlm.generate(prompt, sources, config, stream=True, chat=not raw, **limits)
            else:
                messages = [{"role": "system", "content": sampling.system}, {"role": "user", "content": prompt}]
                answer = vlm.chat(messages, sources, config, stream=True, **limits)
        for piece in answer:
            if not as_json:
                click.echo(piece, nl=False)
        if not as_json:
            click.echo()
        if not as_json and not quiet:
            click.echo(summary(answer.report), err=True)
        written, problems = save_overlay(answer.report, sources, overlay, vlm.image_limits) if overlay else ([], [])
        if as_json:
            print_json(
                {
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "overlay": written,
                    "report": report_json(answer.report, kept),
                }
            )
        for path in () if quiet else written:
            click.echo(f"overlay: {path}", err=True)
        for problem in problems:
            click.echo(f"no overlay of {problem}", err=True)
    return SOME_FAILED if problems else 0


def _read_images(images: tuple[str, ...], prompt: str | None, batch: BatchOptions) -> list[Any]:
    """Sources of the images. - is the image on stdin."""
    if "-" not in images:
        return list(images)
    if batch.is_wanted:
        raise ConfigError("--image - is for one request, and --each makes several", "give files")
    if images.count("-") > 1:
        raise ConfigError("--image - was given twice, and stdin holds one image", "give files")
    if prompt is None or prompt == "-":
        raise ConfigError(
            "--image - reads the image from stdin, and so does the prompt", "give the prompt as an argument"
        )
    if sys.stdin.isatty():
        raise ImageError("--image - has no image: stdin is a terminal", "pipe an image file into it")
    data = sys.stdin.buffer.read(ImageLimits().max_bytes + 1)
    return [data if image == "-" else image for image in images]


def _read_stdin() -> str:
    if sys.stdin.isatty():
        return ""
    try:
        text = sys.stdin.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError("the prompt on stdin is not UTF-8 text", "convert it") from error
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"the prompt on stdin has more than {MAX_CHARACTERS} characters", "give a shorter one")
    return text.strip()


def summary(report: PruneReport) -> str:
    """One line on what was pruned, and one for each note."""
    ms = report.milliseconds
    parts = [f"first token {ms['first_token']:.0f} ms"]
    if report.images:
        smaller = report.full_tokens and report.n_full_tokens is not None
        tokens = f"image tokens {report.n_full_tokens} -> " if smaller else "image tokens "
        tokens += str(report.n_image_tokens)
        if report.config is not None:
            if report.n_redundant:
                tokens += f" -> {report.n_image_tokens - report.n_redundant} into the encoder"
            if report.encoder_layer is not None:
                tokens += f" -> {report.n_encoder_kept} from its layer {report.encoder_layer}"
            tokens += f" -> {report.n_vision_kept}"
            if report.decoder_layer is not None:
                tokens += f" -> {report.n_decoder_kept} from layer {report.decoder_layer}"
            tokens += f" (average {report.average_tokens:.1f} per layer)"
        cached = f", {report.n_cached} of {len(report.pictures)} from the cache" if report.n_cached else ""
        parts += [tokens, f"encode {ms['encode']:.0f} ms{cached}"]
    parts.append(f"{report.n_kv_cells} KV cells (an n_ctx of {report.n_ctx_needed} is enough)")
    if report.tokens_per_s is not None:
        parts.append(f"{report.tokens_per_s:.1f} tokens/s")
    return "\n".join(["; ".join(parts)] + [f"note: {cli_words(note)}" for note in report.notes])
