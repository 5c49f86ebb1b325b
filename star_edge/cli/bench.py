"""star-edge bench: time and memory of stock llama.cpp and of configs, on your model or a random one of a real shape."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import refvlm
from ..benchmarking import plots
from ..benchmarking.run import BASELINES, make_request, run, shape_context, shape_request
from ..benchmarking.summary import tables
from ..errors import ConfigError, OutputError
from ..evaluation.configs import NamedConfig
from ..io.images import load_image
from ..options import EncoderOptions
from ..synthetic import DEFAULT_PICTURE, PICTURE_TITLES, PICTURES, SHAPES, model_files
from .grid import Grid, config_options
from .options import (
    Choice,
    FilePath,
    Number,
    cli_words,
    examples,
    find_model,
    fit_reference_model,
    model_options,
    parse_size,
    print_json,
    quiet_option,
    why_not_writable,
)
from .tables import make_console, print_table

_QUESTION = "Describe this picture in detail."


@click.command(
    epilog=examples(
        "star-edge bench -m text.gguf --mmproj mmproj.gguf --preset balanced",
        "star-edge bench --shape llava-1.1b --out bench.json --plot bench.png",
    )
)
@model_options
@click.option(
    "--shape",
    type=Choice(list(SHAPES)),
    metavar="NAME",
    help=f"A random model of a real shape, made on the spot, in place of -m: {', '.join(SHAPES)}.",
)
@click.option(
    "--folder",
    type=FilePath(file_okay=False),
    help="Where --shape keeps its model for the next time. Default: it is removed.",
)
@click.option(
    "--image",
    "images",
    type=FilePath(),
    multiple=True,
    help="Picture to ask about; repeat for several. Default: a generated one.",
)
@click.option(
    "--image-size", default="672x672", show_default=True, help="WIDTHxHEIGHT of the generated picture, with -m."
)
@click.option(
    "--picture",
    type=click.Choice(list(PICTURES)),
    default=DEFAULT_PICTURE,
    show_default=True,
    help="What the generated picture is like. Leaving out redundant tokens depends on it.",
)
@click.option("--prompt", default=_QUESTION, show_default=True, help="Question after the picture, with -m.")
@config_options
@click.option(
    "--baseline",
    "baselines",
    type=Choice([*BASELINES, "none"]),
    metavar="NAME",
    multiple=True,
    help=f"Stock side to measure: {', '.join(BASELINES)}, or none. Repeat for several. Default: all.",
)
@click.option(
    "--unpruned/--no-unpruned", default=True, show_default=True, help="Measure star_edge without pruning too."
)
@click.option(
    "--fewer-tokens",
    type=Number(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=(0.25,),
    show_default=True,
    help="Share of the image tokens for the baseline 'fewer': by image_max_tokens and a smaller picture. Repeat for "
    "several such sides.",
)
@click.option(
    "-r",
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Requests of each side, after one to warm up.",
)
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=2), default=17, show_default=True, help="Tokens that each answer has."
)
@click.option(
    "--idle-hook",
    type=click.IntRange(min=0),
    default=0,
    metavar="TOKENS",
    help="Also time this many tokens with and without the hook.",
)
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Peak memory of each side, in a process of its own."
)
@click.option(
    "--out",
    type=FilePath(dir_okay=False),
    help="Write the result here as JSON. After each repeat it holds what there is so far.",
)
@click.option(
    "--plot", type=FilePath(dir_okay=False), help="Draw bars and a waterfall, .png or .svg (needs matplotlib)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON in place of tables.")
@quiet_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    shape: str | None,
    folder: str | None,
    images: tuple[str, ...],
    image_size: str,
    prompt: str,
    grid: Grid,
    baselines: tuple[str, ...],
    unpruned: bool,
    fewer_tokens: tuple[float, ...],
    picture: str,
    repeats: int,
    max_tokens: int,
    idle_hook: int,
    memory: bool,
    out: str | None,
    plot: str | None,
    as_json: bool,
    quiet: bool,
    **model: Any,
) -> None:
    """Measure the time to the first token, decoding speed and memory of stock llama-cpp-python and of several configs.

    All sides answer one request through Llama.create_chat_completion, with one copy of the weights, and take turns. A
    time is the median of the repeats. Stages are those of the median repeat. "ideal" is the speed-up that the saved
    token-layers would allow.
    """

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT

    if shape is not None:
        for name, flag in (
            ("model", "-m"),
            ("mmproj", "--mmproj"),
            ("hf_repo", "-hf"),
            ("images", "--image"),
            ("image_size", "--image-size"),
            ("prompt", "--prompt"),
        ):
            if given(name):
                raise ConfigError(
                    f"{flag} cannot be used with --shape, which defines model and request",
                    f"leave out --shape or {flag}",
                )
    elif folder is not None:
        raise ConfigError(
            "--folder keeps the model of a --shape, and none was named", "add --shape NAME, or leave it out"
        )
    for name, flag in (("image_size", "--image-size"), ("picture", "--picture")):
        if images and given(name):
            raise ConfigError(f"{flag} is for a generated picture, and --image names one", "leave out one of them")
    fewer = tuple(dict.fromkeys(fewer_tokens))
    size = parse_size(image_size)
    if "none" in baselines and len(baselines) > 1:
        raise ConfigError("--baseline none excludes other baselines", "leave out one of them")
    for path in (out, plot):
        reason = why_not_writable(path) if path else ""
        if reason:
            raise OutputError(f"{path} cannot be written ({reason})", "use an existing folder that can be written")
    if plot:
        plots.check(plot)
    configs, dropped = grid.configs()
    configs = [config for config in configs if unpruned or config.prune is not None]
    if shape is not None:
        # Embeddings of random weights say nothing about how many tokens a picture needs
        fixed = [_without_tolerance(config) for config in configs]
        if configs != fixed:
            configs = fixed
            dropped.append("random weights: vision_keep and encoder_keep are what stays, without a tolerance")
    if not configs:
        raise ConfigError("--no-unpruned leaves nothing of star_edge to measure", "add --preset NAME, or leave it out")
    names = () if "none" in baselines else baselines or tuple(BASELINES)
    is_converted = model["mmproj_type"] != EncoderOptions.mmproj_type
    if "converted" in baselines and not is_converted:
        raise ConfigError(
            "--baseline converted is stock with a converted mmproj file, and none is asked for",
            "add --mmproj-type, or leave it out",
        )
    names = tuple(name for name in names if name != "converted" or is_converted)
    options = {name: value for name, value in model.items() if name not in ("model", "mmproj", "hf_repo", "no_mmproj")}
    if shape is not None:
        about = SHAPES[shape]
        if not given("n_ctx"):
            options["n_ctx"] = shape_context(about, max(max_tokens, idle_hook + idle_hook // 4 + 4))
        request, title = shape_request(about, fewer, picture), f"{about.about}, random weights, {about.dtype}"
        if picture != DEFAULT_PICTURE:
            title += f", {PICTURE_TITLES[picture]}"
    else:
        text, mmproj = find_model(model["model"], model["mmproj"], model["hf_repo"], model["no_mmproj"])
        if mmproj is None:
            raise ConfigError("a benchmark asks about a picture, and no mmproj was given", "add --mmproj FILE")
        if fit_reference_model(text, options):
            is_generated = given("image_size") or given("picture")
            images = images or (() if is_generated else (str(refvlm.DEMO_IMAGE),))
        pictures = [load_image(source) for source in images] or [PICTURES[picture](*size)]
        request, title = make_request(pictures, "", prompt, fewer), Path(text).name

    def save(result: dict[str, Any], is_final: bool = False) -> None:
        result["command"] = shlex.join(["star-edge", *sys.argv[1:]])
        result["shape"] = shape
        result["notes"] += [note for note in dropped if note not in result["notes"]]
        path = Path(out or "")
        is_special = path.is_symlink() or (
            path.exists() and not path.is_file()
        )  # such as /dev/stdout: written once, and not replaced
        if out and (is_final or not is_special):
            try:
                part = path if is_special else Path(f"{out}.part")
                part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
                if not is_special:
                    part.replace(path)  # a killed command leaves the old file or the new one, never half a file
            except OSError as error:
                raise OutputError(f"{out} cannot be written ({error.strerror})", "use another place") from error

    console = Console(stderr=True)
    with ExitStack() as stack:
        if shape is not None:
            text, mmproj = stack.enter_context(
                model_files(SHAPES[shape], folder or stack.enter_context(_temporary_folder()))
            )
        n_stock = sum(len(fewer) if name == "fewer" else 1 for name in names)
        total = (n_stock + len(configs)) * (1 + repeats + memory) + bool(idle_hook)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=as_json or quiet or not console.is_terminal,
        )
        with bar:
            console.show_cursor(True)  # Ctrl-C ends the process at once, and would leave it hidden
            task = bar.add_task("loading", total=total)
            n_done = itertools.count(1)

            def progress(what: str) -> None:
                if bar.disable and not as_json and not quiet:  # in a log, a line for each request
                    console.print(f"{next(n_done)} of {total}: {what}", highlight=False)
                bar.update(task, advance=1, description=what)

            assert mmproj is not None
            result = run(
                text,
                mmproj,
                options,
                configs,
                names,
                request,
                fewer=fewer,
                repeats=repeats,
                n_generate=max_tokens,
                hook_tokens=idle_hook,
                with_memory=memory,
                title=title,
                progress=progress,
                save=save,
            )
    save(result, is_final=True)
    if plot:
        plots.save(result, plot)
    if as_json:
        print_json(result)
    else:
        _print(result, [path for path in (out, plot) if path])


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A temporary folder that is also removed on Ctrl-C or SIGTERM, at which `main` lets the process end at once."""
    with tempfile.TemporaryDirectory(prefix="star-edge-bench-") as folder:

        def end(number: int, _: object) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        in_main = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, end) for n in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
        try:
            yield folder
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _without_tolerance(config: NamedConfig) -> NamedConfig:
    if config.prune is None:
        return config
    return replace(config, prune=replace(config.prune, vision_tolerance=None, encoder_tolerance=None))


def _print(result: dict[str, Any], written: list[str]) -> None:
    console = make_console()
    for table in tables(result):
        print_table(console, table.title, table.header, table.rows)
    hook = result["idle_hook"]

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if hook:
        say(
            f"idle hook: {hook['hook_ms_per_token']:.2f} ms per token, {hook['stock_ms_per_token']:.2f} without, ratio "
            f"{hook['ratio']:.3f}"
        )
    about, device = result["machine"], ", ".join(result["machine"]["devices"])
    say(
        f"{about['processor']}{', ' + device if device else ''}, {about['threads']} threads; speed-ups are over: "
        f"{result['reference']}"
    )
    for note in result["notes"] + sorted(
        {f"{row['name']}: {note}" for row in result["sides"] for note in row["notes"]}
    ):
        say(f"note: {cli_words(note)}")
    for path in written:
        say(f"written: {Path(path)}")
