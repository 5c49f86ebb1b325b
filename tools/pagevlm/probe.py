"""Does the decoder learn to find places? A small decoder alone, on features that hold the patch labels as the trained
encoder's do.

python tools/pagevlm/probe.py [--words 36] [--pointing 1] [--terms 0.5] [--rope-base 10000] [--seconds 900]

Needs no GPU. Features are sums of a random vector for each label of a patch, so letters, words and keys are there to be
read linearly; every
step has new pictures. Prints means over 20 steps: loss of answers, loss and mass of the pointing heads, terms told from
image tokens, and answers right by family.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict

import numpy as np
import pictures
import torch
import torch.nn.functional as F
from batches import IGNORED, BatchPlan, make_batch
from config import ModelConfig
from model import Linear, PageVLM, merged_order
from muon import Muon
from pictures import FAMILIES, N_LABELS
from vocabulary import IM_END

_FEATURES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--words", type=int, default=36, help="short words in all pictures; 0: the whole vocabulary (%(default)s)"
    )
    parser.add_argument("--grid", type=int, nargs=2, default=(4, 6), help="tokens high and wide")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--questions", type=int, default=7)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rope-base", type=float, default=10000)
    parser.add_argument("--pointing", type=float, default=1.0, help="weight of the loss of heads that look elsewhere")
    parser.add_argument(
        "--terms", type=float, default=0.5, help="weight of the loss of telling terms from image tokens"
    )
    parser.add_argument("--rate", type=float, default=0.003, help="Muon's; AdamW takes half")
    parser.add_argument("--seconds", type=float, default=900)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.words:
        short = [w for w in pictures.LEXICON if len(w) <= 5]
        pictures.LEXICON = short[:: len(short) // args.words][: args.words]
        pictures.NUMBERS = range(10, 30)
    heads = args.width // 64
    config = ModelConfig(
        v_width=_FEATURES,
        v_layers=1,
        width=args.width,
        heads=heads,
        kv_heads=heads,
        layers=args.layers,
        ff=2 * args.width,
    )
    model = PageVLM(ModelConfig(**{**vars(config), "rope_base": args.rope_base}))
    vectors = torch.randn(N_LABELS, 400, _FEATURES)
    vectors[:, 0] = 0
    own = [
        model.merge_in,
        model.merge_out,
        model.embedding,
        model.blocks,
        model.norm,
        model.head,
        model.term_maps,
        model.numbers,
    ]
    matrices = [
        (m.weight, m.parts)
        for part in (model.merge_in, model.merge_out, model.blocks, model.term_maps)
        for m in part.modules()
        if isinstance(m, Linear)
    ]
    parameters = [p for part in own for p in part.parameters()]
    of_muon = {id(p) for p, _ in matrices}
    muon = Muon(matrices)
    adamw = torch.optim.AdamW([p for p in parameters if id(p) not in of_muon], betas=(0.9, 0.98))
    grid = tuple(args.grid)
    sums: dict[str, list[float]] = defaultdict(list)
    begun, step = time.time(), 0
    while time.time() - begun < args.seconds:
        arrays = make_batch(BatchPlan("train", 0, step * args.pictures, grid, args.pictures, args.questions))
        batch = {
            name: torch.from_numpy(arrays[name]).long()
            for name in ("labels", "ids", "at", "targets", "place", "family")
        }
        features = sum(vectors[kind][batch["labels"][..., 0, kind]] for kind in range(N_LABELS))
        image = model.image_tokens(merged_order(F.layer_norm(features, (_FEATURES,))))
        logits, pointing_loss, mass = model.decode_and_point(image, grid, batch["ids"], batch["at"], batch["place"])
        targets = batch["targets"]
        each = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED, reduction="none")
        weight = (targets != IGNORED).float() * torch.where(targets == IM_END, 0.2, 1.0)
        loss = (each * weight.flatten()).sum() / weight.sum()
        term_loss, told = model.token_loss(image, batch["labels"])
        (loss + args.pointing * pointing_loss + args.terms * term_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = args.rate * min(1, (step + 1) / 60)
        muon.step(rate)
        for group in adamw.param_groups:
            group["lr"] = rate / 2
        adamw.step()
        for p in parameters:
            p.grad = None
        right = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(-1).float()
        values = {"loss": loss, "pointing_loss": pointing_loss, "pointing": mass, "terms": told}
        values |= {family: right[batch["family"] == i].mean() for i, family in enumerate(FAMILIES)}
        for name, value in values.items():
            sums[name].append(float(value.detach()))
        step += 1
        if step % 20 == 0:
            row = {
                "step": step,
                "seconds": round(time.time() - begun),
                **{name: round(float(np.nanmean(v)), 3) for name, v in sums.items()},
            }
            print(json.dumps(row), flush=True)
            sums.clear()


if __name__ == "__main__":
    main()
