"""Float64 NumPy reference of the Qwen2-VL vision encoder, as llama.cpp's own clip graph computes it.

Written from tools/mtmd (models/qwen2vl.cpp, clip.cpp, mtmd-image.cpp) and ggml's rotary embedding
alone: it shares no code with the engine. One still image at a time, no window attention. On a CPU
llama.cpp rounds pixels, patch filters and the arguments and values of both GELUs to float16, which
moves the embeddings by about 5e-4 of their size (more where attention is sharp); nothing is rounded here.

Every (rows, columns) grid of patches is kept in the encoder's own order: the 2x2 neighbourhoods one
after the other, row-major, and inside each one its patches (0, 0), (0, 1), (1, 0), (1, 1). So rows
4i .. 4i + 3 become image token i, and tokens are in row-major order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.reference import (
    Array,
    gelu,
    gelu_quick,
    layer_norm,
    linear,
    load_tensors,
    merge_heads,
    silu,
    softmax,
    split_heads,
)

MERGE = 2  # the graph merges MERGE x MERGE patches into one token
MIN_TOKENS, MAX_TOKENS = 8, 4096  # llama.cpp rescales images outside these limits; no key of the file sets them
ROPE_BASE = 10000.0


def merged_order(grid: Array) -> Array:
    """(rows, columns, ...) one entry for each patch -> (rows * columns, ...) in the encoder's order."""
    rows, columns, rest = grid.shape[0], grid.shape[1], grid.shape[2:]
    blocks = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, *rest).swapaxes(1, 2)
    return blocks.reshape(rows * columns, *rest)


def rotate(x: Array, positions: Array) -> Array:
    """ggml's GGML_ROPE_TYPE_VISION on (n_head, n, hd); positions (n, 2) are each patch's (y, x).

    Element j is paired with j + hd/2. The first half of the pairs turns with y, the second half with
    x, and both halves start again at the highest frequency: pair i of a half has base ** (-4 i / hd).
    (Of the four position streams and sections that the graph passes, the last two are never reached.)
    """
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    inverse_freq = ROPE_BASE ** (-2.0 * np.arange(quarter) / half)
    angle = (positions[:, :, None] * inverse_freq).reshape(len(positions), half)  # y pairs, then x pairs
    cos, sin, first, second = np.cos(angle), np.sin(angle), x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class QwenVisionEncoder:
    """Vision encoder and merger of an mmproj file with clip.projector_type "qwen2vl_merger"."""

    def __init__(self, path: str | Path) -> None:
        """Reads the file; anything that this graph does not compute is refused."""
        self.metadata, self.tensors = load_tensors(path)
        vision = "clip.vision."
        if self.metadata["clip.projector_type"] != "qwen2vl_merger":
            raise ValueError("only the qwen2vl_merger projector is here")
        if self.metadata.get(vision + "n_wa_pattern", 0) > 0:
            raise NotImplementedError("window attention")
        if self.metadata.get(vision + "spatial_merge_size", MERGE) != MERGE:
            raise NotImplementedError("merging other than 2x2")
        if {"v.patch_embd.bias", "v.class_embd"} & set(self.tensors):
            raise NotImplementedError("llama.cpp's graph allows no patch bias and no class embedding")
        if "v.blk.0.ffn_gate.weight" in self.tensors:
            raise NotImplementedError("gated feed-forward")
        self.patch_size = int(self.metadata[vision + "patch_size"])
        self.n_embd = int(self.metadata[vision + "embedding_length"])
        self.n_head = int(self.metadata[vision + "attention.head_count"])
        if self.n_embd // self.n_head % 4:
            raise ValueError("the head size must be a multiple of 4 for the rotary embedding")
        self.n_layer = int(self.metadata[vision + "block_count"])  # all of them run, unlike LLaVA's
        self.eps = float(self.metadata[vision + "attention.layer_norm_epsilon"])
        self.mean, self.std = (np.array(self.metadata[vision + "image_" + name], float) for name in ("mean", "std"))
        use_gelu, use_silu = (self.metadata.get("clip.use_" + name, False) for name in ("gelu", "silu"))
        self.activation = gelu if use_gelu else silu if use_silu else gelu_quick

    def grid(self, image: Array) -> tuple[int, int]:
        """Patches of an image (H, W, 3) as (rows, columns), both even; refuses what would be rescaled."""
        height, width = image.shape[:2]
        side = self.patch_size * MERGE
        n_tokens = (height // side) * (width // side)
        if height % side or width % side or not MIN_TOKENS <= n_tokens <= MAX_TOKENS:
            raise ValueError(f"llama.cpp would rescale an image of {height}x{width}")
        return height // self.patch_size, width // self.patch_size

    def patches(self, image: Array) -> Array:
        """Image uint8 (H, W, 3) -> normalised patches (n_rows, 3 * patch * patch), channel before y before x."""
        rows, columns = self.grid(image)
        p = self.patch_size
        pixels = (np.asarray(image, dtype=np.float64) / 255.0 - self.mean) / self.std
        grid = pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 4, 1, 3)  # (rows, columns, 3, p, p)
        return merged_order(grid.reshape(rows, columns, 3 * p * p))

    def encode(self, image: Array) -> tuple[Array, Array]:
        """Image uint8 (H, W, 3) -> embeddings (n_tokens, d_text), attention (n_head, n_rows, n_rows).

        The attention is the last block's, after the softmax, [head, query row, key row]. n_rows is
        4 * n_tokens. A still image goes through both of the filters that were made for two frames.
        """
        t = self.tensors
        rows, columns = self.grid(image)
        positions = merged_order(np.stack(np.mgrid[:rows, :columns], axis=-1))  # (n_rows, 2): y, x
        filters = t["v.patch_embd.weight"] + t["v.patch_embd.weight.1"]  # (n_embd, 3, p, p)
        x = self.patches(image) @ filters.reshape(self.n_embd, -1).T  # (n_rows, n_embd)
        x = self._norm(x, "v.pre_ln") if "v.pre_ln.weight" in t else x
        attention = np.empty((self.n_head, 0, 0))
        for il in range(self.n_layer):
            b = f"v.blk.{il}."
            h = self._norm(x, b + "ln1")
            q, k, v = (split_heads(linear(h, t, b + "attn_" + name), self.n_head) for name in "qkv")
            q, k = rotate(q, positions), rotate(k, positions)
            attention = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
            x = x + linear(merge_heads(attention @ v), t, b + "attn_out")
            up, down = self._ffn(b)
            x = x + linear(self.activation(linear(self._norm(x, b + "ln2"), t, up)), t, down)
        x = self._norm(x, "v.post_ln") if "v.post_ln.weight" in t else x
        merged = x.reshape(-1, MERGE * MERGE * self.n_embd)  # (n_tokens, 4 * n_embd)
        return linear(gelu(linear(merged, t, "mm.0")), t, "mm.2"), attention

    @staticmethod
    def received(attention: Array) -> Array:
        """Attention that each image token receives: (n_head, n_rows, n_rows) -> (n_tokens,).

        The mean over heads and query rows of each key row, then over the four rows of each token.
        """
        return attention.mean(axis=(0, 1)).reshape(-1, MERGE * MERGE).mean(axis=1)

    def _norm(self, x: Array, name: str) -> Array:
        """LayerNorm with bias, (n, d) -> (n, d)."""
        return layer_norm(x, self.tensors[name + ".weight"], self.tensors[name + ".bias"], self.eps)

    def _ffn(self, block: str) -> tuple[str, str]:
        """Names of the block's first and second matrix; old files have them exchanged, which the shape shows."""
        up, down = block + "ffn_up", block + "ffn_down"
        return (down, up) if self.tensors[down + ".weight"].shape[1] == self.n_embd else (up, down)
