"""Muon: momentum whose matrix updates are made orthogonal, so that every direction of a weight matrix learns at the
same pace.

torch.optim.Muon orthogonalizes in bfloat16 one matrix at a time. On CPUs without bfloat16 instructions that takes
seconds per step; here it is done in float32, and matrices of one shape together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# An odd quintic that lifts every singular value from (0, 1] to about 1 in five rounds. It overshoots near 1, which does
# no harm here.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_RMS = 0.2  # of an AdamW update, roughly: rates mean the same for both optimizers


def orthogonalize(x: Tensor) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows. x: (matrices, rows, columns), rows <= columns."""
    a, b, c = _QUINTIC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x


class Muon(torch.optim.Optimizer):
    """For matrices only. Weight decay is decoupled."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, parameters in by_shape.items():
                directions = torch.stack([self._direction(p, group["momentum"]) for p in parameters])
                wide = shape[0] <= shape[1]
                directions = orthogonalize(directions if wide else directions.mT)
                rate = group["lr"] * _RMS * math.sqrt(max(shape))
                for p, direction in zip(parameters, directions if wide else directions.mT):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum: the running mean of gradients, looked at one step ahead."""
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        mean = state["mean"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)
