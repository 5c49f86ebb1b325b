"""Muon: momentum whose matrix updates are made orthogonal, so that every direction of a weight matrix learns at the
same pace.

Matrices of one shape are done together, in bf16 on a GPU; a weight that holds several matrices is taken apart first.
"""

from __future__ import annotations

import math
from collections import defaultdict

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
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.float()


class Muon:
    """matrices: (parameter, parts) with the parts above each other. Weight decay is decoupled."""

    def __init__(self, matrices: list[tuple[Tensor, int]], momentum: float = 0.95, weight_decay: float = 0.02):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, int], list[tuple[Tensor, int]]] = defaultdict(list)
        for p, parts in matrices:
            self.groups[(p.shape[0] // parts, p.shape[1])].append((p, parts))
        self.means = {id(p): torch.zeros_like(p) for p, _ in matrices}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for (rows, columns), members in self.groups.items():
            members = [(p, parts) for p, parts in members if p.grad is not None]
            if not members:
                continue
            parameters = [p for p, _ in members]
            gradients = [p.grad for p in parameters]
            means = [self.means[id(p)] for p in parameters]
            torch._foreach_lerp_(means, gradients, 1 - self.momentum)
            ahead = torch._foreach_lerp(gradients, means, self.momentum)  # Nesterov: one step ahead
            stacked = torch.cat([g.view(parts, rows, columns) for g, (_, parts) in zip(ahead, members)])
            wide = rows <= columns
            made = orthogonalize(stacked if wide else stacked.mT)
            made = made if wide else made.mT
            updates = [u.reshape(p.shape) for u, p in zip(made.split([parts for _, parts in members]), parameters)]
            torch._foreach_mul_(parameters, 1 - rate * self.weight_decay)
            torch._foreach_add_(parameters, updates, alpha=-rate * _RMS * math.sqrt(max(rows, columns)))
