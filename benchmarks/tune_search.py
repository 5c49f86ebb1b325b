"""The search of `star-edge tune` in a simulated world, where the fastest config that keeps enough is known.

python benchmarks/tune_search.py [--questions 60,100,200,400] [--worlds 20] [--keep 0.98]

Each world has an unpruned model that is right on 90% of the questions, five stages whose values harm questions in
different degrees (a question is lost when the harms add up to more than it bears), and times of an encoder and a
decoder in proportion to the tokens in their layers, with 5% noise. After the search 2,000 further questions say what a
config really keeps. Nothing is computed by a model: it takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import numpy as np

from star_edge.evaluation.axes import excludes, make_axes, make_config
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.evaluation.trials import Part, Trial, split
from star_edge.evaluation.tuning import Search, guard
from star_edge.io.questions import Question
from star_edge.pruning.config import PruneConfig

LAYERS, FURTHER = 12, 2000


class World:
    """One world. questions: those that a user has; more follow them in `right`."""

    def __init__(self, seed: int, n: int, noise: float = 0.05) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self.axes = make_axes([10, 8, 6, 4, 3], None)
        self.questions = [Question(str(i), (f"{seed}-{i}.png",), ("",), "what?", ("yes",)) for i in range(n)]
        n_all, n_axes = n + FURTHER, len(self.axes)
        self.base = rng.random(n_all) < 0.9
        self.bears = rng.lognormal(0.5, 1.0, n_all)
        self.harm = rng.gamma(0.5, 1.0, (n_all, n_axes)) * rng.gamma(0.6, 1.0, n_axes)
        self.encoder, self.decoder, self.redundant = rng.uniform(0.1, 1.5), rng.uniform(0.3, 1.5), rng.uniform(0, 0.4)
        self.noise, self.asked = noise, 0
        self.records: dict[tuple[str, str], dict[str, object]] = {}
        self.points: dict[str, tuple[int, ...]] = {}
        for point in itertools.product(*(range(len(axis.values) + 1) for axis in self.axes)):
            if not excludes(self.axes, point):
                name = make_config(self.axes, point).name
                if name not in self.points or sum(point) < sum(self.points[name]):
                    self.points[name] = point

    def right(self, name: str) -> np.ndarray:
        strength = np.array([(n / len(axis.values)) ** 2 for axis, n in zip(self.axes, self.points[name])])
        return self.base & (self.harm @ strength < self.bears)

    def time(self, prune: PruneConfig | None) -> float:
        if prune is None:
            return self.encoder + self.decoder + 0.05
        shares = {"off": 0.0, "exact": 0.3, 0.03: 0.7, 0.06: 1.0}
        picture = float(prune.image_max_tokens) * (1 - self.redundant * shares[prune.redundancy])
        encoder = self.encoder * picture * (0.25 + 0.75 * prune.encoder_keep) + 0.02 * (prune.encoder_keep < 1)
        rows = min(prune.vision_keep, prune.encoder_keep) * picture
        kept = min(prune.decoder_keep * picture, rows)
        k = prune.decoder_layer or LAYERS
        return encoder + self.decoder * (k * rows + (LAYERS - k) * kept) / LAYERS + 0.05

    def speed(self, name: str) -> float:
        return self.time(None) / self.time(make_config(self.axes, self.points[name]).prune)

    def ask(self, questions: Sequence[Question], configs: Sequence[NamedConfig]) -> dict[tuple[str, str], dict]:
        known = {c.name: (self.right(c.name), self.time(c.prune)) for c in configs}
        for question, config in itertools.product(questions, configs):
            if (question.id, config.name) not in self.records:
                self.asked += 1
                right, time = known[config.name]
                noise = np.exp(self.rng.normal(0, self.noise, 2))
                self.records[question.id, config.name] = {
                    "score": float(right[int(question.id)]),
                    "first_token_ms": time * noise[0],
                    "unpruned_first_token_ms": self.time(None) * noise[1],
                }
        return self.records

    def truth(self, name: str) -> float:
        """What a config keeps on the further questions."""
        n = len(self.questions)
        return self.right(name)[n:].sum() / self.base[n:].sum()

    def fastest(self, keep: float) -> float:
        """The speed of the fastest config that keeps enough there."""
        return max(self.speed(name) for name in self.points if name == OFF.name or self.truth(name) >= keep)


def name(trial: Trial | None) -> str:
    return OFF.name if trial is None else trial.config.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default="60,100,200,400")
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.98)
    args = parser.parse_args()
    print("| questions | answers | chosen: keeps, % | speed | checked: keeps, % | worst tenth | speed | not to prune |")
    print("|---|---|---|---|---|---|---|---|")
    for n in map(int, args.questions.split(",")):
        rows = []
        for seed in range(args.worlds):
            world = World(seed, n)
            parts = split(world.questions)
            part = Part(world.ask, parts.choice, "exact", args.keep)
            choice = Search(world.axes, part).run()
            checking = Part(world.ask, parts.guard, "exact", args.keep) if parts.guard else None
            found = [name(choice.best), name(guard(choice, part, checking).best)]
            fastest = world.fastest(args.keep)
            figures = [[world.truth(x), np.log(world.speed(x) / fastest)] for x in found]
            rows.append([world.asked, *figures[0], *figures[1], found[1] == OFF.name])
        asked, kept, speed, kept_checked, speed_checked, off = np.array(rows, float).T
        print(
            f"| {n} | {asked.mean():.0f} | {100 * kept.mean():.1f} | {np.exp(speed.mean()):.2f} "
            f"| {100 * kept_checked.mean():.1f} | {100 * np.quantile(kept_checked, 0.1):.1f} "
            f"| {np.exp(speed_checked.mean()):.2f} | {off.sum():.0f} of {len(off)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
