"""Write a held-out split as files: PNG pictures, questions.jsonl and objects.jsonl.

python tools/refvlm/make_questions.py --split test --out DIR [--images N] [--size small]
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from PIL import Image
from questions import FAMILIES, HELD_OUT_PLAN, held_out_questions
from scenes import LARGE_SCENES, SMALL_SCENES, SceneGenerator

CONFIGS = {"small": SMALL_SCENES, "large": LARGE_SCENES}
N_BACKGROUNDS = 150
DEFAULT_IMAGES = 1000  # a plate stands in about 55% of the pictures, and every family should have 500 questions


def write_split(
    split: str, out: Path, n_images: int = DEFAULT_IMAGES, seed: int = 0, size: str = "small"
) -> tuple[Counter, str]:
    """Returns the questions per family and a SHA-256 over the decoded pixels and the question rows."""
    generator = SceneGenerator(split, seed, CONFIGS[size], N_BACKGROUNDS)
    out.mkdir(parents=True, exist_ok=True)
    counts: Counter = Counter()
    digest = hashlib.sha256()
    with open(out / "questions.jsonl", "w") as question_file, open(out / "objects.jsonl", "w") as object_file:
        for index in range(n_images):
            rng = generator.rng("scene", index)
            scene = generator.scene(rng)
            name = f"{index:04d}.png"
            Image.fromarray(scene.pixels).save(out / name)
            digest.update(scene.pixels.tobytes())
            print(json.dumps({"image": name, "objects": [o.as_dict() for o in scene.objects]}), file=object_file)
            for q in held_out_questions(scene, rng):
                row = {
                    "id": counts.total(),
                    "image": name,
                    "category": q.family,
                    "question": q.question,
                    "answer": q.answer,
                }
                line = json.dumps(row)
                digest.update(line.encode())
                print(line, file=question_file)
                counts[q.family] += 1
    return counts, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("dev", "test"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--images",
        type=int,
        default=DEFAULT_IMAGES,
        help=f"up to {len(HELD_OUT_PLAN)} questions are asked about each (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=CONFIGS, default="small")
    args = parser.parse_args()
    counts, digest = write_split(args.split, args.out, args.images, args.seed, args.size)
    print(
        f"{args.images} pictures, {counts.total()} questions: "
        + ", ".join(f"{family} {counts[family]}" for family in FAMILIES)
    )
    print(f"sha256 {digest}")


if __name__ == "__main__":
    main()
