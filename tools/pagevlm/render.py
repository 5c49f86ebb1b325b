"""Pixels from cells, in torch, on any device: each cell is a letter or tile of one colour on another."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from glyphs import CELL_HEIGHT, CELL_WIDTH, FILE
from pictures import BAR_TOP, LARGE_SHAPE, LINE, N_FACES, N_JITTER, N_TILES, SMALL_SHAPE
from torch import Tensor
from vocabulary import SHAPES, SYMBOLS


@lru_cache
def atlas() -> np.ndarray:
    """Ink of each tile in each style: float32 (N_FACES * N_JITTER, N_TILES, 14, 7) from 0 to 1."""
    stored = np.load(FILE)
    out = np.zeros((N_FACES, N_JITTER, N_TILES, CELL_HEIGHT, CELL_WIDTH), np.float32)
    letters = stored["letters"].astype(np.float32) / 255
    for j in range(N_JITTER):
        dx, dy = j % 2, j // 2
        out[:, j, : len(SYMBOLS), dy:, dx:] = letters[:, :, : CELL_HEIGHT - dy, : CELL_WIDTH - dx]
    for k in range(13):
        out[:, :, BAR_TOP + k, 13 - k :] = 1
    out[:, :, LINE, 6] = 1
    for s in range(len(SHAPES)):
        small = stored["small"][s].astype(np.float32) / 255
        for half in range(2):
            out[:, :, SMALL_SHAPE + 2 * s + half] = small[:, 7 * half : 7 * half + 7]
        large = stored["large"][s].astype(np.float32) / 255
        for part in range(8):
            y, x = divmod(part, 4)
            out[:, :, LARGE_SHAPE + 8 * s + part] = large[14 * y : 14 * y + 14, 7 * x : 7 * x + 7]
    return out.reshape(N_FACES * N_JITTER, N_TILES, CELL_HEIGHT, CELL_WIDTH)


class Renderer:
    def __init__(self, device: str | torch.device):
        self.atlas = torch.from_numpy(atlas()).to(device)

    @torch.no_grad()
    def __call__(
        self, cells: Tensor, palette: Tensor, noise: Tensor, shade: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """cells: uint8 (B, 4, rows, columns): tile, style, ink, paper. palette: uint8 (B, colours, 3). noise, shade:
        (B,) in grey levels.

        Returns (B, 3, 14 * rows, 7 * columns), whole grey levels 0 to 255 as float32.
        """
        batch, _, rows, columns = cells.shape
        device = cells.device
        tile, style, ink, paper = cells.long().unbind(1)
        alpha = self.atlas[style, tile]  # (B, rows, columns, 14, 7)
        alpha = alpha.permute(0, 1, 3, 2, 4).reshape(batch, 1, rows * CELL_HEIGHT, columns * CELL_WIDTH)
        colors = palette.float()
        which = torch.arange(batch, device=device)[:, None, None]
        front, back = (
            colors[which, index].permute(0, 3, 1, 2).repeat_interleave(CELL_HEIGHT, 2).repeat_interleave(CELL_WIDTH, 3)
            for index in (ink, paper)
        )
        pixels = back + (front - back) * alpha
        field = torch.rand(batch, 3, 5, 5, device=device, generator=generator) - 0.5
        field = F.interpolate(field, size=pixels.shape[2:], mode="bilinear", align_corners=True)
        pixels = pixels + field * (2 * shade)[:, None, None, None]
        pixels = pixels + torch.randn(pixels.shape, device=device, generator=generator) * noise[:, None, None, None]
        return pixels.clamp(0, 255).round()
