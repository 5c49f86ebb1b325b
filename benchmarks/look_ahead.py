"""What a prompt costs the decoder with a late layer K, with an early one, and with an early one and `look_ahead`.

    python benchmarks/look_ahead.py [--shape qwen2-vl-2b] [--picture 840x840] [--rounds 3] [--threads N]

Random weights, a picture of noise, nothing kept from prompt to prompt. Configs take turns; times are medians of what
the report counts for the decoder, ratios those of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics

import numpy as np

from star_edge import PruneConfig, StarVLM
from star_edge.synthetic import SHAPES, model_files

QUESTIONS = {
    "short": "What is the total on this receipt?",
    "long": "What is the total on this receipt, which shop is it from, and on which day was it printed? Answer with "
    "one line for each.",
}
STEPS = ("prefix", "probe", "look_ahead", "decoder_scores", "decoder_stage", "resume", "prefill", "fallback")


def configs(n_layers: int) -> dict[str, PruneConfig | None]:
    found: dict[str, PruneConfig | None] = {"off": None}
    for title, vision, keep in (("all, then 25%", 1.0, 0.25), ("30%, then 15%", 0.3, 0.15)):
        config = PruneConfig(vision_keep=vision, decoder_keep=keep)
        early = round(n_layers / 3)
        found[f"{title} from 2/3"] = config
        found[f"{title} from 1/3"] = PruneConfig(vision_keep=vision, decoder_keep=keep, decoder_layer=early)
        found[f"{title} from 1/3, looking ahead"] = PruneConfig(vision, keep, early, look_ahead=0.75)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-vl-2b", help="(%(default)s)")
    parser.add_argument("--picture", default="840x840", help="width and height (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each config (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    options = parser.parse_args()
    width, height = map(int, options.picture.split("x"))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = {"reuse": False, "image_cache_bytes": 1 << 30}  # the encoder is no part of it
    with (
        model_files(SHAPES[options.shape]) as files,
        StarVLM(*files, n_ctx=4096, n_threads=options.threads, **kept) as vlm,
    ):
        for title, question in QUESTIONS.items():
            measure(vlm, picture, title, question, options.rounds)


def measure(vlm: StarVLM, picture: np.ndarray, title: str, question: str, rounds: int) -> None:
    compared = configs(vlm.decoder.n_layers)
    took: dict[str, list[float]] = {name: [] for name in compared}
    ahead: dict[str, list[float]] = {name: [] for name in compared}
    reports = {}
    for turn in range(rounds + 1):  # the first encodes, allocates and pages in
        for name, config in compared.items():
            _, reports[name] = vlm.read_prompt(question, [picture], config)
            if turn:
                ms = reports[name].milliseconds
                took[name].append(sum(ms.get(step, 0.0) for step in STEPS))
                ahead[name].append(ms.get("look_ahead", 0.0))
    whole = statistics.median(took["off"])
    print(f"{title} question: {reports['off'].n_text_tokens} text tokens, {reports['off'].n_image_tokens} of the image")
    print("| config | average tokens | decoder, ms | of which looking ahead | ratio |\n|---|---:|---:|---:|---:|")
    for name, report in reports.items():
        median = statistics.median(took[name])
        cells = (f"{median:.0f}", f"{statistics.median(ahead[name]):.0f}", f"{whole / median:.2f}")
        print("|", " | ".join([name, f"{report.average_tokens:.0f}", *cells]), "|")


if __name__ == "__main__":
    main()
