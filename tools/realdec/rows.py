"""Where in the depth, and by which ranking, the rows that hold an answer are among the best.

python tools/realdec/rows.py MODEL.gguf --out ROWS.jsonl [--split dev] [--items 50] [--seconds 150]
python tools/realdec/rows.py table ROWS.jsonl [--keep 0.25]

Reads the attention of every layer and head from unpruned runs. For each layer and ranking it notes the share of the
answer's rows (the tokens of the values asked for) among the best half, quarter and eighth of the context's rows. A
ranking that knows nothing has a recall of 50, 25 and 12.5%. Nothing is pruned, so a run goes on where the last one
stopped and costs one prompt for each item.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from methods import LAST_FEW, pooled
from tasks import TASKS, make

from star_edge.evaluation.statistics import mean_interval
from star_edge.io.results_file import open_alone

KEEPS = (0.5, 0.25, 0.125)
POOLS = (1, 5)
# (n_heads, n_text, n_context) of one layer -> (n_context,)
RANKINGS = {
    "text (mean of all rows)": lambda a: a.mean(axis=(0, 1)),
    "last row": lambda a: a[:, -1].mean(axis=0),
    "last 4 rows": lambda a: a[:, -LAST_FEW:].mean(axis=(0, 1)),
    "largest of all rows": lambda a: a.mean(axis=0).max(axis=0),
    "largest of heads and last 4 rows": lambda a: a[:, -LAST_FEW:].max(axis=(0, 1)),
}


def recall(scores: np.ndarray, rows: np.ndarray, keep: float) -> float:
    """Share of `rows` (a mask) among the best. Of equal scores the lower index wins, as in pruning.selection.top_k."""
    best = np.argsort(-scores, kind="stable")[: max(1, round(keep * len(scores)))]
    return float(rows[best].sum() / rows.sum())


def measure(attention: np.ndarray, rows: np.ndarray) -> dict[str, object]:
    """Recall of rankings, {name: {pool: {keep: one for each layer}}}, and of single heads, last rows, keep 0.25."""
    found: dict[str, object] = {}
    for name, rank in RANKINGS.items():
        scores = [rank(a) for a in attention]
        found[name] = {
            str(width): {str(keep): [round(recall(pooled(s, width), rows, keep), 3) for s in scores] for keep in KEEPS}
            for width in POOLS
        }
    found["heads"] = [
        [round(recall(pooled(head[-LAST_FEW:].mean(axis=0), POOLS[-1]), rows, 0.25), 3) for head in layer]
        for layer in attention
    ]
    return found


def collect(args: argparse.Namespace) -> None:
    from realdec import RealDecoder

    end = time.monotonic() + args.seconds
    with open_alone(args.out) as file:
        done = {(r["model"], r["item"]) for r in map(json.loads, file)}
        decoder = None
        for index in range(args.items):
            for task in TASKS:
                item = make(args.split, task, index)
                if (args.model.stem, item.name) in done:
                    continue
                if time.monotonic() > end:
                    return
                decoder = decoder or RealDecoder(args.model)
                prompt = decoder.read(item)
                found = measure(decoder.attention(prompt)[0], prompt.rows_of(item.values))
                line = {"model": args.model.stem, "item": item.name, "task": task, "recall": found}
                file.write((json.dumps(line) + "\n").encode())
                file.flush()
    print("done")


def table(path: Path, keep: float) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_model = defaultdict(list)
    for line in lines:
        by_model[line["model"]].append(line)
    for model, items in by_model.items():
        n_layers = len(items[0]["recall"]["heads"])
        print(
            f"\n{model}: {len(items)} items, recall of the answer's rows in % among the best {keep:.1%} of the rows\n"
        )
        print("| layer K | " + " | ".join(map(str, range(n_layers))) + " |\n|---|" + "---|" * n_layers)
        for name in RANKINGS:
            for width in POOLS:
                recalls = np.array([i["recall"][name][str(width)][str(keep)] for i in items])
                label = name + (f", maximum of {width} neighbours" if width > 1 else "")
                print(f"| {label} | " + " | ".join(f"{100 * x:.0f}" for x in recalls.mean(axis=0)) + " |")
                best = int(recalls.mean(axis=0).argmax())
                low, high = mean_interval(recalls[:, best].tolist(), [i["item"] for i in items]) or (0, 0)
                print(f"<!-- {label}: best at {best}, {100 * low:.0f} to {100 * high:.0f} -->")
        heads = np.array([i["recall"]["heads"] for i in items])
        chosen, rest = heads[::2].mean(axis=0), heads[1::2].mean(axis=0)
        best = chosen.argmax(axis=1)
        label = f"best head of the layer, last 4 rows, maximum of {POOLS[-1]} (chosen on half of the items, keep 25%)"
        print(f"| {label} | " + " | ".join(f"{100 * rest[k, h]:.0f}" for k, h in enumerate(best)) + " |")
        order = np.argsort(-chosen, axis=None)[:6]
        named = [(int(o) // heads.shape[2], int(o) % heads.shape[2]) for o in order]
        print("heads that retrieve (layer, head): " + ", ".join(f"{k, h} {100 * rest[k, h]:.0f}%" for k, h in named))


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "table":
        parser = argparse.ArgumentParser()
        parser.add_argument("table")
        parser.add_argument("rows", type=Path)
        parser.add_argument("--keep", type=float, choices=KEEPS, default=0.25)
        args = parser.parse_args()
        table(args.rows, args.keep)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    collect(parser.parse_args())


if __name__ == "__main__":
    main()
