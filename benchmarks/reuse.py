"""Measures what a further question about the same image costs, on the random 1.1B Llama of benchmarks/prefill.py with its CLIP-L/336 encoder.

    python benchmarks/reuse.py [--repeats N] [--json FILE] [--folder DIR]

The prompt has 35 text tokens before the image and 40 after it. Question 1 is asked after nothing, question 2 after
question 1. Both are timed from the pixels to the logits of the first answer token. Everything is interleaved; numbers are medians,
and ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from star_edge import MEDIA_MARKER, PRESETS, PruneConfig, StarVLM, __version__
from star_edge.synthetic import CLIP_L_336, TINYLLAMA_1B, write_decoder, write_encoder

N_BEFORE, N_AFTER = 35, 40
CONFIGS = {name: PRESETS[name] for name in ("off", "balanced", "fast")} | {"n1=288, n2=58, K=11": PruneConfig(288, 58, 11)}


def ask(vlm: StarVLM, image: np.ndarray, config: PruneConfig | None, letter: str) -> dict[str, float]:
    prompt = "a" * (N_BEFORE - 1) + MEDIA_MARKER + letter * N_AFTER  # the random model's tokens are bytes
    _, report = vlm.read_prompt(prompt, image, config, chat=False)
    return {**report.milliseconds, "reused_tokens": report.reused_tokens, "text_tokens": report.n_text_tokens}


def forget(vlm: StarVLM) -> None:
    vlm.encoder.cache.clear()
    vlm.llama._ctx.kv_cache_clear()


def bench(vlm: StarVLM, repeats: int) -> list[dict]:
    image = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    asked: dict = {name: ([], []) for name in CONFIGS}
    for repeat in track(range(repeats + 1), "questions", transient=True):
        for name, config in CONFIGS.items():
            forget(vlm)
            for turn, letter in zip(asked[name], "bc"):
                times = ask(vlm, image, config, letter)
                if repeat:
                    turn.append(times)
    rows = []
    for name, (first, second) in asked.items():
        median = lambda turn, what: statistics.median(t[what] for t in turn)
        if any(t["reused_tokens"] for t in first) or not all(t["reused_tokens"] for t in second):
            raise RuntimeError(f"{name}: question 1 was not read in full, or question 2 was")
        one, two = median(first, "first_token"), median(second, "first_token")
        rows.append(
            {
                "config": name,
                "question_1_ms": one,
                "question_2_ms": two,
                "share": two / one,
                "spread_ms": [[f([t["first_token"] for t in turn]) for f in (min, max)] for turn in (first, second)],
                "stages_1_ms": {k: median(first, k) for k in first[0]},
                "stages_2_ms": {k: median(second, k) for k in second[0]},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the models are written and kept; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text, mmproj = folder / "random-1.1b-q4_k_m.gguf", folder / "random-clip-l-336-f16.gguf"
        if not text.exists():
            write_decoder(text, TINYLLAMA_1B, "q4_k_m")
        if not mmproj.exists():
            write_encoder(mmproj, CLIP_L_336, TINYLLAMA_1B.n_embd, "f16")
        with StarVLM(text, mmproj, n_ctx=2048) as vlm:
            result = {
                "versions": {"star_edge": __version__, "llama-cpp-python": llama_cpp.__version__},
                "machine": {"processor": platform.processor() or platform.machine(), "threads": vlm.decoder.n_threads},
                "reuse": bench(vlm, options.repeats),
            }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    table = Table(
        "config",
        "question 1, s",
        "question 2, s",
        "share",
        title=f"first token, 1.1B Llama Q4_K_M, {N_BEFORE} + 576 + {N_AFTER} tokens",
    )
    for row in result["reuse"]:
        one, two = (f"{row[k] / 1e3:.3f}" for k in ("question_1_ms", "question_2_ms"))
        table.add_row(row["config"], one, two, f"{100 * row['share']:.1f}%")
    console = Console()
    console.print(table)
    for row in result["reuse"]:
        console.print(f"{row['config']}: " + ", ".join(f"{k} {v:.1f}" for k, v in row["stages_2_ms"].items() if v))


if __name__ == "__main__":
    main()
