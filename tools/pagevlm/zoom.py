"""An experiment: look where the question looks. A picture of half the side is read, the attention of the question
in the decoder chooses units of the full picture, and only these are encoded for the answer.

    python make_questions.py --split dev --out DEV
    python zoom.py DEV [--each 12]

A unit is the square of pixels that becomes one image token. Beside it stand the same numbers of units that the full
picture's own attention chooses (a bound: it has been encoded then), that chance chooses, and that the encoder stage
leaves. README.md has what came of it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from star_edge import PruneConfig, StarVLM
from star_edge.vision import encode

MODEL = Path(__file__).parent / "model"
LAYERS = (5, 6, 7)  # of 12: where heads of this model find places
UNIT = 28  # pixels along a side
SHARES = (0.25, 0.5)


def attention(vlm: StarVLM, pixels: np.ndarray, question: str) -> np.ndarray:
    """What the question's text gives each image token, (rows, columns): the most of any head, summed over LAYERS."""
    seen = vlm.inspect(question, [pixels], decoder_layers=LAYERS)
    image = np.flatnonzero(seen.image_of_token == 0)
    text = np.arange(image[-1] + 1, len(seen.image_of_token))
    total = sum(seen.decoder[layer][:, text][:, :, image].max(axis=0).mean(axis=0) for layer in LAYERS)
    return np.asarray(total).reshape(seen.grids[0])


def answer_from(vlm: StarVLM, pixels: np.ndarray, question: str, units: np.ndarray) -> str:
    """The answer when nothing but these units of the picture is encoded, at their true places."""

    def only_these(all_pixels: np.ndarray, grid: tuple[int, int], tolerance: float = 0.0) -> np.ndarray:
        stands = np.full(grid[0] * grid[1], units[0])
        stands[units] = units
        return stands

    original = encode.representatives
    encode.representatives = only_these
    try:
        config = PruneConfig(redundancy=0.001, representatives="none")
        return vlm.generate(question, [pixels], config, max_tokens=12).text.strip()
    finally:
        encode.representatives = original


def resized(scores: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.asarray(Image.fromarray(scores.astype(np.float32)).resize((columns, rows), Image.BILINEAR)).ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="folder of make_questions.py")
    parser.add_argument("--each", type=int, default=12, help="questions of each family (%(default)s)")
    args = parser.parse_args()
    families = defaultdict(list)
    for line in (args.questions / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["tokens"] >= 144:
            families[row["category"]].append(row)
    rng = random.Random(0)
    rows = [row for family in families.values() for row in rng.sample(family, args.each)]
    text, mmproj = (next(p for p in MODEL.glob("*.gguf") if ("mmproj" in p.name) == is_mmproj) for is_mmproj in (0, 1))
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    with StarVLM(text, mmproj, n_ctx=2048, n_threads=1, image_cache_bytes=0) as vlm:
        for row in rows:
            full = Image.open(args.questions / row["image"]).convert("RGB")
            half = full.resize((full.width // 2, full.height // 2), Image.BICUBIC)
            full, half = np.asarray(full), np.asarray(half)
            grid = full.shape[0] // UNIT, full.shape[1] // UNIT

            def note(name: str, answer: str, row: dict = row) -> None:
                right[name][row["category"]].append(answer == row["answer"])

            def ask(pixels: np.ndarray, config: PruneConfig | None = None, row: dict = row) -> str:
                return vlm.generate(row["question"], [pixels], config, max_tokens=12).text.strip()

            note("unpruned", ask(full))
            note("half the side", ask(half))
            choices: dict[str, Callable[[], np.ndarray]] = {
                "half's attention": lambda half=half, row=row: attention(vlm, half, row["question"]),
                "full's attention": lambda full=full, row=row: attention(vlm, full, row["question"]),
                "chance": lambda grid=grid: np.random.default_rng(len(right["unpruned"])).random(grid),
            }
            for name, choose in choices.items():
                order = np.argsort(-resized(choose(), *grid), kind="stable")
                for share in SHARES:
                    units = np.sort(order[: max(8, int(share * len(order)))])
                    note(f"{name}, {share:.0%}", answer_from(vlm, full, row["question"], units))
            for share in SHARES:
                note(f"encoder stage, {share:.0%}", ask(full, PruneConfig(encoder_keep=share)))
    names = list(families)
    print("| units encoded | " + " | ".join(names) + " | all |\n" + "|---" * (len(names) + 2) + "|")
    for what, of in right.items():
        everything = [one for answers in of.values() for one in answers]
        cells = [f"{100 * np.mean(answers):.0f}" for answers in (*(of[name] for name in names), everything)]
        print(f"| {what} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
