"""Answers of configs to held-out questions, without times: `star-edge eval` for many questions and few processors.

python tools/pagevlm/compare.py ask QUESTIONS/questions.jsonl CONFIGS.json --out RESULTS.jsonl [options]
python tools/pagevlm/compare.py table RESULTS.jsonl

CONFIGS.json is a file of `star-edge eval --configs`, in which an entry may be {"name": "balanced", "preset":
"balanced"}. Pictures are encoded once for all configs (--cache keeps them for the next run), and what questions about
one picture share is computed once, which changes no answer. Goes on where it stopped.

The table has, for each config: average tokens of the decoder's layers over those of the picture, and accuracy in each
family, in % of the model's own on the same questions, with the 95% bootstrap interval over pictures.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from star_edge import PRESETS, PruneConfig, StarVLM, refvlm
from star_edge.io.images import load_image

MODEL = Path(__file__).parent / "model"
OFF = {"name": "off", "preset": "off"}


def configs_of(path: Path) -> dict[str, PruneConfig | None]:
    configs = {}
    for entry in [OFF, *json.loads(path.read_text())]:
        fields = {key: value for key, value in entry.items() if key not in ("name", "method", "preset")}
        configs[entry["name"]] = PRESETS[entry["preset"]] if "preset" in entry else PruneConfig(**fields)
    return configs


def chosen(path: Path, n_pictures: int | None) -> list[dict]:
    """The questions about the first n_pictures of each family."""
    rows = [{"id": i, **json.loads(line)} for i, line in enumerate(path.read_text().splitlines())]
    rows = [{"category": row.get("family"), **row} for row in rows]  # as star-edge eval reads it
    pictures: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        of_family = pictures[row["category"] if n_pictures else ""]
        if row["image"] not in of_family:
            of_family.append(row["image"])
    wanted = {name for names in pictures.values() for name in names[:n_pictures]}
    return [row for row in rows if row["image"] in wanted]


def ask(
    args: argparse.Namespace,
    configs: dict[str, PruneConfig | None],
    before: Callable[[StarVLM, dict, np.ndarray, PruneConfig | None], None] | None = None,
) -> None:
    """Asks every question with every config. before: called with each question, picture and config first."""
    rows = chosen(args.questions, args.pictures)[: args.limit]
    done = set()
    if args.out.exists():
        done = {(r["config"], r["id"]) for r in map(json.loads, args.out.read_text().splitlines())}
    files = (refvlm.TEXT_MODEL, refvlm.MMPROJ) if args.refvlm else (args.text, args.mmproj)
    with (
        open(args.out, "a") as out,
        StarVLM(*files, n_ctx=1024 if args.refvlm else 2048, n_threads=1, image_cache_dir=args.cache) as vlm,
    ):
        for name, config in configs.items():
            for row in rows:
                if (name, row["id"]) in done:
                    continue
                picture = load_image(args.questions.parent / row["image"])
                if before is not None:
                    before(vlm, row, picture, config)
                answer = vlm.generate(row["question"], picture, config, max_tokens=8)
                record = {"config": name, "id": row["id"], "image": row["image"], "category": row["category"]}
                report = answer.report
                record |= {"tokens": report.n_image_tokens, "average_tokens": report.average_tokens}
                record |= {"right": answer.text.strip() == row["answer"], "answer": answer.text}
                print(json.dumps(record), file=out, flush=True)


def interval(values: list[float], unpruned: list[float], images: list[str]) -> tuple[float, float]:
    """95% bootstrap interval over pictures of the sum of `values` over that of `unpruned`."""
    _, number = np.unique(images, return_inverse=True)
    sums = np.array([np.bincount(number, weights=v) for v in (values, unpruned)])
    drawn = np.random.default_rng(0).integers(0, sums.shape[1], (2000, sums.shape[1]))
    ratios = sums[0][drawn].sum(axis=1) / np.maximum(1e-9, sums[1][drawn].sum(axis=1))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def table(args: argparse.Namespace) -> None:
    records: dict[str, dict[int, dict]] = defaultdict(dict)
    for line in args.results.read_text().splitlines():
        record = json.loads(line)
        records[record["config"]][record["id"]] = record
    off = records["off"]
    families = list(dict.fromkeys(r["category"] for r in off.values()))
    print("| config | n | tokens, % |", " | ".join(families), "| all | interval |")
    print("|" + "---|" * (len(families) + 5))
    for name, of_config in records.items():
        both = [(r, off[i]) for i, r in of_config.items() if i in off]
        cells = [name, str(len(both))]
        cells.append(f"{100 * np.mean([r['average_tokens'] / o['tokens'] for r, o in both]):.0f}")
        for family in (*families, None):
            mine = [(r["right"], o["right"]) for r, o in both if family in (None, r["category"])]
            cells.append(f"{100 * sum(a for a, _ in mine) / max(1, sum(b for _, b in mine)):.1f}" if mine else "")
        right = [[r["right"] for r, _ in both], [o["right"] for _, o in both]]
        low, high = interval(*right, [r["image"] for r, _ in both])
        print("|", " | ".join([*cells, f"{100 * low:.1f} to {100 * high:.1f}"]), "|")


def add_options(asking: argparse.ArgumentParser) -> None:
    asking.add_argument("questions", type=Path)
    asking.add_argument("--out", type=Path, required=True)
    asking.add_argument("--pictures", type=int, help="of each family, at most")
    asking.add_argument("--limit", type=int, help="the first questions alone, at most")
    asking.add_argument("--cache", help="folder for what the encoder makes of pictures")
    asking.add_argument("--text", type=Path, default=MODEL / "pagevlm-text-q5_0.gguf")
    asking.add_argument("--mmproj", type=Path, default=MODEL / "pagevlm-mmproj-q8_0.gguf")
    asking.add_argument("--refvlm", action="store_true", help="ask the reference model that ships with the package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    asking = commands.add_parser("ask")
    add_options(asking)
    asking.add_argument("configs", type=Path)
    asking.set_defaults(run=lambda args: ask(args, configs_of(args.configs)))
    tabling = commands.add_parser("table")
    tabling.add_argument("results", type=Path)
    tabling.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
