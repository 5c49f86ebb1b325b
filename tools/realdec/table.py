"""Tables of results: python tools/realdec/table.py RESULTS.jsonl [EXPERIMENT] [--split dev] [--tasks]"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from experiments import EXPERIMENTS

from star_edge.evaluation.statistics import mean_interval


def percent(values: list[float], items: list[str], interval: bool = True) -> str:
    if not values:
        return "-"
    mean = f"{100 * np.mean(values):.0f}"
    between = mean_interval(values, items) if interval else None
    return mean if between is None else f"{mean} ({100 * between[0]:.0f} to {100 * between[1]:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--experiment")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--tasks", action="store_true", help="agreement by task too")
    args = parser.parse_args()
    answers: dict[str, dict[str, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for path in args.results:
        for line in map(json.loads, path.read_text().splitlines()):
            if line["split"] == args.split:
                answers[line["model"]][line["method"]][line["item"]] = line
    for model, methods in answers.items():
        names = list(methods)
        if args.experiment:
            wanted = [m.name for m in EXPERIMENTS[args.experiment]]
            names = ["unpruned", *(n for n in wanted if n in methods)]
        # the items that every method of the table has answered
        common = sorted(set.intersection(*(set(methods[n]) for n in names)))
        print(f"\n{model}, {args.split}: {len(common)} items\n")
        tasks = sorted({methods["unpruned"][i]["task"] for i in common}) if args.tasks else []
        columns = [
            "method",
            "average rows, %",
            "right, %",
            "same answer, %",
            "same of those right, %",
            "KL",
            "KL answer",
            *tasks,
        ]
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        was_right = {i for i in common if methods["unpruned"][i]["right"]}
        for name in names:
            lines = [methods[name][i] for i in common]
            kept_right = [x["item"] for x in lines if x["item"] in was_right]
            cells = [
                name,
                f"{100 * np.mean([x['average'] for x in lines]):.0f}",
                percent([float(x["right"]) for x in lines], common, interval=False),
                percent([float(x["same"]) for x in lines], common),
                percent([float(methods[name][i]["same"]) for i in kept_right], kept_right),
                f"{np.mean([x['kl'] for x in lines]):.3f}",
                f"{np.mean([x['kl_answer'] for x in lines]):.3f}",
            ]
            for task in tasks:
                of_task = [x for x in lines if x["task"] == task]
                cells.append(percent([float(x["same"]) for x in of_task], [], interval=False))
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
