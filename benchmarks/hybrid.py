"""Prefill of a hybrid decoder: speed-up against the ideal that token-layers allow, and what a further question costs.

    python benchmarks/hybrid.py [--shape qwen3.5-0.8b] [--repeat 3] [--folder DIR]

The decoder alone, in random weights of the shape, one thread, CPU time (so that other work on the machine counts
little): text, an image of the shape's tokens, a question. stock is llama.cpp without a tap, in the same decodes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import stock
from helpers.choosing import by_score, keep_all
from helpers.models import random_prompt

from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.saved_rows import restore_state, save_state
from star_edge.llamacpp.tap import Tap
from star_edge.pruning.selection import average_tokens
from star_edge.synthetic import SHAPES, model_files

N_PREFIX, N_QUESTION, SHARE = 35, 40, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3.5-0.8b", choices=SHAPES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="keeps the model there")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    with model_files(shape, options.folder) as (text, _):
        plain, tapped = (stock.load(text, True, n_ctx=1024, n_threads=1) for _ in range(2))
        tap = Tap()
        attach_tap(tapped, tap)
        print(json.dumps(measure(plain, DecoderContext(tapped, tap), shape, options.repeat), indent=1))


def measure(plain, context, shape, repeat) -> dict[str, object]:
    side = round(shape.n_image_tokens**0.5)
    n, n_layers, n_text = side * side, context.n_layers, N_PREFIX + N_QUESTION
    n_keep = round(SHARE * n)
    sizes = SimpleNamespace(mrope=context.mrope, shape=SimpleNamespace(n_vocab=context.n_vocab, n_embd=context.n_embd))
    prompts = [random_prompt(sizes, [N_PREFIX, (side, side), N_QUESTION])]
    prompts.append(random_prompt(sizes, [N_PREFIX, (side, side), N_QUESTION]))
    prompts[1].segments[-1].rows.tokens = prompts[1].segments[-1].rows.tokens[::-1].copy()  # another question
    pieces = [
        SimpleNamespace(rows=s.rows.slice(at, min(len(s.rows), at + context.n_ubatch)), causal=True)
        for s in prompts[0].segments
        for at in range(0, len(s.rows), context.n_ubatch)
    ]

    def of_stock():
        stock.clear(plain)
        return timed(lambda: stock.run_segments(plain, pieces, prompts[0].next_position))

    def of_ours(stage, prompt=prompts[0], keep=False, fresh=True):
        if fresh:
            context.clear()
        context.tap.set_position_shift(0, 0)
        context.tap.set_cell_bias(None)
        seconds, state = timed(lambda: prefill(context, prompt.segments, prompt.next_position, stage, keep=keep))
        assert state.in_place and (fresh or state.n_reused == N_PREFIX + n)
        return seconds, state

    layers = [context.nearest_attention(k) for k in (3, n_layers // 3, round(2 * n_layers / 3))]
    stages = {f"K={k}": DecoderStage([(k, [n_keep])], by_score) for k in layers}
    cases = {f"keep all, K={layers[1]}": DecoderStage([(layers[1], [0])], keep_all), **stages}
    of_stock()
    of_ours(stages[f"K={layers[1]}"])
    base, times = [], {name: [] for name in cases}
    for _ in range(repeat):
        base.append(of_stock()[0])
        for name, stage in cases.items():
            times[name].append(of_ours(stage)[0])
            print(name, times[name], base, file=sys.stderr, flush=True)
    result: dict[str, object] = {"n_image": n, "n_text": n_text, "n_kept": n_keep, "stock_s": float(np.median(base))}
    for k in layers:
        average = average_tokens(n, [(k, n_keep)], n_layers)
        ideal = (n + n_text) / (average + n_text)
        speed_up = float(np.median(base) / np.median(times[f"K={k}"]))
        result[f"K={k}"] = {"speed_up": speed_up, "ideal": ideal, "of_ideal": speed_up / ideal}
    result["overhead_of_keep_all"] = float(np.median(times[f"keep all, K={layers[1]}"]) / np.median(base) - 1)
    for name, stage in {"no stage": None, **stages}.items():
        first, second = [], []
        for _ in range(repeat):
            first.append(of_ours(stage, keep=True)[0])
            second.append(of_ours(stage, prompts[1], keep=True, fresh=False)[0])
            print("question 2", name, first, second, file=sys.stderr, flush=True)
        result[f"question 2, {name}"] = float(np.median(second) / np.median(first))
    saving, state = timed(lambda: save_state(context.llama))
    restoring, _ = timed(lambda: restore_state(context.llama, state, 700))
    return result | {"state_mib": len(state) / 2**20, "save_ms": 1e3 * saving, "restore_ms": 1e3 * restoring}


def timed(run):
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
