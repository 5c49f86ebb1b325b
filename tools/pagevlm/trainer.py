"""The training of the page model: its phases, steps and log, within a time."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict, deque

import numpy as np
import torch
import torch.nn.functional as F
from batches import IGNORED, BatchPlan
from config import PATCH, SIZES
from curriculum import EVALUATION_GRIDS, SMOKE_STAGES, STAGES, Curriculum, Plan, questions_for, smaller
from feeder import Feeder
from model import PageVLM
from muon import Muon
from pictures import FAMILIES, KEY1, KEY2
from render import Renderer
from torch import Tensor, nn
from vocabulary import IM_END
from weights import load, load_encoder, save


class Group:
    """Parameters that are clipped and stepped together: Muon on matrices of blocks and merger, AdamW on the rest."""

    def __init__(self, modules: list[nn.Module], matrices_of: list[nn.Module], cuda: bool):
        chosen = {}
        for module in matrices_of:
            for m in module.modules():
                if isinstance(m, nn.Linear):
                    chosen[id(m.weight)] = (m.weight, getattr(m, "parts", 1))
        everything = {id(p): p for module in modules for p in module.parameters()}
        self.parameters = list(everything.values())
        self.muon = Muon(list(chosen.values()))
        rest = [p for i, p in everything.items() if i not in chosen]
        decay = [p for p in rest if p.ndim > 1]
        plain = [p for p in rest if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=cuda)

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Returns the norm of the gradients. Gradients that are not finite change nothing."""
        own = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in own]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        factor = torch.where(torch.isfinite(norm), (1.0 / norm.clamp(min=1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        torch._foreach_mul_(gradients, factor)
        for g in gradients:
            g.nan_to_num_(0.0, 0.0, 0.0)
        if rate > 0:
            self.muon.step(2 * rate)
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
        for p in own:
            p.grad = None
        return norm


class Trainer:
    def __init__(self, args: argparse.Namespace, plan: Plan, feeder: Feeder, started: float):
        self.plan, self.feeder, self.out = plan, feeder, args.out
        self.started, self.deadline = started, started + args.seconds
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.compute = torch.bfloat16 if self.cuda else torch.float32
        torch.manual_seed(args.seed)
        self.about = {"size": args.size, "seed": args.seed, "step": 0}
        self.new_heads = False
        if args.init:
            self.model, about = load(args.init)
            self.about["init_step"] = about.get("step")
            self.new_heads = about.get("new_heads", False)
            self.model.to(self.device)
        else:
            self.model = PageVLM(SIZES[args.size]).to(self.device)
            if args.encoder:
                load_encoder(self.model, args.encoder)
        self.continued = bool(args.init)
        self.render = Renderer(self.device)
        self.curriculum = Curriculum(plan, args.seed, SMOKE_STAGES if args.smoke else STAGES)
        m = self.model
        self.encoder_group = Group([m.vision, m.patch_heads], [m.vision.blocks], self.cuda)
        self.decoder_group = Group(
            [m.merge_in, m.merge_out, m.embedding, m.blocks, m.norm, m.head, m.term_maps, m.numbers],
            [m.merge_in, m.merge_out, m.blocks, m.term_maps],
            self.cuda,
        )
        self.step = 0
        self.batch_share = 1.0  # less after running out of memory
        self.sums: dict[str, list[Tensor | float]] = defaultdict(list)
        self.begun = self.end = 0.0
        self.passed = self.continued
        # where the decoder's own training begins
        self.dense_end = 0.0 if self.continued or args.encoder else plan.dense_share[1]

    def seconds(self) -> float:
        """Since the start of the process."""
        return round(time.time() - self.started, 1)

    # -- data

    def tensors(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        n = max(1, round(len(batch["ids"]) * self.batch_share))
        out = {}
        for name, array in batch.items():
            t = torch.from_numpy(array[:n])
            out[name] = (t.pin_memory() if self.cuda else t).to(self.device, non_blocking=True)
        for name in ("ids", "at", "targets", "place"):
            out[name] = out[name].long()
        return out

    def drawn(self, batch: dict[str, Tensor]) -> Tensor:
        """Pictures as they are drawn."""
        pixels: Tensor = self.render(batch["cells"], batch["palette"], batch["noise"], batch["shade"])
        return pixels

    def pixels(self, batch: dict[str, Tensor], plan: BatchPlan) -> Tensor:
        """Pictures as the model sees them."""
        pixels = self.drawn(batch)
        return pixels if plan.drawn is None else resize(pixels, plan.grid, random.Random(plan.first))

    # -- steps

    def train_step(self, plan: BatchPlan, arrays: dict[str, np.ndarray], phase: str, share: float) -> None:
        batch = self.tensors(arrays)
        pixels = self.pixels(batch, plan)
        suffix = "" if plan.drawn is None else "_smaller"
        # what is new has to learn first: until then it says nothing about the rest
        learns = self.new_heads and share < self.plan.new_heads_alone
        with torch.set_grad_enabled(phase != "frozen"):
            encoded = self.model.vision(pixels, self.compute)
        loss: Tensor | None = None
        if phase != "frozen":
            patch_loss, right = self.model.patch_loss(encoded.detach() if learns else encoded, batch["labels"])
            loss = patch_loss * (1.0 if phase == "dense" else self.plan.dense_weight)
            self.note({f"{k}{suffix}": v for k, v in {"patch_loss": patch_loss.detach(), **right}.items()})
        if phase != "dense":
            image = self.model.image_tokens(encoded)
            pointing = self.pointing_weight(share) > 0
            logits, pointing_loss, mass = self.model.decode_and_point(
                image, plan.grid, batch["ids"], batch["at"], batch["place"] if pointing else None
            )
            logits = logits.float()
            answer_loss = self.answer_loss(logits, batch["targets"])
            loss = answer_loss if loss is None else loss + answer_loss
            if pointing_loss is not None and mass is not None:
                token_loss, token_right = self.model.token_loss(image.detach() if learns else image, batch["labels"])
                loss = loss + self.pointing_weight(share) * token_loss
                self.note({f"token_loss{suffix}": token_loss.detach(), f"token_right{suffix}": token_right})
                loss = loss + self.pointing_weight(share) * pointing_loss
                self.note({f"pointing_loss{suffix}": pointing_loss.detach(), f"pointing{suffix}": mass})
            with torch.no_grad():
                right = exact(logits, batch["targets"])
                self.note({f"loss{suffix}": answer_loss.detach()})
                for i, family in enumerate(FAMILIES):
                    own = batch["family"] == i
                    self.note(
                        {
                            family + suffix: (right * own[:, None]).sum(),
                            f"n_{family}{suffix}": own.sum() * right.shape[1],
                        }
                    )
                self.note({f"right{suffix}": right.mean()})
                self.note({f"right_{plan.grid[0] * plan.grid[1]}{suffix}": right.mean()})
        assert loss is not None
        loss.backward()
        rate = self.rate(share)
        if phase != "dense":
            self.note({"norm": self.decoder_group.step(rate)})
        if phase != "frozen":
            self.note(
                {"v_norm": self.encoder_group.step(rate * (1.0 if phase == "dense" else self.plan.encoder_factor))}
            )

    def answer_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED, reduction="none")
        weight = (targets != IGNORED).float() * torch.where(targets == IM_END, self.plan.end_weight, 1.0)
        return (each * weight.flatten()).sum() / weight.sum().clamp(min=1)

    def note(self, values: dict[str, Tensor | float]) -> None:
        for name, value in values.items():
            self.sums[name].append(value)

    # -- the run

    def share(self) -> float:
        """Of the time for training that is gone."""
        return (time.time() - self.begun) / max(1e-6, self.end - self.begun)

    def progress(self, share: float) -> float:
        """Where the schedules are: they wait for the decoder, which learns to find places all at once and after an
        unknown number of steps.
        """
        plan = self.plan
        return share if self.passed or share > plan.passed_by else min(share, plan.decay_from - 0.01)

    def phase(self, share: float) -> str:
        if self.continued:
            return "dense" if self.new_heads and share < self.plan.new_heads_dense else "joint"
        if share < self.dense_end:
            return "dense"
        return "frozen" if share < self.dense_end + self.plan.frozen_share else "joint"

    def pointing_weight(self, share: float) -> float:
        """Level, then down to nothing: at the end answers alone decide where heads look."""
        until, gone = self.plan.pointing_until, self.plan.pointing_gone
        return self.plan.pointing_weight * min(1.0, max(0.0, (gone - self.progress(share)) / (gone - until)))

    def rate(self, share: float) -> float:
        plan = self.plan
        warm = min(1.0, (self.step + 1) / 100)
        if not self.continued and share >= self.dense_end:  # the decoder's own start
            warm = min(1.0, (share - self.dense_end) / 0.015 + 0.02)
        first = 0.0 if self.continued else plan.decay_from
        decay = 1.0 if self.progress(share) < first else max(0.02, 1 - (share - first) / (1 - first))
        return plan.rate * warm * decay * (0.5 if self.continued else 1.0)

    def run(self) -> None:
        plan = self.plan
        self.begun = time.time()
        self.end = self.deadline - plan.evaluation_seconds - 8
        last_saved, last_logged = time.time(), time.time()
        while True:
            share = self.share()
            if share >= 1:
                break
            while self.feeder.wanted > 0:
                self.feeder.submit(self.curriculum.next(max(share, 0.5) if self.continued else self.progress(share)))
            batch_plan, arrays = self.feeder.take()
            phase = self.phase(share)
            try:
                self.train_step(batch_plan, arrays, phase, share)
            except torch.OutOfMemoryError:
                self.recover(batch_plan)
                continue
            self.step += 1
            if self.step % plan.log_every == 0 or (self.step < 10 and self.step % 3 == 1):
                self.log(phase, share, (time.time() - last_logged))
                last_logged = time.time()
            if time.time() - last_saved > plan.save_seconds:
                self.save()
                last_saved = time.time()
        self.log("end", 1.0, 1.0)
        self.save()

    def recover(self, batch_plan: BatchPlan) -> None:
        for p in self.model.parameters():
            p.grad = None
        torch.cuda.empty_cache()
        self.batch_share /= 2
        self.write({"out_of_memory": list(batch_plan.grid), "batch_share": self.batch_share})
        if self.batch_share < 0.02:
            raise SystemExit("no batch fits into memory")

    def save(self) -> None:
        save(self.model, self.out, {**self.about, "step": self.step})

    def log(self, phase: str, share: float, seconds: float) -> None:
        values = {
            name: float(torch.stack([torch.as_tensor(v).float() for v in vs]).sum()) for name, vs in self.sums.items()
        }
        row: dict[str, object] = {
            "seconds": self.seconds(),
            "step": self.step,
            "phase": phase,
            "share": round(share, 4),
        }
        for name, value in values.items():
            if f"n_{name}" in values:
                row[name] = round(value / max(1, values[f"n_{name}"]), 4)
            elif not name.startswith("n_"):
                row[name] = round(value / len(self.sums[name]), 4)
        row |= {
            "rate": round(self.rate(share), 7),
            "pictures": self.curriculum.pictures,
            "waited": self.feeder.misses,
            "took": round(seconds, 2),
        }
        if self.cuda:
            row["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.sums.clear()
        self.write(row)
        self.passed = self.passed or row.get("right", 0.0) > self.plan.passed_at
        keys = [row.get(f"patch_{k}", 0.0) for k in (KEY1, KEY2)]
        if phase == "dense" and share > self.plan.dense_share[0] and min(keys) > self.plan.dense_accuracy:
            self.dense_end = min(self.dense_end, share)

    def write(self, row: dict) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a") as file:
            print(line, file=file)

    @torch.no_grad()
    def evaluate(self, smoke: bool) -> None:
        """Held-out pictures, true letters given: the share of answers right by family and grid, at full size and made
        smaller.
        """
        plans = []
        for grid in EVALUATION_GRIDS[: 1 if smoke else None]:
            tokens = grid[0] * grid[1]
            n = max(12, min(48, 6 * round(self.plan.tokens / tokens / 6)))
            for part in range(1 if smoke else self.plan.evaluation_pictures):
                plans.append(BatchPlan("dev", 0, 100000 * tokens + part * n, grid, n, questions_for(tokens)))
                for side in self.plan.evaluation_sides:
                    own = smaller(grid, side)
                    plans.append(BatchPlan("dev", 0, 100000 * tokens + part * n, own, n, questions_for(tokens), grid))
        for plan in plans:
            self.feeder.submit(plan)
        results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        kept = deque(entry for entry in self.feeder.waiting if entry[0].split == "dev")
        self.feeder.waiting = kept
        while kept and time.time() < self.deadline - 4:
            plan, arrays = self.feeder.take()
            batch = self.tensors(arrays)
            encoded = self.model.vision(self.pixels(batch, plan), self.compute)
            right = exact(
                self.model.decode(self.model.image_tokens(encoded), plan.grid, batch["ids"], batch["at"]).float(),
                batch["targets"],
            )
            name = f"{plan.drawn_grid[0]}x{plan.drawn_grid[1]}"
            name += "" if plan.drawn is None else f" as {plan.grid[0]}x{plan.grid[1]}"
            for i, family in enumerate(FAMILIES):
                own = right[batch["family"] == i]
                if own.numel():
                    results[name][family].append(float(own.mean()))
        for name, by_family in results.items():
            self.write({"held_out": name, **{f: round(float(np.mean(v)), 4) for f, v in by_family.items()}})


def resize(pixels: Tensor, grid: tuple[int, int], rng: random.Random) -> Tensor:
    """Smaller pictures of whole image tokens, (B, 3, 28 high, 28 wide), whole grey levels.

    As programs do it, one way or another: averages or a cubic, and half of the time a little too large first, which is
    what an image library and then llama.cpp make of it.
    """
    size = (2 * PATCH * grid[0], 2 * PATCH * grid[1])
    mode = rng.choice(("bilinear", "bicubic"))
    if rng.random() < 0.5:
        most = min(1.1, pixels.shape[2] / size[0], pixels.shape[3] / size[1])
        own = [round(side * rng.uniform(1.0, most)) for side in size]
        pixels = F.interpolate(pixels, own, mode=mode, antialias=True).clamp(0, 255).round()
        mode = "bilinear"
    return F.interpolate(pixels, size, mode=mode, antialias=True).clamp(0, 255).round()


def exact(logits: Tensor, targets: Tensor) -> Tensor:
    """Which answers are right in every token, the true ones before it given: (B, Q) of 0 and 1."""
    return ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(-1).float()
