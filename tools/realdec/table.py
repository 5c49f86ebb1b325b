"""Tables of results.

python tools/realdec/table.py RESULTS.jsonl [RESULTS.jsonl ...] --experiment depth [--split dev] [--tasks]

One row for each method, and for each model: share of right answers and of unchanged ones in %, the latter with its 95%
interval (bootstrap over items), KL divergence of the first token and mean over the answer in nats. A model's columns
are about the items that all methods have answered which it was asked with.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from experiments import EXPERIMENTS

from star_edge.evaluation.statistics import mean_interval

Line = dict[str, object]


def read(paths: list[Path], split: str) -> dict[str, dict[str, dict[str, Line]]]:
    """model -> method -> item -> its last line."""
    answers: dict[str, dict[str, dict[str, Line]]] = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        for line in map(json.loads, path.read_text().splitlines()):
            if line["split"] == split:
                answers[line["model"]][line["method"]][line["item"]] = line
    return answers


def cells(lines: list[Line], was_right: set[str]) -> list[str]:
    """right, same, same of those that were right, KL, KL answer."""
    items = [str(line["item"]) for line in lines]
    same = [float(bool(line["same"])) for line in lines]
    of_right = [s for s, item in zip(same, items) if item in was_right]
    low, high = mean_interval(same, items) or (0.0, 1.0)
    return [
        f"{100 * np.mean([bool(line['right']) for line in lines]):.0f}",
        f"{100 * np.mean(same):.0f} ({100 * low:.0f} to {100 * high:.0f})",
        f"{100 * np.mean(of_right):.0f}" if of_right else "-",
        f"{np.mean([line['kl'] for line in lines]):.3f}",
        f"{np.mean([line['kl_answer'] for line in lines]):.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--tasks", action="store_true", help="unchanged answers of each task instead")
    args = parser.parse_args()
    names = ["unpruned", *(m.name for m in EXPERIMENTS[args.experiment])]
    table = {name: [name] for name in names}
    head = ["method"]
    for model, methods in read(args.results, args.split).items():
        mine = [name for name in names if name in methods]
        if "unpruned" not in mine:
            continue
        common = sorted(set.intersection(*(set(methods[name]) for name in mine)))
        print(f"{model}, {args.split}: {len(common)} items")
        was_right = {item for item in common if methods["unpruned"][item]["right"]}
        tasks = sorted({str(methods["unpruned"][item]["task"]) for item in common}) if args.tasks else []
        short = model.split("-")[0]
        columns = [f"{short}: average rows", *(tasks or ["right", "same", "same of right", "KL", "KL answer"])]
        head += columns
        for name in names:
            if name not in mine:
                table[name] += ["-"] * len(columns)
                continue
            lines = [methods[name][item] for item in common]
            table[name].append(f"{100 * np.mean([line['average'] for line in lines]):.0f}")
            if args.tasks:
                by_task = {t: [bool(x["same"]) for x in lines if x["task"] == t] for t in tasks}
                table[name] += [f"{100 * np.mean(by_task[t]):.0f}" for t in tasks]
            else:
                table[name] += cells(lines, was_right)
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in table.values():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
