"""Accuracy of the shipped reference model under each preset, with and without representatives, on the tests' held-out questions.

python benchmarks/accuracy.py [--limit N]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from star_edge import PRESETS, StarVLM, refvlm

FOLDER = Path(__file__).parent.parent / "tests" / "refvlm_questions"
FAMILIES = ("exist", "color", "digit", "plate", "count", "where")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int)
    questions = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()][: parser.parse_args().limit]
    table = Table("preset", "average tokens", *FAMILIES, "all", title=f"exact match on {len(questions)} questions, %")
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as vlm:
        plain = {f"{name} without representatives": replace(config, representatives="none") for name, config in PRESETS.items() if config}
        for preset, config in (PRESETS | plain).items():
            right = defaultdict(list)
            for q in track(questions, preset, transient=True):
                answer = vlm.generate(q["question"], FOLDER / q["image"], config, max_tokens=4)
                right[q["family"]].append(answer.text.strip() == q["answer"])
                right["all"].append(answer.text.strip() == q["answer"])
            share = lambda name, right=right: f"{100 * sum(right[name]) / len(right[name]):.1f}" if right[name] else "-"
            table.add_row(preset, f"{answer.report.average_tokens:.0f}", *(share(f) for f in FAMILIES), share("all"))
    Console().print(table)


if __name__ == "__main__":
    main()
