"""The page model in torch: Qwen2-VL's graph (encoder, 2 x 2 merger, decoder with M-RoPE) as llama.cpp computes it.

Three things follow llama.cpp rather than taste:
- patches stand in the order of the merger: 2 x 2 neighbourhoods one after the other;
- the encoder's feed-forward is quick-GELU, the merger's GELU is the tanh approximation;
- llama.cpp reads no RMS norm epsilon for Qwen2-VL (it is 0 there), so the epsilon here is too small to matter.

Weights are float32; products run in the type that `compute` names.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from config import PATCH, PIXEL_MEAN, PIXEL_STD, ModelConfig
from pictures import COLOR, KEY1, KEY2, N_PARTS, PART, SYMBOL0, SYMBOL1, WORD
from torch import Tensor, nn
from vocabulary import COLORS, LEXICON, PREFIX, SHAPES, SYMBOLS, TERMS, TOKENS, encode

_BLANK_WEIGHT = 0.1  # most patches are empty


class Linear(nn.Linear):
    """Float32 weights, products in the type of the input. `parts`: matrices that stand above each other in the weight
    (for Muon).
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, parts: int = 1):
        super().__init__(n_in, n_out, bias)
        self.parts = parts
        nn.init.normal_(self.weight, std=0.8 / math.sqrt(n_in))
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs (i, i + half). x: (B, heads, rows, head size); cos, sin: (rows, half)."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


class VisionBlock(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.v_heads
        self.norm1 = LayerNorm(c.v_width, c.norm_eps)
        self.qkv = Linear(c.v_width, 3 * c.v_width, True, parts=3)
        self.out = Linear(c.v_width, c.v_width, True)
        self.norm2 = LayerNorm(c.v_width, c.norm_eps)
        self.up = Linear(c.v_width, c.v_ff, True)
        self.down = Linear(c.v_ff, c.v_width, True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, patches, v_width) to the same."""
        batch, rows, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, rows, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, rows, width))
        hidden = self.up(self.norm2(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))


class VisionEncoder(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.patch = Linear(3 * PATCH**2, c.v_width, False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.v_layers))
        self.post_norm = LayerNorm(c.v_width, c.norm_eps)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None] * 255, persistent=False)

    def forward(self, pixels: Tensor, compute: torch.dtype) -> Tensor:
        """Grey levels (B, 3, height, width) to (B, patches, v_width) in the merger's order."""
        high, wide = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        x = self.patch(self.patches(pixels).to(compute))
        cos, sin = self.rope(high, wide, pixels.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.post_norm(x)

    def patches(self, pixels: Tensor) -> Tensor:
        """Normalized patches (B, patches, 3 * 14 * 14) in the merger's order, each in the order of a convolution's
        kernel: channel, y, x.
        """
        x = (pixels - self.mean) / self.std
        batch, high, wide = x.shape[0], x.shape[2] // (2 * PATCH), x.shape[3] // (2 * PATCH)
        x = x.view(batch, 3, high, 2, PATCH, wide, 2, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
        return x.reshape(batch, high * wide * 4, 3 * PATCH * PATCH)

    def rope(self, high: int, wide: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Half of the pairs turn with the patch's row, half with its column: cos, sin (patches, head size / 2)."""
        y, x = torch.meshgrid(torch.arange(high, device=device), torch.arange(wide, device=device), indexing="ij")
        at = merged_order(torch.stack([y, x], -1)[None])[0].float()
        quarter = self.c.v_width // self.c.v_heads // 4
        frequency = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
        angle = (at[:, :, None] * frequency).flatten(1)
        return angle.cos(), angle.sin()


def merged_order(grid: Tensor) -> Tensor:
    """(B, rows, columns, ...) one entry for each patch to (B, patches, ...) in the merger's order."""
    batch, rows, columns, *rest = grid.shape
    blocks = grid.view(batch, rows // 2, 2, columns // 2, 2, *rest).transpose(2, 3)
    return blocks.reshape(batch, rows * columns, *rest)


class DecoderBlock(nn.Module):
    """Qwen2 block: RMS norms, grouped-query attention with biases and M-RoPE, SwiGLU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.q = Linear(c.width, c.width, True)
        self.kv = Linear(c.width, 2 * c.kv_heads * c.head_size, True, parts=2)
        self.out = Linear(c.width, c.width, False)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.gate_up = Linear(c.width, 2 * c.ff, False, parts=2)
        self.down = Linear(c.ff, c.width, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, n_prefix: int, last: bool) -> Tensor:
        """(B, rows, width) to the same; of the last layer only the rows after the prefix."""
        c = self.c
        batch, rows, width = x.shape
        first = n_prefix if last else 0
        h = self.norm1(x)
        q = self.q(h[:, first:]).view(batch, rows - first, c.heads, c.head_size).transpose(1, 2)
        k, v = self.kv(h).view(batch, rows, 2, c.kv_heads, c.head_size).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos[first:], sin[first:]), rotate(k, cos, sin)
        k, v = k.repeat_interleave(c.heads // c.kv_heads, 1), v.repeat_interleave(c.heads // c.kv_heads, 1)
        attended = F.scaled_dot_product_attention(q[:, :, n_prefix - first :], k, v, attn_mask=mask)
        if not last:
            seen = F.scaled_dot_product_attention(
                q[:, :, :n_prefix], k[:, :, :n_prefix], v[:, :, :n_prefix], is_causal=True
            )
            attended = torch.cat([seen, attended], 2)
        x = x[:, first:] + self.out(attended.transpose(1, 2).reshape(batch, rows - first, width))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


_HEAD_SIZES = {
    SYMBOL0: len(SYMBOLS),
    SYMBOL1: len(SYMBOLS),
    WORD: len(TERMS),
    COLOR: len(COLORS) + 1,
    KEY1: len(TERMS),
    KEY2: len(TERMS),
}
_HEAD_SIZES[PART] = N_PARTS


class PageVLM(nn.Module):
    """Encoder, merger, decoder, and what exists for training only: `patch_heads`, `term_maps`, `numbers`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.vision = VisionEncoder(c)
        self.merge_in = Linear(4 * c.v_width, 4 * c.v_width, True)
        self.merge_out = Linear(4 * c.v_width, c.width, True)
        self.embedding = nn.Embedding(len(TOKENS), c.width)
        self.blocks = nn.ModuleList(DecoderBlock(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.head = Linear(c.width, len(TOKENS), False)
        # one set of labels at full size, two where a picture was made smaller
        self.patch_heads = nn.ModuleList(Linear(c.v_width, n * sum(_HEAD_SIZES.values()), True) for n in (1, 2))
        self.term_maps = nn.ModuleList(Linear(c.width, n * 12 * c.width, False, parts=n * 12) for n in (1, 2))
        words = [*LEXICON, *COLORS, *SHAPES]
        self.numbers = nn.Embedding(len(TERMS) - 1 - len(words), c.width)
        nn.init.normal_(self.numbers.weight, std=0.5)
        self.register_buffer("term_ids", torch.tensor([encode(f" {w}")[0] for w in words]), persistent=False)
        self.register_buffer("prefix", torch.tensor(PREFIX), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        for head in self.patch_heads:
            nn.init.normal_(head.weight, std=0.02)
        with torch.no_grad():
            for blocks in (self.blocks, self.vision.blocks):
                for block in blocks:  # keeps the residual stream's size the same for any depth
                    block.out.weight /= math.sqrt(2 * len(blocks))
                    block.down.weight /= math.sqrt(2 * len(blocks))

    def image_tokens(self, encoded: Tensor) -> Tensor:
        """(B, patches, v_width) to (B, patches / 4, width)."""
        batch, patches, width = encoded.shape
        hidden = self.merge_in(encoded.reshape(batch, patches // 4, 4 * width))
        return self.merge_out(F.gelu(hidden, approximate="tanh"))

    def decode(self, image: Tensor, grid: tuple[int, int], ids: Tensor, at: Tensor) -> Tensor:
        """Logits (B, Q, T, vocabulary) after the slot positions `at` (B, Q, T).

        image: image tokens (B, n, width); grid: tokens (high, wide); ids: (B, Q, slot). Each slot sees the prefix, the
            image and itself.
        """
        return self.decode_and_point(image, grid, ids, at, None)[0]

    def decode_and_point(
        self, image: Tensor, grid: tuple[int, int], ids: Tensor, at: Tensor, place: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `decode`, with the loss of heads in mid-depth that do not look where the answer is read, and their mass
        there.

        place: (B, Q, T, 4), see batches.py.
        """
        batch, n_slots, length = ids.shape
        n_prefix = len(PREFIX) + image.shape[1]
        start = self.embedding(self.prefix).to(image.dtype).expand(batch, -1, -1)
        x = torch.cat([start, image, self.embedding(ids.reshape(batch, -1)).to(image.dtype)], 1)
        cos, sin = self.rope(grid, n_slots, length, x.device)
        mask = slot_mask(n_prefix, n_slots, length, x.dtype, x.device)
        where = (
            (at + torch.arange(n_slots, device=x.device)[None, :, None] * length)
            .reshape(batch, -1, 1)
            .expand(-1, -1, x.shape[2])
        )
        losses, masses = [], []
        hits = None if place is None else patch_hits(place.flatten(1, 2), grid)
        for i, block in enumerate(self.blocks):
            if hits is not None and i in self.pointing_layers:
                line = self.pointing_layers.index(
                    i
                )  # one layer for the upper two patches of a token, one for the lower two
                loss, mass = self._pointing(block, x, cos, sin, n_prefix, where, hits[..., 2 * line : 2 * line + 2])
                losses.append(loss)
                masses.append(mass)
            x = block(x, cos, sin, mask, n_prefix, i == len(self.blocks) - 1)
        rows = x.gather(1, where)
        logits = self.head(self.norm(rows)).view(*at.shape, -1)
        if not losses:
            return logits, None, None
        return logits, torch.stack(losses).mean(), torch.stack(masses).mean()

    @property
    def pointing_layers(self) -> tuple[int, int]:
        middle = len(self.blocks) // 2
        return middle - 1, middle

    def _pointing(
        self, block: DecoderBlock, x: Tensor, cos: Tensor, sin: Tensor, n_prefix: int, where: Tensor, hits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-log of the mass of two heads on the patches that answer, one head for each of two patches of a token; and
        that mass.

        where: (B, Q * T, width), rows after the prefix; hits: bool (B, Q * T, tokens, 2).
        """
        c, first = self.c, len(PREFIX)
        q_rows, k_rows = block.norm1(x[:, n_prefix:].gather(1, where)), block.norm1(x[:, first:n_prefix])
        group = c.heads // c.kv_heads
        q = (
            block.q(q_rows).unflatten(-1, (c.heads, c.head_size))[:, :, [0, group]].transpose(1, 2)
        )  # heads of different keys
        k = block.kv(k_rows)[..., : 2 * c.head_size].unflatten(-1, (2, c.head_size)).transpose(1, 2)
        at = where[:, None, :, 0]
        q = rotate(q, cos[n_prefix:][at], sin[n_prefix:][at])
        k = rotate(k, cos[first:n_prefix], sin[first:n_prefix])
        scores = (q @ k.mT).float().permute(0, 2, 3, 1) / math.sqrt(c.head_size)  # (B, Q * T, tokens, 2)
        log_mass = scores.flatten(2).log_softmax(-1).masked_fill(~hits.flatten(2), float("-inf"))
        known = hits.flatten(2).any(-1)
        mass = log_mass.masked_fill(~known[..., None], 0.0).logsumexp(-1).masked_fill(~known, 0.0)
        n_known = known.sum().clamp(min=1)
        return -mass.sum() / n_known, ((mass.exp() * known).sum() / n_known).detach()

    def token_loss(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of telling the terms of each patch from its image token, by the embeddings that the same terms have in
        text; share right.

        So what a question names and what an image token holds are alike from the start. image: (B, n, width); labels:
        (B, rows, columns, sets, N_LABELS).
        """
        wanted = merged_order(labels)[..., [WORD, KEY1, KEY2]].long()  # (B, 4 n, sets, 3)
        wanted = wanted.unflatten(1, (-1, 4)).flatten(2)  # (B, n, 12 sets)
        table = torch.cat([self.embedding.weight[self.term_ids], self.numbers.weight])  # of terms 1 and up
        seen = self.term_maps[labels.shape[3] - 1](image).unflatten(-1, (-1, self.c.width))
        scores = (seen @ table.to(seen.dtype).T).float() * self.c.width**-0.5
        shown = wanted > 0
        target = wanted[shown] - 1
        loss = F.cross_entropy(scores[shown], target)
        return loss, (scores[shown].argmax(-1) == target).float().mean().detach()

    def rope(self, grid: tuple[int, int], n_slots: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """M-RoPE: text has one position for all three axes; an image stands at one time, its tokens at their row and
        column after it.
        """
        c = self.c
        high, wide = grid
        begin = len(PREFIX)
        text = torch.arange(begin, device=device)
        y, x = torch.meshgrid(torch.arange(high, device=device), torch.arange(wide, device=device), indexing="ij")
        slots = (begin + max(high, wide) + torch.arange(length, device=device)).repeat(n_slots)
        axes = [
            torch.cat([text, image + begin, slots])
            for image in (torch.zeros(high * wide, device=device, dtype=torch.long), y.flatten(), x.flatten())
        ]
        half = c.head_size // 2
        frequency = c.rope_base ** (-torch.arange(half, device=device) / half)
        of_pair = torch.repeat_interleave(
            torch.arange(3, device=device), torch.tensor(c.rope_sections, device=device), output_size=half
        )
        angle = torch.stack(axes, -1)[:, of_pair].float() * frequency
        return angle.cos(), angle.sin()

    def patch_loss(self, encoded: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of naming what each patch shows and what it belongs to, and shares right.

        encoded: (B, patches, v_width) in the merger's order; labels: (B, rows, columns, sets, N_LABELS).
        """
        wanted, sets = merged_order(labels).flatten(0, 2).long(), labels.shape[3]
        logits = self.patch_heads[sets - 1](encoded).unflatten(-1, (sets, -1)).flatten(0, 2).float()
        logits = logits.split(list(_HEAD_SIZES.values()), -1)
        loss, right = encoded.new_zeros((), dtype=torch.float32), {}
        for kind, scores in zip(_HEAD_SIZES, logits):
            target = wanted[:, kind]
            shown = target > 0
            each = F.cross_entropy(scores, target, reduction="none")
            blank = 0.0 if kind in (KEY1, KEY2) else _BLANK_WEIGHT
            weight = torch.where(shown, 1.0, blank)
            loss = loss + (each * weight).sum() / weight.sum().clamp(min=1)
            right[f"patch_{kind}"] = ((scores.argmax(-1) == target) & shown).sum() / shown.sum().clamp(min=1)
        return loss, {k: v.detach() for k, v in right.items()}


def patch_hits(place: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches are meant: (B, n, 4) of first and last row and column to bool (B, n, tokens, 4)."""
    y, x = torch.meshgrid(
        torch.arange(2 * grid[0], device=place.device), torch.arange(2 * grid[1], device=place.device), indexing="ij"
    )
    y, x = merged_order(torch.stack([y, x], -1)[None])[0].unbind(-1)
    top, bottom, first, last = place[..., None].unbind(2)
    return ((y >= top) & (y <= bottom) & (x >= first) & (x <= last)).unflatten(-1, (-1, 4))


def slot_mask(n_prefix: int, n_slots: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What slot rows see, as 0 and -inf: (slots * length, prefix + slots * length)."""
    i = torch.arange(n_slots * length, device=device)
    own = (i[:, None] // length == i[None] // length) & (i[:, None] >= i[None])
    seen = torch.cat([torch.ones(len(i), n_prefix, dtype=torch.bool, device=device), own], 1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))


def whitened_cosines(width: int, pixels: Tensor, encoder: VisionEncoder) -> Tensor:
    """First patch filters (width, 588): cosines of low frequencies on opponent colours, each scaled to unit variance
    over real patches.
    """
    index = np.arange(PATCH)
    waves = np.cos(np.pi * (2 * index + 1)[None] * index[:, None] / (2 * PATCH))
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    lowest = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: f[0] ** 2 + f[1] ** 2)
    opponents = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], float)
    opponents /= np.linalg.norm(opponents, axis=1, keepdims=True)
    n_light = min(len(lowest), width * 5 // 8)  # letters are brightness
    n_red = (width - n_light) // 2
    shares = (n_light, n_red, width - n_light - n_red)
    filters = np.stack(
        [
            (o[:, None, None] * np.outer(waves[u], waves[v])).ravel()
            for o, n in zip(opponents, shares)
            for u, v in lowest[:n]
        ]
    )
    filters = torch.from_numpy(filters).float()
    spread = (encoder.patches(pixels).flatten(0, 1) @ filters.to(pixels.device).T).std(0) + 0.1
    return filters.to(pixels.device) / spread[:, None]
