"""What a token of the answer costs with dropped rows gone, and with them seen below layer K.

python tools/realdec/cost.py MODEL.gguf [--rows 700] [--keep 0.25] [--tokens 24] [--rounds 3]

One thread; medians over tokens, the variants interleaved.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from methods import Method
from realdec import Prompt, RealDecoder
from tasks import TASKS, make

from star_edge.llamacpp.tap import Plan
from star_edge.rows import Rows, Segment


def long_prompt(decoder: RealDecoder, n_rows: int) -> Prompt:
    """The contexts of several items, cut to n_rows, and the last one's question."""
    items = [make("dev", task, i) for i in range(20) for task in TASKS]
    last = decoder.read(items[-1])
    tokens = np.concatenate([decoder.tokenize(item.context) for item in items])[:n_rows]
    start = len(last.segments[0].rows)
    text = last.segments[2].rows.tokens
    assert text is not None
    after = np.arange(start + n_rows, start + n_rows + len(text), dtype=np.int32)
    segments = [
        last.segments[0],
        Segment(Rows(np.arange(start, start + n_rows, dtype=np.int32), embeddings=decoder.embed(tokens)), image=0),
        Segment(Rows(after, tokens=text)),
    ]
    return Prompt(segments, int(after[-1]) + 1, n_rows, [], [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=700)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    decoder = RealDecoder(args.model)
    prompt = long_prompt(decoder, args.rows)
    variants = {
        "unpruned": None,
        "gone": Method("", ((2 / 3, args.keep),)),
        "seen below": Method("", ((2 / 3, args.keep),), seen_below=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, method in variants.items():
            stage = None if method is None else method.stage(decoder.n_layers, prompt.n_context)
            state = decoder.prefill(prompt, stage)
            for i in range(args.tokens):
                rows = Rows(np.array([prompt.n_rows + i], np.int32), tokens=np.array([100 + i], np.int32))
                begin = time.perf_counter()
                decoder.context.decode(rows, state.n_cells + i, Plan(), "answer", logits=True)
                times[name].append(1e3 * (time.perf_counter() - begin))
    for name, values in times.items():
        print(
            f"{name}: {np.median(values):.2f} ms a token (quartiles {np.percentile(values, 25):.2f} to "
            f"{np.percentile(values, 75):.2f})"
        )


if __name__ == "__main__":
    main()
