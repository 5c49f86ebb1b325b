"""Float64 NumPy reference of vision transformers whose pictures have one size, with rows that leave before a layer.

Written from llama.cpp's graphs (tools/mtmd/models: siglip.cpp, llava.cpp, internvl.cpp, nemotron-v2-vl.cpp,
kimik25.cpp; clip.cpp's build_vit and build_rope_2d) alone: it shares no code with the engine. It starts from
preprocessed pixels. Rows are kept in their own order, and a token is made of those of its patches that are named by
where they lie: nothing here knows of a smaller raster.
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
    rms_norm,
    softmax,
    split_heads,
)


class FixedEncoder:
    """An mmproj file of projector type idefics3 (SmolVLM, Idefics3), gemma3, mlp (LLaVA), internvl, nemotron_v2_vl
    (RADIO) or kimik25 (MoonViT).
    """

    def __init__(self, path: str | Path) -> None:
        self.metadata, self.tensors = load_tensors(path)
        m = {k.removeprefix("clip.vision."): v for k, v in self.metadata.items()}
        self.kind = str(self.metadata["clip.projector_type"])
        if self.kind not in ("idefics3", "gemma3", "mlp", "internvl", "nemotron_v2_vl", "kimik25"):
            raise ValueError(self.kind)
        if "v.blk.0.ffn_gate.weight" in self.tensors:
            raise NotImplementedError("gated feed-forward")
        self.patch = int(m["patch_size"])
        self.n_embd, self.n_head = int(m["embedding_length"]), int(m["attention.head_count"])
        self.eps = float(m["attention.layer_norm_epsilon"])
        self.n_layers = int(m["block_count"])  # the converter has left out the layers that a LLaVA does not use
        self.side = {"gemma3": 4, "mlp": 1}.get(self.kind) or int(m["projector.scale_factor"])
        self.n_cls = self.tensors["v.class_embd"].size // self.n_embd if "v.class_embd" in self.tensors else 0
        self.activation = gelu if self.metadata.get("clip.use_gelu") else gelu_quick

    def embed(self, pixels: Array) -> Array:
        """Pixels (3, h, w) -> rows (n_patches, n_embd), CLS or other learned rows before them where there are some."""
        t, p = self.tensors, self.patch
        _, height, width = pixels.shape
        rows, columns = height // p, width // p
        blocks = pixels.astype(np.float64).reshape(3, rows, p, columns, p).transpose(1, 3, 0, 2, 4)
        filters = t["v.patch_embd.weight"].reshape(self.n_embd, -1)
        x = blocks.reshape(rows * columns, -1) @ filters.T + t.get("v.patch_embd.bias", 0.0)
        if self.kind == "kimik25":
            table = t["v.position_embd.weight"]
            y, x_ = (cubic(n, size) for n, size in zip(table.shape, (rows, columns)))
            return x + np.einsum("ri,cj,ijd->rcd", y, x_, table).reshape(len(x), -1)
        positions = t["v.position_embd.weight"].reshape(-1, self.n_embd)
        if self.kind == "nemotron_v2_vl":  # whose learned rows have no positions
            return np.concatenate([t["v.class_embd"], x + positions])
        if "v.class_embd" in t:
            x = np.concatenate([t["v.class_embd"].reshape(1, -1), x])
        x = x + positions[: len(x)]
        return self._norm(x, "v.pre_ln") if "v.pre_ln.weight" in t else x

    def encode(self, pixels: Array, tokens: Array | None = None, layer: int = 0) -> tuple[Array, Array]:
        """Features (n, d_text) of tokens, ascending, when only their rows and CLS go through layers from `layer` on;
        and the attention that each receives in the last layer, (n,), the mean over heads, query rows and its own rows.
        """
        x = self.embed(pixels)
        n_cls = self.n_cls
        columns = pixels.shape[2] // self.patch // self.side
        n_tokens = (len(x) - n_cls) // self.side**2
        tokens = np.arange(n_tokens) if tokens is None else np.asarray(tokens)
        patches = self._patches(tokens, columns)  # (n, side^2), without CLS
        stay = np.concatenate([np.arange(n_cls), n_cls + np.sort(patches.ravel())])
        attention = np.empty((0, 0, 0))
        places = np.stack(np.divmod(np.arange(len(x) - n_cls), columns * self.side)) if self.kind == "kimik25" else None
        for il in range(self.n_layers):
            if il == layer:
                x = x[stay]
                places = None if places is None else places[:, stay]
            x, attention = self._layer(x, il, places)
        if layer == self.n_layers:
            x = x[stay]
        at = np.searchsorted(stay, n_cls + patches)  # rows of each token, (n, side^2)
        x = self._norm(x, "v.post_ln") if "v.post_ln.weight" in self.tensors else x
        received = attention.mean(axis=(0, 1))
        scores = received[at].mean(axis=1) if layer < self.n_layers else np.empty(0)
        return self._project(x[at]), scores

    def _patches(self, tokens: Array, columns: int) -> Array:
        """Raster numbers of the patches of each token, row by row, (n, side^2)."""
        s = self.side
        y, x = tokens // columns * s, tokens % columns * s
        inner = np.arange(s)
        rows = y[:, None, None] + inner[None, :, None]
        return (rows * columns * s + x[:, None, None] + inner[None, None, :]).reshape(len(tokens), s * s)

    def _layer(self, x: Array, il: int, places: Array | None) -> tuple[Array, Array]:
        """places: row and column of the patches, (2, n), where heads turn by them."""
        t, b = self.tensors, f"v.blk.{il}."
        scale = lambda name, y: y * t[b + name] if b + name in t else y
        h = self._norm(x, b + "ln1")
        if b + "attn_qkv.weight" in t:
            parts = np.split(linear(h, t, b + "attn_qkv"), 3, axis=-1)
        else:
            parts = [linear(h, t, b + "attn_" + name) for name in "qkv"]
        q, k, v = (split_heads(part, self.n_head) for part in parts)
        if places is not None:
            q, k = (turned(heads, places) for heads in (q, k))
        attention = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
        x = x + scale("ls1.weight", linear(merge_heads(attention @ v), t, b + "attn_out"))
        up, down = b + "ffn_up", b + "ffn_down"
        if t[up + ".weight"].shape[1] != self.n_embd or t[down + ".weight"].shape[0] != self.n_embd:
            up, down = down, up  # old files have them exchanged
        h = linear(self.activation(linear(self._norm(x, b + "ln2"), t, up)), t, down)
        return x + scale("ls2.weight", h), attention

    def _project(self, x: Array) -> Array:
        """Rows of each token (n, side^2, n_embd) -> (n, d_text)."""
        t = self.tensors
        if self.kind == "gemma3":
            mean = rms_norm(x.mean(axis=1), t["mm.soft_emb_norm.weight"], self.eps)
            return mean @ t["mm.input_projection.weight"]
        if self.kind == "kimik25":
            x = layer_norm(x, t["mm.input_norm.weight"], t["mm.input_norm.bias"], self.eps)
        flat = x.reshape(len(x), -1)
        if self.kind == "kimik25":
            return linear(gelu(linear(flat, t, "mm.1")), t, "mm.2")
        if self.kind == "idefics3":
            return flat @ t["mm.model.fc.weight"].T
        if self.kind == "mlp":
            return linear(gelu(linear(flat, t, "mm.0")), t, "mm.2")
        if self.kind == "nemotron_v2_vl":
            flat = rms_norm(flat, t["mm.model.mlp.0.weight"], 1e-6) @ t["mm.model.mlp.1.weight"].T
            return np.square(np.maximum(flat, 0)) @ t["mm.model.mlp.3.weight"].T
        flat = layer_norm(flat, t["mm.model.mlp.0.weight"], t["mm.model.mlp.0.bias"], 1e-5)
        return linear(gelu(linear(flat, t, "mm.model.mlp.1")), t, "mm.model.mlp.3")

    def _norm(self, x: Array, name: str) -> Array:
        return layer_norm(x, self.tensors[name + ".weight"], self.tensors[name + ".bias"], self.eps)


def cubic(n: int, size: int) -> Array:
    """Weights of n samples in each of `size`, (size, n): cubic convolution with a = -0.75 at the centres of pixels, the
    edge's sample beyond it (ggml_compute_forward_upscale_f32).
    """
    weights = np.zeros((size, n))
    for i in range(size):
        at = (i + 0.5) * n / size - 0.5
        first = int(np.floor(at)) - 1
        for j in range(first, first + 4):
            d = abs(at - j)
            near, far = (1.25 * d - 2.25) * d * d + 1, -0.75 * (((d - 5) * d + 8) * d - 4)
            weights[i, min(max(j, 0), n - 1)] += near if d <= 1 else far
    return weights


def turned(heads: Array, places: Array, base: float = 10000.0) -> Array:
    """Heads (n_head, n, d) whose first half turns by the column and the second by the row, in pairs of neighbours."""
    quarter = heads.shape[-1] // 4
    frequencies = base ** (-np.arange(quarter) / quarter)
    angles = np.concatenate([places[1][:, None] * frequencies, places[0][:, None] * frequencies], axis=1)
    pairs = heads.reshape(*heads.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(heads.shape)
