"""star-edge doctor: what is installed, what a model supports, what would be pruned how."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click
import llama_cpp
import numpy as np
from rich.console import Console
from rich.table import Table

from ..decoder.hybrid import at_attention
from ..engine import StarVLM
from ..errors import StarEdgeError
from ..io.images import load_image
from ..llamacpp.devices import can_offload, cpu_features, list_devices
from ..llamacpp.native import ffi, lib
from ..pruning.config import PRESETS, PruneConfig, choose_layer, keep_count
from ..pruning.selection import average_tokens
from ..vision.chunks import ImageChunk
from .options import AFRESH, FilePath, load_engine, model_options, print_json


@click.command()
@model_options
@click.option(
    "--image-size", default="672x672", show_default=True, help="WIDTHxHEIGHT of the picture that the plan is for."
)
@click.option(
    "--image", type=FilePath(dir_okay=False), help="A picture that the plan is for, in place of --image-size."
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Run a short prompt with and without the layer window, and compare.",
)
@click.option("--json", "as_json", is_flag=True)
def doctor(image_size: str, image: str | None, check: bool, as_json: bool, **model: Any) -> None:
    """Show versions, devices, what the model supports, and what each preset would keep."""
    try:
        width, height = (int(n) for n in image_size.lower().split("x"))
        if not (0 < width <= 16384 and 0 < height <= 16384):
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{image_size!r} is not a size such as 672x672") from None
    if image is not None:
        height, width = load_image(image).shape[:2]
    result: dict[str, Any] = {
        "versions": {
            "star_edge": version("star-edge"),
            "compiled against llama-cpp-python": ffi.string(lib.se_built_against()).decode(),
            "llama-cpp-python": llama_cpp.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "devices": list_devices(),
        "gpu_offload": can_offload(),
        "cpu_features": cpu_features(),
    }
    with load_engine(**model, **AFRESH) as vlm:
        if check:  # first: running may show what the model does not support
            result["check"] = _or_reason(_check, vlm, width, height)
        result["model"] = _describe(vlm)
        if vlm.encoder is not None:
            result["plan"] = _or_reason(_plan, vlm, width, height)
    print_json(result) if as_json else _print(result)


def _or_reason(part: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """A part of the report, or why there is none. The rest is worth showing in either case."""
    try:
        return part(*args)
    except StarEdgeError as error:
        return {"done": False, "reason": str(error)}


def _describe(vlm: StarVLM) -> dict[str, Any]:
    encoder, decoder = vlm.encoder, vlm.decoder
    if encoder is None:
        vision = "no: there is no vision encoder"
    elif not encoder.profile.reads_attention:
        vision = f"by embeddings only: there is no profile of projector type {encoder.projector!r}"
    else:
        vision = "yes"
    problem = decoder.stage_problem or decoder.layer_problems.get((_layer(vlm),))
    return {
        "text_model": vlm.llama.model_path,
        "architecture": vlm.llama.metadata.get("general.architecture"),
        "layers": decoder.n_layers,
        "embedding_width": decoder.n_embd,
        "rope": "M-RoPE" if decoder.mrope else "RoPE",
        "context": decoder.n_ctx,
        "mmproj": encoder.path if encoder else None,
        "projector": encoder.projector if encoder else None,
        "encoder_repairs": encoder.repairs if encoder else [],
        "chat_template": vlm.chat_template_origin,
        "vision_stage": vision,
        "decoder_stage": f"no: {problem}" if problem else "yes",
    }


def _layer(vlm: StarVLM) -> int:
    """Layer K of a decoder stage when none is asked for."""
    return vlm.decoder.nearest_attention(choose_layer(None, vlm.decoder.n_layers))


def _plan(vlm: StarVLM, width: int, height: int) -> dict[str, Any]:
    picture = np.full((height, width, 3), 128, np.uint8)
    prompt = vlm.tokenize("<__media__>", [picture], chat=False)
    try:
        images = [c for c in prompt.chunks if isinstance(c, ImageChunk)]
        n, n_special = (
            sum(c.n_tokens for c in images),
            sum(int(c.special.sum()) for c in images if c.special is not None),
        )
    finally:
        prompt.close()
    presets = {}
    for name, config in PRESETS.items():
        n1 = n
        windows: list[tuple[int, int]] = []
        if config is not None:
            n1 = keep_count("vision_keep", config.vision_keep, n, n_special)
            if not vlm.decoder.stage_problem and config.prunes_in_decoder:
                for layer, keep in at_attention(vlm.decoder, config.decoder_windows(vlm.decoder.n_layers))[0]:
                    windows.append(
                        (layer, min(windows[-1][1] if windows else n1, keep_count("decoder_keep", keep, n, n_special)))
                    )
        average = average_tokens(n1, windows, vlm.decoder.n_layers)
        presets[name] = {
            "vision_kept": n1,
            "windows": windows,
            "average_tokens": average,
            "at_least": config is not None and config.adapts_to_picture,
        }
    return {"image": f"{width}x{height}", "image_tokens": n, "presets": presets}


def _check(vlm: StarVLM, width: int, height: int) -> dict[str, Any]:
    """Keep-all through the layer window against an ordinary decode: the exactness contract, on this model and
    machine.
    """
    if vlm.encoder is None or vlm.decoder.stage_problem:
        return {"done": False, "reason": "needs a vision encoder and a decoder stage"}
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    asked = "<__media__>What is this?", [picture]
    plain, _ = vlm.read_prompt(*asked, None, chat=False)
    keep_all = PruneConfig(decoder_layer=_layer(vlm))
    windowed, report = vlm.read_prompt(*asked, keep_all, chat=False)
    if report.decoder_layer is None:
        return {"done": False, "reason": "; ".join(report.notes)}
    difference = float(np.abs(plain.logits - windowed.logits).max())
    return {
        "done": True,
        "layer": report.decoder_layer,
        "max_logit_difference": difference,
        "same_token": bool(plain.logits.argmax() == windowed.logits.argmax()),
    }


def _print(result: dict[str, Any]) -> None:
    console = Console()
    for title in ("versions", "model"):
        table = Table(title=title, show_header=False)
        for key, value in result[title].items():
            table.add_row(key, str(value))
        console.print(table)
    table = Table("device", "description", "free GiB", "total GiB", title="devices")
    for d in result["devices"]:
        table.add_row(d["name"], d["description"], f"{d['free_bytes'] / 2**30:.1f}", f"{d['total_bytes'] / 2**30:.1f}")
    console.print(table)
    console.print(
        f"GPU offload: {'yes' if result['gpu_offload'] else 'no, this build of llama-cpp-python is for the CPU'}; "
        f"{result['cpu_features']}",
        highlight=False,
    )
    if "reason" in result.get("plan", {}):
        console.print(f"plan: not done, {result['plan']['reason']}")
    elif "plan" in result:
        plan = result["plan"]
        table = Table(
            "preset",
            "after the encoder",
            "layer K",
            "from layer K on",
            "average per layer",
            title=f"a {plan['image']} picture: {plan['image_tokens']} image tokens (+: or more, where it needs them)",
        )
        for name, p in plan["presets"].items():
            layers, kept = (", ".join(str(w[i]) for w in p["windows"]) or "-" for i in (0, 1))
            more = "+" if p["at_least"] else ""
            table.add_row(name, f"{p['vision_kept']}{more}", layers, kept, f"{p['average_tokens']:.1f}{more}")
        console.print(table)
    check = result.get("check", {})
    if check.get("done"):
        console.print(
            f"check: keep-all through layer {check['layer']} against an ordinary decode: largest logit difference "
            f"{check['max_logit_difference']:.2g}, same token: {check['same_token']}"
        )
    elif check:
        console.print(f"check: not done, {check['reason']}")
