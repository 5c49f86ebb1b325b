"""Measures star_edge against stock llama.cpp on a random 1.1B Llama in Q4_K_M, made on the spot (weights do not change speed).

    python benchmarks/prefill.py [--repeats N] [--json FILE] [--folder DIR] [--no-encoder]

1. prefill: 35 text + 576 image + 40 text tokens to the logits of the first answer token, stock against (n1, n2, K), with the
   ideal ratio of token-layers beside the measured one;
2. first token: the same from the pixels, with a CLIP-L/336 encoder, and the share of the two selection steps in it;
3. decode: tokens per second with an idle hook against stock.

All sides are interleaved in one run; the numbers are medians, and ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stock import Stock

from star_edge import MEDIA_MARKER, PruneConfig, StarVLM, __version__
from star_edge.decoder.context import DecoderContext, Rows
from star_edge.decoder.prefill import DecoderStage, Seen, Segment, prefill
from star_edge.representatives import select
from star_edge.selection import Selection, Tokens, top_k
from star_edge.synthetic import CLIP_L_336, TINYLLAMA_1B, write_decoder, write_encoder

N_BEFORE, N_IMAGE, N_AFTER = 35, 576, 40
CONFIGS = [(576, 58, 2), (288, 58, 11), (144, 29, 5)]  # n1, n2, K


def choose(seen: Seen, n_keep: int) -> Selection:
    """What PruneConfig's defaults do in the decoder stage."""
    tokens = Tokens(seen.hidden, seen.rows, (24, 24), seen.mass, seen.attention)
    return select("cluster", tokens, seen.attention, n_keep, PruneConfig().decoder_share)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Prompt:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.before = rng.integers(300, 30000, N_BEFORE).astype(np.int32)
        self.after = rng.integers(300, 30000, N_AFTER).astype(np.int32)
        self.embeddings = rng.standard_normal((N_IMAGE, TINYLLAMA_1B.n_embd)).astype(np.float32)
        self.scores = rng.random(N_IMAGE)

    def segments(self, n1: int) -> list[Segment]:
        kept = top_k(self.scores, n1)
        end = N_BEFORE + N_IMAGE
        return [
            Segment(Rows(np.arange(N_BEFORE, dtype=np.int32), tokens=self.before)),
            Segment(Rows((N_BEFORE + kept).astype(np.int32), embeddings=self.embeddings[kept]), image=0, mass=np.full(n1, N_IMAGE / n1)),
            Segment(Rows(np.arange(end, end + N_AFTER, dtype=np.int32), tokens=self.after)),
        ]


def bench_prefill(stock: Stock, context: DecoderContext, repeats: int) -> list[dict]:
    prompt = Prompt()
    n_layers, n_text = TINYLLAMA_1B.n_layers, N_BEFORE + N_AFTER

    def run_stock() -> None:
        stock.clear()
        stock.decode(tokens=prompt.before)
        stock.decode(embeddings=prompt.embeddings, start=N_BEFORE)
        stock.decode(tokens=prompt.after, start=N_BEFORE + N_IMAGE, logits=True)

    def run_pruned(n1: int, n2: int, layer: int) -> Callable[[], None]:
        segments = prompt.segments(n1)

        def run() -> None:
            context.clear()
            state = prefill(context, segments, N_BEFORE + N_IMAGE + N_AFTER, DecoderStage([(layer, [n2])], choose))
            if not state.in_place:
                raise RuntimeError("kept rows did not return to their cells")

        return run

    sides = {None: run_stock} | {config: run_pruned(*config) for config in CONFIGS}
    times: dict = {config: [] for config in sides}
    for repeat in track(range(repeats + 1), "prefill", transient=True):
        for config, work in sides.items():
            elapsed = seconds(work)
            if repeat:
                times[config].append(elapsed)
    base = statistics.median(times[None])
    rows = [{"config": "stock", "median_s": base, "min_s": min(times[None]), "max_s": max(times[None])}]
    for n1, n2, layer in CONFIGS:
        values = times[n1, n2, layer]
        token_layers = n_layers * n_text + layer * n1 + (n_layers - layer) * n2
        ideal = n_layers * (n_text + N_IMAGE) / token_layers
        speed_up = base / statistics.median(values)
        rows.append(
            {
                "config": f"n1={n1}, n2={n2}, K={layer}",
                "average_tokens": (layer * n1 + (n_layers - layer) * n2) / n_layers,
                "median_s": statistics.median(values),
                "min_s": min(values),
                "max_s": max(values),
                "speed_up": speed_up,
                "ideal": ideal,
                "of_ideal": speed_up / ideal,
            }
        )
    return rows


def bench_first_token(stock: Stock, vlm: StarVLM, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)
    prompt = "a" * (N_BEFORE - 1) + MEDIA_MARKER + "b" * N_AFTER  # the random model's tokens are bytes
    config = PruneConfig(288, 58, 11)
    reports, stock_times = [], []
    for repeat in track(range(repeats + 1), "first token", transient=True):
        elapsed = seconds(lambda: stock.ask(prompt, image))
        _, report = vlm.read_prompt(prompt, image, config, chat=False)
        if repeat:
            stock_times.append(elapsed)
            reports.append(report)
    median = lambda name: statistics.median(r.milliseconds[name] for r in reports)
    selection = [
        sum(r.milliseconds[n] for n in ("vision_stage", "decoder_scores", "decoder_stage")) / r.milliseconds["first_token"] for r in reports
    ]
    return {
        "stock_ms": 1e3 * statistics.median(stock_times),
        "first_token_ms": median("first_token"),
        "speed_up": 1e3 * statistics.median(stock_times) / median("first_token"),
        "stages_ms": {name: median(name) for name in reports[0].milliseconds},
        "selection_share": statistics.median(selection),
        "text_tokens": reports[0].n_text_tokens,
    }


def bench_idle_hook(context: DecoderContext, repeats: int) -> dict:
    """Generation after the same prompt, one token on each side in turn.

    Both contexts belong to one model: the copies that llama.cpp repacks for the CPU differ in speed by more than a hook does.
    """
    params = llama_cpp.llama_context_params.from_buffer_copy(context.llama.context_params)
    params.cb_eval, params.cb_eval_user_data = llama_cpp.ggml_backend_sched_eval_callback(), None
    params.n_seq_max, params.kv_unified = 1, False
    plain, hooked = Stock.__new__(Stock), Stock.__new__(Stock)
    plain.llama = SimpleNamespace(ctx=llama_cpp.llama_init_from_model(context.llama.model, params))
    hooked.llama = context.llama
    sides = {"stock": plain, "hook": hooked}
    times: dict[str, list[float]] = {name: [] for name in sides}
    prompt, token = np.arange(300, 364, dtype=np.int32), np.array([400], np.int32)
    for side in sides.values():
        side.clear()
        side.decode(tokens=prompt, logits=True)
    for i in track(range(64 * repeats), "decode", transient=True):
        for name in sorted(sides, reverse=bool(i % 2)):
            start = time.perf_counter()
            sides[name].decode(tokens=token, start=len(prompt) + i, logits=True)
            if i >= 16:
                times[name].append(time.perf_counter() - start)
    llama_cpp.llama_free(plain.llama.ctx)
    stock_ms, hook_ms = (1e3 * statistics.median(times[n]) for n in ("stock", "hook"))
    return {"stock_ms_per_token": stock_ms, "hook_ms_per_token": hook_ms, "ratio": hook_ms / stock_ms, "tokens": len(times["stock"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the models are written and kept; default: a temporary folder")
    parser.add_argument("--no-encoder", action="store_true", help="leave out the part that needs the CLIP encoder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text, mmproj = folder / "random-1.1b-q4_k_m.gguf", folder / "random-clip-l-336-f16.gguf"
        if not text.exists():
            write_decoder(text, TINYLLAMA_1B, "q4_k_m")
        if not mmproj.exists() and not options.no_encoder:
            write_encoder(mmproj, CLIP_L_336, TINYLLAMA_1B.n_embd, "f16")
        projector = None if options.no_encoder else mmproj
        with StarVLM(text, projector, n_ctx=2048, image_cache_bytes=0, reuse=False) as vlm:
            stock = Stock(text, projector, vlm.decoder.n_threads)
            result = {
                "versions": {"star_edge": __version__, "llama-cpp-python": llama_cpp.__version__},
                "machine": {"processor": platform.processor() or platform.machine(), "threads": vlm.decoder.n_threads},
                "prefill": bench_prefill(stock, vlm.decoder, options.repeats),
                "idle_hook": bench_idle_hook(vlm.decoder, options.repeats),
            }
            if projector:
                result["first_token"] = bench_first_token(stock, vlm, max(3, options.repeats // 2))
            stock.close()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    show(result)


def show(result: dict) -> None:
    console = Console()
    table = Table(
        "config",
        "average tokens",
        "seconds, median (min to max)",
        "speed-up",
        "ideal",
        "of ideal",
        title="prefill, 1.1B Llama Q4_K_M, 35 + 576 + 40 tokens",
    )
    for row in result["prefill"]:
        cells = [f"{row[k]:.2f}" if k in row else "" for k in ("speed_up", "ideal", "of_ideal")]
        average = f"{row.get('average_tokens', N_IMAGE):.0f}"
        table.add_row(row["config"], average, f"{row['median_s']:.3f} ({row['min_s']:.3f} to {row['max_s']:.3f})", *cells)
    console.print(table)
    hook = result["idle_hook"]
    console.print(
        f"decode: {hook['stock_ms_per_token']:.2f} ms per token on stock, {hook['hook_ms_per_token']:.2f} with the idle hook, ratio {hook['ratio']:.4f}"
    )
    if "first_token" in result:
        first = result["first_token"]
        console.print(
            f"first token with a CLIP-L/336 encoder: stock {first['stock_ms']:.0f} ms, star_edge {first['first_token_ms']:.0f} ms, {first['speed_up']:.2f}x"
        )
        console.print(f"selection (both stages): {100 * first['selection_share']:.2f}% of the time to first token")
        console.print(", ".join(f"{name} {value:.1f}" for name, value in first["stages_ms"].items()) + " ms")


if __name__ == "__main__":
    main()
