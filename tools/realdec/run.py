"""Asks items with the methods of an experiment, and appends one JSON line for each answer.

python tools/realdec/run.py MODEL.gguf EXPERIMENTS --out RESULTS.jsonl [--split dev] [--items 15] [--seconds 150]

A run goes on where the last one stopped: the same command again. --items is a number for each task. --seconds ends a
run early, between two items. One thread by default, so that it can run beside other work.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from experiments import EXPERIMENTS
from methods import Method
from realdec import RealDecoder, Reply, is_right
from tasks import TASKS, make

from star_edge.io.results_file import open_alone


def record(reply: Reply, unpruned: Reply, right: bool) -> dict[str, object]:
    return {
        "right": right,
        "same": reply.text == unpruned.text,
        "kl": reply.kl,
        "kl_answer": reply.kl_answer,
        "text": reply.text,
        "in_place": reply.in_place,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("experiment", help=f"one or several, with commas: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--items", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    with open_alone(args.out) as file:
        done = {(r["model"], r["item"], r["method"]) for r in map(json.loads, file)}
        decoder: RealDecoder | None = None
        for index in range(args.items):
            for task in TASKS:
                item = make(args.split, task, index)
                methods = [m for name in args.experiment.split(",") for m in EXPERIMENTS[name]]
                missing = [m for m in methods if (args.model.stem, item.name, m.name) not in done]
                if not missing:
                    continue
                if time.monotonic() > end:
                    return
                decoder = decoder or RealDecoder(args.model, args.threads)
                for line in ask(decoder, item, missing):
                    line = {"model": args.model.stem, "split": args.split, "task": task, "item": item.name, **line}
                    file.write((json.dumps(line) + "\n").encode())
                file.flush()
    print(f"{args.model.stem} {args.experiment}: done")


def ask(decoder: RealDecoder, item, methods: list[Method]):
    """A record for the unpruned answer, and one for each method."""
    prompt = decoder.read(item)
    unpruned = decoder.answer(prompt, None)
    yield {"method": "unpruned", "average": 1.0, **record(unpruned, unpruned, is_right(unpruned.text, item))}
    read: list = []

    def attention():
        if not read:
            read.append(decoder.attention(prompt)[0])
            decoder.owner.kv_cache_clear()
        return read[0]

    n_layers = decoder.n_layers
    # those that share layer K come after each other, so that the rows below it are decoded once
    for method in sorted(methods, key=lambda m: (m.layers(n_layers)[0], m.seen_below)):
        context = method.enter(prompt.segments[1])
        n_first = len(context.rows)
        stage = method.stage(n_layers, prompt.n_context, attention, prompt.rows_of(item.facts), n_first)
        entered = replace(prompt, segments=[prompt.segments[0], context, prompt.segments[2]])
        reply = decoder.answer(entered, stage, unpruned)
        average = method.average(n_layers, prompt.n_context, n_first)
        yield {"method": method.name, "average": average, **record(reply, unpruned, is_right(reply.text, item))}


if __name__ == "__main__":
    main()
