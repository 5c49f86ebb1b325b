"""Measures what a further question about the same image costs, on a random 1.1B Llama with a CLIP-L/336 encoder.

    python benchmarks/reuse.py [--repeats N] [--json FILE] [--folder DIR]

The prompt has 35 text tokens before the image and 40 after it. Question 1 is asked after nothing, question 2 after
question 1. Both are timed from the pixels to the logits of the first answer token. Everything is interleaved; numbers
are medians, and ratios are ratios of
medians. Printed beside it: the share that is left by arithmetic, if all but the encoder costs as much for each token
    and layer as in question 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import llama_cpp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from star_edge import MEDIA_MARKER, PRESETS, PruneConfig, StarVLM, __version__
from star_edge.synthetic import SHAPES, model_files

N_BEFORE, N_AFTER = 35, 40
COUNTS = ((576, 58, 2), (288, 58, 11), (144, 29, 5))
CONFIGS: dict[str, PruneConfig | None] = {
    name: PRESETS[name] for name in ("off", "quality", "balanced", "fast", "divprune")
}
CONFIGS |= {f"n1={n1}, n2={n2}, K={k}": PruneConfig(n1, n2, k) for n1, n2, k in COUNTS}
TURNS = (("1", "b"), ("2", "c"))  # and the letter that each question repeats


def ask(vlm: StarVLM, image: np.ndarray, config: PruneConfig | None, letter: str) -> dict[str, float]:
    prompt = "a" * (N_BEFORE - 1) + MEDIA_MARKER + letter * N_AFTER  # the random model's tokens are bytes
    _, report = vlm.read_prompt(prompt, image, config, chat=False)
    counts = {name: getattr(report, name) for name in ("reused_tokens", "n_vision_kept", "n_decoder_kept")}
    return {**report.milliseconds, **counts, "layer": report.decoder_layer or 0}


def ideal_share(first: dict[str, float], n_layers: int) -> float:
    """Token-layers of question 2 by those of question 1, with its encoder at the price of as many as took the same
    time.
    """
    n1, n2, k = first["n_vision_kept"], first["n_decoder_kept"], first["layer"]
    kept = (n_layers - k) * n2 if k else n_layers * n1
    all_layers = k * n1 + kept + n_layers * (N_BEFORE + N_AFTER)
    decode = first["first_token"] - first["encode"]
    return (N_AFTER * n_layers + (kept if k else 0)) / (all_layers * first["first_token"] / decode)


def forget(vlm: StarVLM) -> None:
    vlm.encoder.cache.clear()
    vlm.llama._ctx.kv_cache_clear()


def bench(vlm: StarVLM, repeats: int) -> list[dict]:
    image = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    asked: dict = {name: [[] for _ in TURNS] for name in CONFIGS}
    for repeat in track(range(repeats + 1), "questions", transient=True):
        for name, config in CONFIGS.items():
            forget(vlm)
            for turn, (_, letter) in zip(asked[name], TURNS):
                times = ask(vlm, image, config, letter)
                if repeat:
                    turn.append(times)
    rows = []
    for name, turns in asked.items():
        medians = [{key: statistics.median(t[key] for t in turn) for key in turn[0]} for turn in turns]
        first, second = medians
        if first["reused_tokens"] or not second["reused_tokens"]:
            raise RuntimeError(f"{name}: question 1 was not read in full, or question 2 was")
        rows.append(
            {
                "config": name,
                "questions": [
                    {
                        "question": question,
                        "share": m["first_token"] / first["first_token"],
                        "ideal_share": 1.0 if m is first else ideal_share(first, vlm.decoder.n_layers),
                        "spread_ms": [f(t["first_token"] for t in turn) for f in (min, max)],
                        **m,
                    }
                    for (question, _), turn, m in zip(TURNS, turns, medians)
                ],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, help="where the models are written and kept; default: a temporary folder"
    )
    options = parser.parse_args()
    with (
        model_files(SHAPES["llava-1.1b"], options.folder) as (text, mmproj),
        StarVLM(text, mmproj, n_ctx=2048) as vlm,
    ):
        result = {
            "versions": {"star_edge": __version__, "llama-cpp-python": llama_cpp.__version__},
            "machine": {"processor": platform.processor() or platform.machine(), "threads": vlm.decoder.n_threads},
            "reuse": bench(vlm, options.repeats),
        }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    table = Table("config", title=f"first token, seconds: 1.1B Llama Q4_K_M, {N_BEFORE} + 576 + {N_AFTER} tokens")
    for question, _ in TURNS:
        table.add_column(f"question {question}", justify="right")
    for row in result["reuse"]:
        first, *later = row["questions"]
        cells = [
            f"{q['first_token'] / 1e3:.3f} = {100 * q['share']:.1f}% (ideal {100 * q['ideal_share']:.1f}%)"
            for q in later
        ]
        table.add_row(row["config"], f"{first['first_token'] / 1e3:.3f}", *cells)
    console = Console()
    console.print(table)
    for row in result["reuse"]:
        for q in row["questions"]:
            stages = ("encode", "prefix", "prefill", "probe", "decoder_stage", "resume")
            times = ", ".join(f"{stage} {q[stage]:.0f}" for stage in stages if q.get(stage, 0) >= 0.5)
            console.print(
                f"{row['config']}, question {q['question']}: {times} ms; {q['spread_ms'][0]:.0f} to "
                f"{q['spread_ms'][1]:.0f}"
            )


if __name__ == "__main__":
    main()
