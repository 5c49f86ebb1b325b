"""Train the reference model: first the encoder on patch labels, then everything on questions.

python tools/refvlm/train.py --out DIR [--size small] [--device cpu] [--seed 0]

A run that was killed goes on from DIR/checkpoint.pt with the pictures that it would have seen. Progress is in
DIR/log.jsonl (what came after the checkpoint is there twice then), the weights are in DIR/model.pt at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import IGNORED, make_batch
from model import SIZES, ModelConfig, ReferenceVLM
from muon import Muon
from questions import FAMILIES
from scenes import SceneGenerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vocabulary import EOS

PHASES = ("dense", "joint")


@dataclass(frozen=True)
class Plan:
    """Lengths and rates of a run. Rates are AdamW's; Muon, on the matrices of the blocks, takes twice that."""

    dense_steps: int = 880
    dense_pictures: int = 32  # per step
    dense_rate: float = 1.2e-3
    joint_steps: int = 2225
    joint_pictures: int = 16
    decoder_rate: float = 1.5e-3
    encoder_rate: float = 6e-4
    frozen_share: float = (
        0.12  # of the joint steps: the encoder waits until the decoder's first gradients are no longer noise
    )
    dense_weight: float = 0.25  # of the patch loss in the joint phase
    end_weight: float = 0.1  # of the end of an answer, which is learnt at once
    log_every: int = 25
    checkpoint_every: int = 50

    def steps(self, phase: str) -> int:
        return self.dense_steps if phase == "dense" else self.joint_steps


PLANS = {
    "small": Plan(),
    # Not trained yet: ten times the pictures, rates halved for twice the depth
    "large": Plan(
        dense_steps=4400,
        dense_pictures=64,
        dense_rate=6e-4,
        joint_steps=11000,
        joint_pictures=32,
        decoder_rate=7.5e-4,
        encoder_rate=3e-4,
    ),
}
SMOKE = {
    "dense_steps": 12,
    "dense_pictures": 4,
    "joint_steps": 16,
    "joint_pictures": 2,
    "log_every": 4,
    "checkpoint_every": 8,
}


def dense_multiplier(step: int, n_steps: int) -> float:
    """Warm-up, level until half, then down in a line."""
    done = step / n_steps
    return min(1.0, (step + 1) / 80) * min(1.0, max(0.08, 2 - 2 * done))


def joint_multiplier(step: int, n_steps: int) -> float:
    """Warm-up, then down along a cosine."""
    return min(1.0, (step + 1) / 150) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * step / n_steps)))


class Group:
    """Parameters that are clipped and stepped together: Muon on the matrices of transformer blocks, AdamW on the
    rest.
    """

    def __init__(self, matrices: list[Tensor], rest: list[Tensor], rate: float, weight_decay: float):
        self.parameters = matrices + rest
        self.rate = rate
        self.muon = Muon(matrices, lr=rate)
        self.adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)

    def step(self, multiplier: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, factor in ((self.muon, 2.0), (self.adamw, 1.0)):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor * multiplier
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def encoder_group(model: ReferenceVLM, rate: float) -> Group:
    matrices = [p for p in model.vision.blocks.parameters() if p.ndim == 2]
    own = [*model.vision.parameters(), *model.patch_head.parameters(), *model.presence_head.parameters()]
    return Group(matrices, _without(own, matrices), rate, 0.02)


def decoder_group(model: ReferenceVLM, rate: float) -> Group:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    encoder = encoder_group(model, rate).parameters
    return Group(matrices, _without(list(model.parameters()), matrices + encoder), rate, 0.01)


def default_precision(device: str) -> str:
    """Without its own instructions bf16 is emulated, forty times slower than f32 on a CPU that has AVX2 only."""
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if fast else "f32"


def _without(parameters: list[Tensor], taken: list[Tensor]) -> list[Tensor]:
    ids = {id(p) for p in taken}
    return [p for p in parameters if id(p) not in ids]


class StepBatches(Dataset):
    """The batch of each step of a phase, as tensors."""

    def __init__(self, generator: SceneGenerator, phase: str, n_pictures: int):
        self.generator, self.phase, self.n_pictures = generator, phase, n_pictures

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch = make_batch(self.generator, self.phase, step, self.n_pictures)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class Trainer:
    """One run: the model, the functions that compute it, and where it writes."""

    def __init__(
        self,
        out: Path,
        config: ModelConfig,
        plan: Plan,
        seed: int,
        device: str,
        precision: str,
        compiled: bool,
        workers: int,
    ):
        torch.manual_seed(seed)
        self.out, self.plan, self.seed, self.device, self.workers = out, plan, seed, device, workers
        self.precision = precision
        self.generator = SceneGenerator("train", seed, config.scenes)
        self.model = ReferenceVLM(config).to(device)
        compiler: Callable = torch.compile if compiled else lambda function: function
        self.encode = compiler(self.model.vision)
        self.decode = compiler(self.model.decode)
        self.identity = {"config": asdict(config), "plan": asdict(plan), "seed": seed, "precision": precision}
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        saved = self._load()
        for phase in PHASES[PHASES.index(saved["phase"]) :]:
            groups = self._groups(phase)
            first = 0
            if saved["phase"] == phase:
                first = saved["step"]
                for group, state in zip(groups, saved["groups"]):
                    group.load_state_dict(state)
            self._run_phase(phase, groups, first)
        self._save(self.out / "model.pt", {**self.identity, "model": self.model.state_dict()})

    def _run_phase(self, phase: str, groups: list[Group], first: int) -> None:
        plan = self.plan
        n_pictures = plan.dense_pictures if phase == "dense" else plan.joint_pictures
        train_step = self._dense_step if phase == "dense" else self._joint_step
        batches = DataLoader(
            StepBatches(self.generator, phase, n_pictures),
            batch_size=None,  # a step's batch is made in one piece
            sampler=range(first, plan.steps(phase)),
            num_workers=self.workers,
        )
        averages = Averages()
        start = time.perf_counter()
        for step, batch in enumerate(batches, first):
            averages.add(train_step({k: v.to(self.device) for k, v in batch.items()}, step, groups))
            done = step + 1
            if done % plan.log_every == 0 or done == plan.steps(phase):
                seconds = round(time.perf_counter() - start, 1)  # since this process began the phase
                self._log(
                    {"phase": phase, "step": done, "pictures": done * n_pictures, "seconds": seconds, **averages.take()}
                )
            if done % plan.checkpoint_every == 0 or done == plan.steps(phase):
                state = {"phase": phase, "step": done, "groups": [g.state_dict() for g in groups]}
                self._save(self.out / "checkpoint.pt", {**self.identity, **state, "model": self.model.state_dict()})

    def _groups(self, phase: str) -> list[Group]:
        if phase == "dense":
            return [encoder_group(self.model, self.plan.dense_rate)]
        return [decoder_group(self.model, self.plan.decoder_rate), encoder_group(self.model, self.plan.encoder_rate)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def _dense_step(self, batch: dict[str, Tensor], step: int, groups: list[Group]) -> dict[str, float | Tensor]:
        multiplier = dense_multiplier(step, self.plan.dense_steps)
        with self._autocast():
            encoded = self.encode(batch["pixels"])
        loss, accuracy = self.model.patch_loss(encoded.float(), batch["labels"], batch["presence"])
        loss.backward()
        groups[0].step(multiplier)
        return {"loss": loss.detach(), "rate": self.plan.dense_rate * multiplier, **accuracy}

    def _joint_step(self, batch: dict[str, Tensor], step: int, groups: list[Group]) -> dict[str, float | Tensor]:
        plan = self.plan
        multiplier = joint_multiplier(step, plan.joint_steps)
        n_frozen = int(plan.frozen_share * plan.joint_steps)
        frozen = step < n_frozen
        with self._autocast():
            with torch.set_grad_enabled(not frozen):
                encoded = self.encode(batch["pixels"])
            logits = self.decode(encoded, batch["ids"])
        logits = logits.float()
        answer_loss = self._answer_loss(logits, batch["targets"])
        loss, accuracy = answer_loss, {}
        if not frozen:
            patch_loss, accuracy = self.model.patch_loss(encoded.float(), batch["labels"], batch["presence"])
            loss = answer_loss + plan.dense_weight * patch_loss
        loss.backward()
        groups[0].step(multiplier)
        if not frozen:
            groups[1].step(multiplier * min(1.0, (step - n_frozen) / 100))
        right = self._right(logits.detach(), batch["targets"])
        by_family = {f: right[batch["families"] == i].float().mean() for i, f in enumerate(FAMILIES)}
        return {"loss": answer_loss.detach(), "rate": plan.decoder_rate * multiplier, **by_family, **accuracy}

    def _answer_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits: (B, Q, T, vocabulary), targets: (B, Q, T)."""
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED, reduction="none")
        weight = (targets != IGNORED).float()
        weight[targets == EOS] = self.plan.end_weight
        return (loss * weight.flatten()).sum() / weight.sum()

    @staticmethod
    def _right(logits: Tensor, targets: Tensor) -> Tensor:
        """Which answers are right in every token, the true ones before it given: (B, Q)."""
        return ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(-1)

    def _log(self, row: dict) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a") as file:
            print(line, file=file)

    @staticmethod
    def _save(path: Path, state: dict) -> None:
        # A kill while writing must not cost the run
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def _load(self) -> dict:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return {"phase": PHASES[0], "step": 0, "groups": []}
        saved = torch.load(path, map_location=self.device)
        if any(saved[key] != value for key, value in self.identity.items()):
            raise SystemExit(f"{path} is of another run (size, plan, seed or precision): give another --out")
        self.model.load_state_dict(saved["model"])
        self._log({"resumed": saved["phase"], "step": saved["step"]})
        return saved


class Averages:
    """Means of named values since the last take; values that are not defined in a step (NaN) do not count."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: dict[str, float | Tensor]) -> None:
        for name, value in values.items():
            value = value.item() if isinstance(value, Tensor) else value
            if not math.isnan(value):
                self._values[name].append(value)

    def take(self) -> dict[str, float]:
        means = {name: round(sum(v) / len(v), 6) for name, v in self._values.items()}
        self._values.clear()
        return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--precision",
        choices=("f32", "bf16"),
        help="of the matrix products; by default bf16 where the device has instructions for it",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that make pictures; some for a GPU, none where torch needs every core",
    )
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--dense-steps", type=int)
    parser.add_argument("--joint-steps", type=int)
    parser.add_argument(
        "--smoke", action="store_true", help="a few dozen tiny steps, to see that all of it runs; learns nothing"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = {"dense_steps": args.dense_steps, "joint_steps": args.joint_steps}
    plan = replace(PLANS[args.size], **(SMOKE if args.smoke else {}))
    plan = replace(plan, **{name: value for name, value in chosen.items() if value is not None})
    precision = args.precision or default_precision(args.device)
    Trainer(
        args.out, SIZES[args.size], plan, args.seed, args.device, precision, not args.no_compile, args.workers
    ).run()


if __name__ == "__main__":
    main()
