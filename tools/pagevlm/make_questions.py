"""Held-out pictures and questions: FAMILY/NNNN.png and questions.jsonl.

python tools/pagevlm/make_questions.py --split test --out DIR [--pictures 100] [--questions 6] [--clean]

Every picture is drawn from (split, 0, number, family, grid) alone. Choose on `dev`, report on `test`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from batches import cells
from pictures import FAMILIES, choose_facts, draw
from PIL import Image
from render import Renderer

# Grids in turn: of ten pictures three have 64 tokens and one has 1,024
GRIDS = ((8, 8), (12, 12), (16, 16), (8, 8), (24, 16), (12, 16), (24, 24), (8, 8), (16, 16), (32, 32))


def pictures(split: str, n: int, renderer: Renderer, questions: int, clean: bool):
    """Yields (file name, grey levels (height, width, 3), rows for questions.jsonl)."""
    for f, family in enumerate(FAMILIES):
        for i in range(n):
            grid = GRIDS[i % len(GRIDS)]
            p = draw(split, 0, i, family, grid)
            arrays = {name: torch.from_numpy(a) for name, a in cells([p]).items()}
            if clean:
                arrays |= {name: torch.zeros_like(arrays[name]) for name in ("noise", "shade")}
            generator = torch.Generator().manual_seed(1000 * i + f)
            pixels = renderer(arrays["cells"], arrays["palette"], arrays["noise"], arrays["shade"], generator)[0]
            name = f"{family}/{i:04d}.png"
            facts = list(dict.fromkeys(choose_facts(p, questions)))
            rows = [
                {
                    "image": name,
                    "category": family,
                    "kind": f.kind,
                    "tokens": grid[0] * grid[1],
                    "question": f.question,
                    "answer": f.answer,
                }
                for f in facts
            ]
            yield name, pixels.permute(1, 2, 0).byte().numpy(), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("dev", "test"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=100, help="of each family (%(default)s)")
    parser.add_argument("--questions", type=int, default=6, help="about each picture, at most (%(default)s)")
    parser.add_argument("--clean", action="store_true", help="no noise and no shade: as programs draw, not as paper is")
    args = parser.parse_args()
    for family in FAMILIES:
        (args.out / family).mkdir(parents=True, exist_ok=True)
    with open(args.out / "questions.jsonl", "w") as file:
        for name, pixels, rows in pictures(args.split, args.pictures, Renderer("cpu"), args.questions, args.clean):
            Image.fromarray(pixels).save(args.out / name, optimize=True)
            for row in rows:
                print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
