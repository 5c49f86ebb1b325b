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

from ..benchmarking.encoder import measure_encoder
from ..benchmarking.threads import measure_tokens
from ..decoder.hybrid import at_attention
from ..engine import StarVLM
from ..errors import StarEdgeError
from ..io.images import load_image
from ..llamacpp.devices import can_offload, cpu_features, list_devices, openmp_waits
from ..llamacpp.native import ffi, lib
from ..pruning.config import Keep, PruneConfig, choose_layer, keep_count
from ..pruning.presets import PRESETS
from ..pruning.selection import average_tokens
from ..vision.chunks import ImageChunk
from ..vision.encoder import VisionEncoder
from ..vision.precision import fastest_type
from ..vision.resolution import Resolution
from .options import (
    AFRESH,
    FilePath,
    cli_words,
    complete_file,
    examples,
    load_engine,
    model_options,
    parse_size,
    print_json,
)
from .pruning import KeepType
from .tables import make_console, print_table


@click.command(
    epilog=examples(
        "star-edge doctor",
        "star-edge doctor -m text.gguf --mmproj mmproj.gguf --image receipt.jpg",
    )
)
@model_options
@click.option(
    "--image-size",
    metavar="WIDTHxHEIGHT",
    default="672x672",
    show_default=True,
    help="Size of the picture that the plan is for.",
)
@click.option(
    "--image",
    type=FilePath(dir_okay=False),
    shell_complete=complete_file,
    help="A picture that the plan is for, in place of --image-size.",
)
@click.option(
    "--image-max-tokens",
    type=KeepType(),
    help="The plan is for the picture made smaller, until it takes so many image tokens: a fraction of those at full "
    "size (0.5) or a count.",
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Run a short prompt with and without the layer window, and compare.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Time the encoder with and without flash attention and in the type that is fastest on this processor, and "
    "tokens by the number of threads. Takes some encodes of a small picture, on a machine with nothing else to do.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON in place of tables.")
def doctor(
    image_size: str,
    image: str | None,
    image_max_tokens: Keep | None,
    check: bool,
    measure: bool,
    as_json: bool,
    **model: Any,
) -> None:
    """Show versions, devices, what the model supports, and what each preset would keep of a picture."""
    width, height = parse_size(image_size)
    smaller = PruneConfig(image_max_tokens=1.0 if image_max_tokens is None else image_max_tokens)
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
        "threads_wait": openmp_waits(),
    }
    with load_engine(**model, **AFRESH) as vlm:
        if check:  # first: running may show what the model does not support
            result["check"] = _or_reason(_check, vlm, width, height)
        result["model"] = _describe(vlm)
        if vlm.encoder is not None:
            result["plan"] = _or_reason(_plan, vlm, width, height, smaller)
        if measure:
            result["measured"] = _or_reason(_measure, vlm)
    print_json(result) if as_json else _print(result)


def _or_reason(part: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """A part of the report, or why there is none. The rest is worth showing in either case."""
    try:
        return part(*args)
    except StarEdgeError as error:
        return {"done": False, "reason": cli_words(str(error))}


def _describe(vlm: StarVLM) -> dict[str, Any]:
    encoder, decoder = vlm.encoder, vlm.decoder
    architecture = vlm.llama.metadata.get("general.architecture")
    trained = vlm.llama.metadata.get(f"{architecture}.context_length", "")
    problem = decoder.stage_problem or decoder.layer_problems.get((_layer(vlm),))
    return {
        "text_model": vlm.llama.model_path,
        "architecture": architecture,
        "layers": decoder.n_layers,
        "embedding_width": decoder.n_embd,
        "rope": "M-RoPE" if decoder.mrope else "RoPE",
        "context_trained": int(trained) if trained.isdecimal() else None,
        "context_used": decoder.n_ctx,
        "mmproj": encoder.path if encoder else None,
        "projector": encoder.projector if encoder else None,
        "encoder_type": _encoder_type(encoder) if encoder else None,
        "encoder_repairs": encoder.repairs if encoder else [],
        "chat_template": vlm.chat_template_origin,
        **vlm.stages,
        **({"decoder_stage": f"no: {problem}"} if problem else {}),
    }


def _encoder_type(encoder: VisionEncoder) -> str:
    """The type that the encoder computes in, and the faster one if it is another."""
    used = encoder.precision
    if used.is_converted:
        return f"{used.kind}, converted: the file has {used.of_file}"
    if not used.kind:
        return "none: it has no layers"
    best = fastest_type(used.info)
    if encoder.on_gpu or best == used.kind:
        return used.kind
    return f"{used.kind}; {best} is faster on this processor and rounds otherwise: --mmproj-type auto"


def _layer(vlm: StarVLM) -> int:
    """Layer K of a decoder stage when none is asked for."""
    return vlm.decoder.nearest_attention(choose_layer(None, vlm.decoder.n_layers))


def _measure(vlm: StarVLM) -> dict[str, Any]:
    tokens = measure_tokens(vlm)
    return {"tokens": tokens, "encoder": measure_encoder(vlm) if vlm.encoder is not None else []}


def _plan(vlm: StarVLM, width: int, height: int, smaller: PruneConfig) -> dict[str, Any]:
    assert vlm.encoder is not None  # the caller has looked
    picture = np.full((height, width, 3), 128, np.uint8)
    n_full = vlm.count_tokens(picture)
    if smaller.limits_images:
        picture = Resolution(vlm.encoder).fit(picture, smaller.image_max_tokens).pixels
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
    return {"image": f"{width}x{height}", "full_tokens": n_full, "image_tokens": n, "presets": presets}


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
    console = make_console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    model = dict(result["model"])
    used, trained = model.pop("context_used"), model.pop("context_trained")
    model["context"] = f"{used} tokens here (--ctx-size), {trained or 'an unknown number of'} in training"
    model = {name.replace("_", " "): value for name, value in model.items()}
    for title, values in (("versions", result["versions"]), ("model", model)):
        say(f"{title}:")
        for key, value in values.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            say(f"  {key:{max(map(len, values))}}  {'none' if shown is None else shown}")
    print_table(
        console,
        "devices",
        ["device", "description", "free GiB", "total GiB"],
        [
            [d["name"], d["description"], f"{d['free_bytes'] / 2**30:.1f}", f"{d['total_bytes'] / 2**30:.1f}"]
            for d in result["devices"]
        ],
        n_left=2,
    )
    offload = "yes" if result["gpu_offload"] else "no, this build of llama-cpp-python is for the CPU"
    say(f"GPU offload: {offload}; {result['cpu_features']}")
    if result["threads_wait"] is not None:
        advice = (
            "; on a machine that does other work too, start with OMP_WAIT_POLICY=passive in the environment"
            if result["threads_wait"] == "spinning"
            else ""
        )
        say(f"threads wait for each other {result['threads_wait']}{advice}")
    if "reason" in result.get("plan", {}):
        say(f"plan: not done, {result['plan']['reason']}")
    elif "plan" in result:
        plan = result["plan"]
        full = f" ({plan['full_tokens']} at full size)" if plan["full_tokens"] != plan["image_tokens"] else ""
        rows = []
        for name, p in plan["presets"].items():
            layers, kept = (", ".join(str(w[i]) for w in p["windows"]) or "-" for i in (0, 1))
            more = "+" if p["at_least"] else ""
            rows.append([name, f"{p['vision_kept']}{more}", layers, kept, f"{p['average_tokens']:.1f}{more}"])
        print_table(
            console,
            f"a {plan['image']} picture: {plan['image_tokens']} image tokens{full} (+: or more, where it needs them)",
            ["preset", "after the encoder", "layer K", "from layer K on", "average per layer"],
            rows,
        )
    check = result.get("check", {})
    if check.get("done"):
        say(
            f"check: keep-all through layer {check['layer']} against an ordinary decode: largest logit difference "
            f"{check['max_logit_difference']:.2g}, same token: {'yes' if check['same_token'] else 'no'}"
        )
    elif check:
        say(f"check: not done, {check['reason']}")
    if "measured" in result:
        _print_measured(console, say, result["measured"])


def _print_measured(console: Console, say: Callable[[str], None], measured: dict[str, Any]) -> None:
    if "reason" in measured:
        say(f"measured: not done, {measured['reason']}")
        return
    rows = measured["encoder"]
    if rows:
        print_table(
            console,
            f"encode of {rows[0]['n_tokens']} tokens, measured",
            ["flash attention", "type", "ms", "note"],
            [
                ["on" if row["flash_attn"] else "off", row["type"], f"{row['milliseconds']:.0f}", _note(row, rows)]
                for row in rows
            ],
            n_left=2,
        )
    rows = measured["tokens"]
    print_table(
        console,
        "tokens, measured",
        ["threads", "ms for a token", "note"],
        [[str(row["threads"]), f"{row['milliseconds']:.1f}", _note(row, rows)] for row in rows],
    )


def _note(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    fastest = min(float(one["milliseconds"]) for one in rows)
    return ", ".join(["fastest"] * (float(row["milliseconds"]) == fastest) + ["now"] * row["is_used"])
