"""How well a question finds the rows that it will read if they have stopped at an early layer. In torch.

python tools/realdec/stopped.py MODELS/gemma-3-270m-q4_k_m.gguf [--split dev] [--items 8] [--layers 0.6-0.75]
(with what tools/realdec/frozen-requirements.txt lists)

The context's rows stop at a layer, the text after them goes on, and in each layer above it reads keys and values of the
states in which they stopped: what the engine does for `look_ahead`. Printed for each place to stop: the share of the
answer's rows (the tokens of the values asked for) that are among the quarter of the context's rows with the most
attention from the last row, layer by layer; or of the mean over --layers, shares of the depth. Chance is 25%.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from frozen import Decoder
from tasks import TASKS, Item, make

STOPS = (1.0, 0.45, 0.33, 0.2, 0.1)
KEEP = 0.25


def rows_of(decoder: Decoder, item: Item, context: list[int]) -> np.ndarray:
    """Which tokens of the context share a character with a value that is asked for, (n,) bool."""
    found, at = [], 0
    for token in context:
        piece = decoder.tokenizer.decode([token])
        first, at = at + len(piece) - len(piece.lstrip()), at + len(piece)
        found.append(any(first < end and at > begin for begin, end in item.values))
    return np.array(found)


def attention(decoder: Decoder, prompt: list[int], context: slice, stop: int) -> np.ndarray:
    """What the context's rows receive from the last row in each layer, (n_layers, n). stop: layer that they end at."""
    states = decoder.model.embed_tokens(torch.tensor([prompt]))
    ropes, found = decoder._ropes(states), []
    goes_on, seen = torch.ones(len(prompt), dtype=torch.bool), torch.ones(len(prompt), dtype=torch.bool)
    for i in range(decoder.n_layers):
        if i == stop:
            goes_on[context] = False
        after, weights = decoder._layer(i, states, ropes, seen)
        found.append(weights[0].mean(dim=0)[-1, context].numpy())
        states = torch.where(goes_on[None, :, None], after, states)
    return np.array(found)


def recall(scores: np.ndarray, rows: np.ndarray) -> float:
    best = np.argsort(-scores)[: round(KEEP * len(scores))]
    return float(rows[best].sum() / rows.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--items", type=int, default=8, help="of each task")
    parser.add_argument("--layers", help="such as 0.6-0.75: their mean, in place of each layer")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    decoder = Decoder(args.model)
    n_layers = decoder.n_layers
    ends = [round(float(share) * n_layers) for share in args.layers.split("-")] if args.layers else []
    found: dict[float, list[list[float]]] = {stop: [] for stop in STOPS}
    for item in (make(args.split, task, i) for i in range(args.items) for task in TASKS):
        prompt, first, n = decoder.read(item)
        rows = rows_of(decoder, item, prompt[first : first + n])
        for stop in STOPS:
            layers = attention(decoder, prompt, slice(first, first + n), round(stop * n_layers))
            if ends:
                layers = layers[ends[0] : ends[1] + 1].mean(axis=0, keepdims=True)
            found[stop].append([recall(scores, rows) for scores in layers])
    for stop, recalls in found.items():
        print(f"stops at {stop} L: " + " ".join(f"{100 * share:.0f}" for share in np.mean(recalls, axis=0)))


if __name__ == "__main__":
    main()
