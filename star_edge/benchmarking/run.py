"""One benchmark, from the model to the result."""

from __future__ import annotations

import base64
import io
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from PIL import Image

from .. import MEDIA_MARKER, __version__
from ..errors import ConfigError, StarEdgeError
from ..evaluation.configs import NamedConfig
from ..llamacpp.devices import list_devices
from ..options import LoadOptions
from ..report import round_n_ctx
from ..synthetic import DEFAULT_PICTURE, PICTURES, ModelShape
from . import memory
from .measure import run_sides, time_idle_hook
from .sides import Request, Sample, SideSpec, Workbench
from .summary import summarise

BASELINES = {
    "shipped": "stock as shipped",  # Llama's defaults: no flash attention in decoder and encoder
    "flash": "stock, flash attn",
    "converted": "stock, converted mmproj",  # where mmproj_type has the star_edge sides compute in another type
    "fewer": "stock, fewer tokens",
}
# Text tokens of a synthetic shape's prompt, BOS and the chat template's own text included
TEXT_BEFORE, TEXT_AFTER = 35, 40
_TEMPLATE_BEFORE, _TEMPLATE_AFTER = len("USER:") + 1, len("\u2581ASSISTANT:".encode())  # SentencePiece's space
# Letters of it that are not the template's. A byte is a token
LETTERS_BEFORE, LETTERS_AFTER = TEXT_BEFORE - _TEMPLATE_BEFORE, TEXT_AFTER - _TEMPLATE_AFTER


def make_specs(
    configs: Sequence[NamedConfig], baselines: Sequence[str], fewer: Sequence[float], n_tokens: float
) -> list[SideSpec]:
    """The stock sides, then star_edge without pruning and with each config.

    Args:
        configs: The configs to measure.
        baselines: Names in BASELINES.
        fewer: Shares of the image tokens for the baseline "fewer", which becomes a side for each.
        n_tokens: Image tokens of a picture.
    """
    specs = []
    for name in baselines:
        if name != "fewer":
            specs.append(SideSpec(BASELINES[name], "stock", None, name != "shipped", converted=name == "converted"))
            continue
        for i, share in enumerate(fewer):
            title = BASELINES[name] if len(fewer) == 1 else f"stock, {100 * share:g}% of the tokens"
            specs.append(SideSpec(title, "stock", image_max_tokens=max(1, round(share * n_tokens)), fewer=i))
    return specs + [
        SideSpec(c.name if c.prune is not None else "star_edge, unpruned", "star_edge", c.prune) for c in configs
    ]


def make_request(pictures: Sequence[np.ndarray], before: str, after: str, fewer: Sequence[float]) -> Request:
    """A request of one user message: text, pictures, text.

    Args:
        pictures: Pixels, (h, w, 3) uint8 each.
        before: Text before the pictures.
        after: Text after them.
        fewer: Shares of the pixels that smaller pictures have.

    Raises:
        ConfigError: The text has a media marker.
    """
    if MEDIA_MARKER in before + after:
        raise ConfigError(f"the prompt holds {MEDIA_MARKER}", "leave it out: pictures stand before the prompt")
    images = [Image.fromarray(pixels) for pixels in pictures]

    def smaller(image: Image.Image, share: float) -> Image.Image:
        side = math.sqrt(share)
        return image.resize((max(1, round(side * image.width)), max(1, round(side * image.height))))

    def text(value: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": value}] if value else []

    def message(images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        return [{"role": "user", "content": [*text(before), *pictures, *text(after)]}]

    return Request(message(images), [message([smaller(image, share) for image in images]) for share in fewer])


def shape_request(shape: ModelShape, fewer: Sequence[float], kind: str = DEFAULT_PICTURE) -> Request:
    """A request of TEXT_BEFORE text tokens, a picture, and TEXT_AFTER text tokens, with the chat template's own text.

    Encoders that put tokens around images add those. kind: of the picture, one of PICTURES.
    """
    return make_request(
        [PICTURES[kind](*shape.picture)],
        "a" * LETTERS_BEFORE,
        "b" * LETTERS_AFTER,
        fewer,
    )


def shape_context(shape: ModelShape, n_generate: int) -> int:
    """A context that the shape's request and answer fit, with room for tokens around tiles, as llama.cpp rounds it."""
    n = TEXT_BEFORE + TEXT_AFTER + shape.n_image_tokens + 128 + n_generate
    return round_n_ctx(n)


def run(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str],
    options: dict[str, Any],
    configs: Sequence[NamedConfig],
    baselines: Sequence[str],
    request: Request,
    *,
    fewer: Sequence[float],
    repeats: int,
    n_generate: int,
    hook_tokens: int = 0,
    with_memory: bool = True,
    title: str = "",
    progress: Callable[[str], None] = lambda what: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Runs a benchmark.

    Args:
        model: The text model.
        mmproj: Its mmproj file.
        options: Arguments of StarVLM.
        configs: The configs to measure.
        baselines: Names in BASELINES.
        request: What each side is asked.
        fewer: Shares of the image tokens for the baseline "fewer", those that `request` was made with.
        repeats: Number of repeats.
        n_generate: Tokens of each answer.
        hook_tokens: Tokens for the cost of an idle callback, 0 for no such measurement.
        with_memory: Measure memory too, in a process for each side.
        title: Title of the result.
        progress: Called with the kind of each request once it is answered.
        save: Called after each repeat with the result so far, so that a run that is ended loses one repeat at most.

    Returns:
        The result as plain JSON values: see `summary.summarise`, and what was run where.

    Raises:
        StarEdgeError: As StarVLM and StarChatHandler.
        ContextLengthError: Prompt and answer do not fit n_ctx.
    """
    start = time.perf_counter()
    notes: list[str] = []
    hook: dict[str, float] | None = None
    with Workbench(model, mmproj, **options) as bench:
        n_tokens, n_pictures = bench.count_image_tokens(request)
        if bench.converted is None:
            baselines = [name for name in baselines if name != "converted"]
        specs = make_specs(configs, baselines, fewer, n_tokens / n_pictures)

        def result(
            samples: dict[str, list[Sample]], cache_bytes: dict[str, int], notes: Sequence[str]
        ) -> dict[str, Any]:
            about = _describe(bench, model, options)
            return {
                "title": title,
                "date": date.today().isoformat(),
                "versions": {
                    "star_edge": __version__,
                    "llama-cpp-python": llama_cpp.__version__,
                    "python": platform.python_version(),
                },
                "machine": machine(about.pop("n_threads")),
                "model": about,
                "repeats": min(map(len, samples.values())),
                "generated_tokens": n_generate,
                **summarise(specs, samples, cache_bytes, bench.n_layers),
                "idle_hook": hook,
                "notes": list(notes),
                "seconds": time.perf_counter() - start,
            }

        asked = iter(["warm-up"] * len(specs) + ["measuring"] * (len(specs) * repeats))
        samples, cache_bytes, left_out = run_sides(
            bench,
            specs,
            request,
            repeats=repeats,
            n_generate=n_generate,
            progress=lambda: progress(next(asked)),
            save=lambda *found: save(result(*found)),
        )
        notes += left_out
        present = [spec for spec in specs if spec.name in samples]
        stock = next(
            (s for s in present if s.kind == "stock" and s.flash_attn == LoadOptions.take(dict(options)).flash_attn),
            None,
        )
        if hook_tokens and stock is not None:
            progress("idle hook")
            hook = time_idle_hook(bench, stock, next(s for s in present if s.kind == "star_edge"), hook_tokens)
        elif hook_tokens:
            notes.append("cost of an idle hook not measured: it needs a stock side with the same flash attention")
        finished = result(samples, cache_bytes, notes)
        converted = bench.converted
    if with_memory:
        save(finished)
        for spec in present:
            progress("memory")
            try:
                file = converted if spec.converted and converted else str(mmproj)
                used = memory.measure(str(model), file, options, replace(spec, converted=False), request)
                next(row for row in finished["sides"] if row["name"] == spec.name).update(used)
            except StarEdgeError as error:
                finished["notes"].append(str(error))
    finished["seconds"] = time.perf_counter() - start
    return finished


def machine(n_threads: int) -> dict[str, Any]:
    """Processor, cores, threads and accelerators. Nothing identifies this very machine."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    devices = [str(d["description"]) for d in list_devices() if not str(d["name"]).startswith(("CPU", "BLAS"))]
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": n_threads,
        "system": platform.system(),
        "devices": devices,
    }


def _describe(bench: Workbench, model: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
    metadata, load = bench.llama.metadata, LoadOptions.take(dict(options))
    return {
        "file": Path(model).name,
        "architecture": metadata.get("general.architecture"),
        "projector": bench.projector,
        "encoder_type": bench.encoder_type,
        "vision_stage": bench.encoder_problem() or "yes",
        "bytes": os.path.getsize(model),
        "n_ctx": bench.n_ctx,
        "n_threads": bench.llama.n_threads_batch,
        **{name: getattr(load, name) for name in ("n_gpu_layers", "flash_attn", "n_ubatch", "type_k", "type_v")},
    }


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
