"""How long choosing what stays takes, alone: both stages, on arrays of real sizes.

    python benchmarks/choosing.py [--threads 1 2] [--repeats 5] [--beside CHECKOUT]

--beside takes turns with another checkout of the repository, such as an older one (git worktree add), which chooses on
one thread. Its Python is used with the C core that is installed here. Vectors are smooth over the picture, with some
noise. Times are of the wall, and for one thread also of the processor, which other work on the machine does not
lengthen.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from star_edge.pruning.config import PruneConfig

# name: images of the prompt, columns and rows of each, width of the decoder, tokens after the vision stage and after K
CASES = {
    "LLaVA-NeXT-7B, 5 x 576 tokens": (5, 24, 4096, 1080, 540),
    "LLaVA-1.5-7B, 576 tokens": (1, 24, 4096, 216, 108),
    "Qwen2.5-VL-3B, 1,024 tokens": (1, 32, 2048, 384, 192),
}
CONFIGS = {
    "counts": PruneConfig(0.375, 0.1875),
    "tolerance": PruneConfig(0.3, 0.15, vision_tolerance=0.2),
}


def smooth(seed: int, side: int, width: int) -> np.ndarray:
    """(side * side, width) float32: a few things on a picture, half of it plain."""
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(side * side), side)
    centres = rng.random((16, 2)) * side
    near = np.exp(-((row[:, None] - centres[:, 0]) ** 2 + (column[:, None] - centres[:, 1]) ** 2) / (side * side / 60))
    noise = 0.1 * rng.standard_normal((side * side, width)) * (rng.random((side * side, 1)) < 0.5)
    out: np.ndarray = near @ rng.standard_normal((16, width)) + noise + 0.3 * rng.standard_normal(width)
    return out.astype(np.float32)


@dataclass
class Package:
    """`star_edge.pruning` of a checkout."""

    choose: ModuleType
    selection: ModuleType
    representatives: ModuleType
    blas: ModuleType

    @classmethod
    def of(cls, name: str) -> Package:
        parts = ("choose", "selection", "representatives", "blas")
        return cls(*(importlib.import_module(f"{name}.pruning.{part}") for part in parts))

    def candidates(self, arrays: list[tuple[Any, ...]]) -> list[Any]:
        tokens = [self.selection.Tokens(*fields) for fields in arrays]
        return [self.choose.Candidates(t, None, 0, t.grid[0] * t.grid[1]) for t in tokens]

    def run(self, policy: Any, arrays: list[tuple[Any, ...]], total: int, merges: bool, n_threads: int) -> list[Any]:
        """Selections, and merged vectors in the vision stage."""
        images = self.candidates(arrays)
        most = policy.tolerance < np.inf

        n_images = min(n_threads, len(images)) if merges and hasattr(self.blas, "spread") else 1
        of_each = {}  # a version of before chooses from an image on one thread
        if "n_threads" in inspect.signature(self.choose.choose).parameters:
            of_each = {"n_threads": max(1, n_threads // n_images)}

        def of_image(i: int) -> tuple[Any, Any]:
            image, n = images[i], counts[i]
            chosen = self.choose.choose(policy, image, n, len(image.tokens) if most else None, **of_each)
            return chosen, self.representatives.merge(image.tokens.vectors, chosen, **of_each) if merges else None

        with self.blas.one_blas_thread():
            if hasattr(self.choose, "prepare"):
                self.choose.prepare([(policy, image) for image in images], n_threads)
            for_all = {"n_threads": n_threads} if of_each else {}
            counts = self.choose.divide(policy, images, total, **for_all) if len(images) > 1 else [total]
            if n_images > 1:
                done: list[Any] = self.blas.spread(of_image, range(len(images)), n_images)
                return done
            return [of_image(i) for i in range(len(images))]


def time_of(work: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of the wall, and of this thread's processor."""
    wall, processor = time.perf_counter(), time.thread_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    options = parser.parse_args()
    sides = [(f"{n} thread{'s' * (n > 1)}", Package.of("star_edge"), n) for n in options.threads]
    if options.beside:
        before = ModuleType("before")
        before.__path__ = [str(options.beside / "star_edge")]
        sys.modules["before"] = before
        sys.modules["before._core"] = importlib.import_module("star_edge._core")
        sides.insert(0, ("beside", Package.of("before"), 1))
    print("milliseconds, median: wall (processor, where it is one thread)")
    for case, (n_images, side, width, n_vision, n_decoder) in CASES.items():
        pictures = [(smooth(i, side, width), np.arange(side * side), (side, side)) for i in range(n_images)]
        for label, config in CONFIGS.items():
            kept = sides[0][1].run(sides[0][1].choose.vision_policy(config, False), pictures, n_vision, True, 1)
            rng = np.random.default_rng(1)
            rows = [
                (vectors, s.kept, (side, side), s.mass, rng.random(len(s.kept)).astype(np.float32))
                for s, vectors in kept
            ]
            for stage, arrays, total in (("vision stage", pictures, n_vision), ("decoder stage", rows, n_decoder)):
                is_vision = stage == "vision stage"
                times: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in sides}
                for _ in range(options.repeats):
                    for name, package, n_threads in sides:
                        make = package.choose.vision_policy if is_vision else package.choose.decoder_policy
                        policy = make(config, False) if is_vision else make(config)
                        run = lambda: package.run(policy, arrays, total, is_vision, n_threads)  # noqa: B023
                        times[name].append(time_of(run))
                shown = []
                for name, _, n_threads in sides:
                    wall, processor = (statistics.median(column) for column in zip(*times[name]))
                    shown.append(f"{name} {wall:.1f}" + (f" ({processor:.1f})" if n_threads == 1 else ""))
                print(f"{case}, {label}, {stage}: {'; '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
