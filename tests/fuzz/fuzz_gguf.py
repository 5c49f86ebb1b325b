"""Mutated text, mmproj and LoRA files, each loaded and asked one question: no case may end in a signal, a hang or an untyped error.

    python tests/fuzz/fuzz_gguf.py --cases 5000 --first 0      # the cases are those seeds, whatever the machine
    python tests/fuzz/fuzz_gguf.py --seconds 60 --save DIR     # as many as there is time for; bad files stay in DIR
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from forking import run
from gguf_mutations import mutate

import star_edge
from star_edge import StarVLM
from star_edge.errors import StarEdgeError

FIXTURES = Path(__file__).parent.parent / "fixtures"
FAMILIES = sorted(p.name for p in FIXTURES.iterdir() if (p / "mmproj.gguf").exists())
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
CASE_SECONDS = 30


def ask(text: Path, mmproj: Path, prune: str | None) -> str:
    """Loads and asks. Typed errors are a result."""
    try:
        with StarVLM(text, mmproj, n_ctx=512, n_threads=1, image_cache_bytes=0) as vlm:
            answer = vlm.generate(f"a {star_edge.MEDIA_MARKER} b", [PICTURE], prune, max_tokens=2, chat=False)
            return f"answer {answer.finish_reason}"
    except StarEdgeError as error:
        return f"{type(error).__name__}: {error}"


def case(seed: int, folder: Path) -> tuple[Path, str, object]:
    """The mutated file of a seed, what was done, and the function that loads it."""
    rng = random.Random(seed)
    family, which = rng.choice(FAMILIES), rng.choice(("text", "mmproj", "mmproj"))
    source = FIXTURES / family / f"{which}.gguf"
    data, said = mutate(source.read_bytes(), seed)
    path = folder / f"{seed}.gguf"
    path.write_bytes(data)
    files = {"text": FIXTURES / family / "text.gguf", "mmproj": FIXTURES / family / "mmproj.gguf", which: path}
    prune = rng.choice((None, "balanced", "fast"))
    return path, f"{family} {which}: {said} (prune={prune})", lambda: ask(files["text"], files["mmproj"], prune)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    end, counts, bad = time.monotonic() + options.seconds, collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.cases):
            if time.monotonic() > end:
                break
            path, said, function = case(seed, Path(folder))
            result = run(function, CASE_SECONDS)
            kind = result.split(":")[0] if not result.startswith(("death", "untyped")) else result[:60]
            counts[kind] += 1
            failed = result.startswith(("death", "hang", "untyped"))
            bad += failed
            if failed or options.verbose:
                print(f"{seed}: {said}\n    {result[:300]}", flush=True)
            if failed and options.save:
                options.save.mkdir(parents=True, exist_ok=True)
                path.replace(options.save / path.name)
            path.unlink(missing_ok=True)
    print(f"{sum(counts.values())} GGUF files: {bad} bad; {dict(counts.most_common())}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
