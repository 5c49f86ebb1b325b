"""The reference model in torch: a CLIP-type encoder, an MLP projector and a Llama decoder, as llama.cpp computes them.

Two things are llama.cpp's and not CLIP's, so that the exported files answer on stock binaries as they do here:
- the encoder's rows are [patch 0, ..., patch N-1, CLS]: CLS comes last, with the last position embedding;
- the projector gets rows 1 to N: patch 0 is dropped and CLS is image token N-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from batches import N_PRESENCE
from scenes import KINDS, LARGE_SCENES, SMALL_SCENES, SceneConfig, SceneGenerator
from torch import Tensor, nn
from vocabulary import COLOR_NAMES, PREFIX, TOKENS

# CLIP's own pixel statistics: LLaVA files carry them
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
_BACKGROUND_WEIGHT = 0.25  # six patches of seven are background (small scenes)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes. `v_` is the encoder's."""

    v_width: int = 192
    v_heads: int = 4
    v_layers: int = 4
    v_ff: int = 768
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    layers: int = 6
    ff: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    scenes: SceneConfig = field(default=SMALL_SCENES)

    @property
    def n_patches(self) -> int:
        return self.scenes.grid**2

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def n_prefix(self) -> int:
        """Rows before the questions: the prompt's start and the image."""
        return len(PREFIX) + self.n_patches


SIZES = {
    "small": ModelConfig(),
    "large": ModelConfig(
        v_width=384, v_heads=6, v_layers=8, v_ff=1536, width=512, layers=12, ff=1408, scenes=LARGE_SCENES
    ),
}


class VisionBlock(nn.Module):
    """Pre-norm transformer block, bidirectional, quick-GELU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.v_heads
        self.norm1 = nn.LayerNorm(c.v_width, c.norm_eps)
        self.qkv = nn.Linear(c.v_width, 3 * c.v_width)
        self.out = nn.Linear(c.v_width, c.v_width)
        self.norm2 = nn.LayerNorm(c.v_width, c.norm_eps)
        self.up = nn.Linear(c.v_width, c.v_ff)
        self.down = nn.Linear(c.v_ff, c.v_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, v_width) to the same."""
        batch, rows, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, rows, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, width)
        x = x + self.out(attended)
        hidden = self.up(self.norm2(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))


class VisionEncoder(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.patch_size = c.scenes.patch_size
        self.patch = nn.Linear(3 * self.patch_size**2, c.v_width, bias=False)
        self.cls = nn.Parameter(torch.randn(c.v_width) * 0.02)
        self.positions = nn.Parameter(torch.randn(c.n_patches + 1, c.v_width) * 0.02)
        self.pre_norm = nn.LayerNorm(c.v_width, c.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.v_layers))
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, size, size, 3) to (B, patches + 1, v_width), CLS last."""
        x = self.patch(self.patches(pixels))
        x = torch.cat([x, self.cls.to(x.dtype).expand(x.shape[0], 1, -1)], 1) + self.positions
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        return x

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalized patches (B, patches, 3 * patch_size^2), each in the order of a convolution's kernel: channel, y,
        x.
        """
        batch, size, p = pixels.shape[0], pixels.shape[1], self.patch_size
        x = (pixels.float() - self.mean) / self.std
        x = x.view(batch, size // p, p, size // p, p, 3).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(batch, (size // p) ** 2, 3 * p * p)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs (llama.cpp's "normal" kind). x: (B, heads, rows, head_size); cos, sin: (rows,
    head_size / 2).
    """
    x = x.float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class DecoderBlock(nn.Module):
    """Llama block: RMS norms, grouped-query attention with RoPE, SwiGLU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.kv = nn.Linear(c.width, 2 * c.kv_heads * c.head_size, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.gate_up = nn.Linear(c.width, 2 * c.ff, bias=False)
        self.down = nn.Linear(c.ff, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, first_row: int = 0) -> Tensor:
        """(B, rows, width) to (B, rows - first_row, width): the last layer needs no results for the image."""
        c = self.c
        batch, rows, width = x.shape
        n_queries = rows - first_row
        h = self.norm1(x)
        q = self.q(h[:, first_row:]).view(batch, n_queries, c.heads, c.head_size).transpose(1, 2)
        k, v = self.kv(h).view(batch, rows, 2, c.kv_heads, c.head_size).permute(2, 0, 3, 1, 4)
        q = rotate(q, cos[first_row:], sin[first_row:]).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        repeats = c.heads // c.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[first_row:])
        x = x[:, first_row:] + self.out(attended.transpose(1, 2).reshape(batch, n_queries, width))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class ReferenceVLM(nn.Module):
    """Encoder, projector and decoder, and two heads on the encoder that exist for training only (`patch_head`,
    `presence_head`).
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.vision = VisionEncoder(c)
        self.project_in = nn.Linear(c.v_width, c.width)
        self.project_out = nn.Linear(c.width, c.width)
        self.embedding = nn.Embedding(len(TOKENS), c.width)
        self.blocks = nn.ModuleList(DecoderBlock(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.out = nn.Linear(c.width, len(TOKENS), bias=False)
        self._head_sizes = [len(KINDS) + 1, len(COLOR_NAMES)] + [10] * c.scenes.plate_digits
        self.patch_head = nn.Linear(c.v_width, sum(self._head_sizes))
        self.presence_head = nn.Linear(c.v_width, N_PRESENCE)
        self.register_buffer("prefix", torch.tensor(PREFIX), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.8 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.3)
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            for blocks in (self.blocks, self.vision.blocks):
                for block in blocks:  # keeps the residual stream's size the same for any depth
                    block.out.weight /= math.sqrt(2 * len(blocks))
                    block.down.weight /= math.sqrt(2 * len(blocks))
            self.vision.patch.weight.copy_(torch.from_numpy(whitened_dct(self.c)))

    def image_rows(self, encoded: Tensor) -> Tensor:
        """Encoder rows (B, patches + 1, v_width) to image tokens (B, patches, width)."""
        return self.project_out(F.gelu(self.project_in(encoded[:, 1:]), approximate="tanh"))

    def decode(self, encoded: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, Q, T, vocabulary) of Q questions about each picture, which see the picture and not each other.

        encoded: (B, patches + 1, v_width); ids: (B, Q, T).
        """
        batch, n_questions, length = ids.shape
        start = self.embedding(self.prefix).expand(batch, -1, -1)
        questions = self.embedding(ids.reshape(batch, -1))
        x = torch.cat([start, self.image_rows(encoded).float(), questions], 1)
        cos, sin, mask = self._layout(n_questions, length, x.device)
        for block in self.blocks[:-1]:
            x = block(x, cos, sin, mask)
        x = self.blocks[-1](x, cos, sin, mask, self.c.n_prefix)
        return self.out(self.norm(x)).view(batch, n_questions, length, -1)

    def _layout(self, n_questions: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """RoPE tables (rows, head_size / 2) and mask (rows, rows) of packed questions, each at the positions after the
        image.
        """
        c = self.c
        slot = torch.arange(n_questions, device=device).repeat_interleave(length)
        slot = torch.cat([torch.full((c.n_prefix,), -1, device=device), slot])
        position = torch.cat(
            [
                torch.arange(c.n_prefix, device=device),
                c.n_prefix + torch.arange(length, device=device).repeat(n_questions),
            ]
        )
        sees = (slot[None] == slot[:, None]) | (slot[None] == -1)
        mask = sees & (position[None] <= position[:, None])
        frequencies = c.rope_base ** (
            -torch.arange(0, c.head_size, 2, device=device, dtype=torch.float32) / c.head_size
        )
        angles = position.float()[:, None] * frequencies
        return angles.cos(), angles.sin(), mask

    def patch_loss(self, encoded: Tensor, labels: Tensor, presence: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of naming what each patch shows and, from CLS, what the picture shows; and the accuracies of it.

        encoded: (B, patches + 1, v_width); labels: (B, patches, 2 + plate digits); presence: (B, N_PRESENCE).
        """
        kind, color, *digits = self.patch_head(encoded[:, :-1]).float().split(self._head_sizes, -1)
        weight = torch.ones(self._head_sizes[0], device=encoded.device)
        weight[0] = _BACKGROUND_WEIGHT
        loss = F.cross_entropy(kind.flatten(0, 1), labels[..., 0].flatten(), weight=weight)
        loss = loss + _labelled_loss(color, labels[..., 1])
        for i, logits in enumerate(digits):
            loss = loss + 0.5 * _labelled_loss(logits, labels[..., 2 + i])
        seen = F.binary_cross_entropy_with_logits(self.presence_head(encoded[:, -1]).float(), presence)
        with torch.no_grad():
            shown, colored, plate = labels[..., 0] > 0, labels[..., 1] >= 0, labels[..., 2] >= 0
            number = torch.stack([logits.argmax(-1) for logits in digits], -1)
            accuracy = {
                "patch_kind": (kind.argmax(-1) == labels[..., 0])[shown].float().mean(),
                "patch_color": (color.argmax(-1) == labels[..., 1])[colored].float().mean(),
                "patch_plate": (number == labels[..., 2:]).all(-1)[plate].float().mean(),
                "presence_loss": seen.detach(),
            }
        return loss + 2 * seen, accuracy


def _labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the patches that have a label; 0 where none has. logits: (B, patches, classes), labels: (B,
    patches).
    """
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def whitened_dct(c: ModelConfig) -> np.ndarray:
    """First patch filters (v_width, 3 * patch_size^2): cosine filters of the lowest frequencies on opponent colours.

    Each is scaled to unit variance over real patches. Edges and colours then need not be found first.
    """
    p, grid = c.scenes.patch_size, c.scenes.grid
    index = np.arange(p)
    waves = np.cos(np.pi * (2 * index + 1)[None] * index[:, None] / (2 * p))
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    lowest = sorted(((u, v) for u in range(p) for v in range(p)), key=lambda f: f[0] ** 2 + f[1] ** 2)
    opponents = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], float)
    opponents /= np.linalg.norm(opponents, axis=1, keepdims=True)
    n_light = c.v_width // 2  # half of the filters see brightness, which shapes need most
    n_red_green = (c.v_width - n_light) // 2
    shares = (n_light, n_red_green, c.v_width - n_light - n_red_green)
    filters = np.stack(
        [
            (channel[:, None, None] * np.outer(waves[u], waves[v])).ravel()
            for channel, n in zip(opponents, shares)
            for u, v in lowest[:n]
        ]
    )
    generator = SceneGenerator("whitening", config=c.scenes, n_backgrounds=40)
    pictures = np.stack([generator.scene(generator.rng("scene", i)).pixels for i in range(60)]).astype(np.float32)
    pictures = (pictures / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    patches = pictures.reshape(60, grid, p, grid, p, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3 * p * p)
    spread = (patches @ filters.T).std(0) + 0.05
    return (filters / spread[:, None]).astype(np.float32)
