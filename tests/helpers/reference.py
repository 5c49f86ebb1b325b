"""Float64 NumPy reference for two-stage image-token pruning (STAR) on GGUF models.

Written from llama.cpp's graphs and the paper alone: it shares no code with the engine, and it is
slow on purpose. Attention is causal by row order; positions only feed the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray


def load_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata as plain Python values, and every tensor dequantized to float64.

    Matrices come out as (out, in), convolution filters as (out, channel, y, x).
    """
    reader = gguf.GGUFReader(str(path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    return metadata, tensors


def average_tokens(K: int, L: int, n1: float, n2: float) -> float:
    """Image tokens per layer on average: n1 in the first K of L layers, n2 in the rest."""
    return (K * n1 + (L - K) * n2) / L


def softmax(x: Array) -> Array:
    """Softmax over the last axis; -inf is allowed, but not in a whole row."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """(n, d) -> (n, d)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(n, d) -> (n, d)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps) * weight + bias


def silu(x: Array, slope: float = 1.0) -> Array:
    """x * sigmoid(slope * x), the sigmoid written with tanh so that it never overflows."""
    return x * 0.5 * (1.0 + np.tanh(0.5 * slope * x))


def gelu(x: Array) -> Array:
    """The tanh approximation, which is what ggml_gelu computes."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * x * (1.0 + 0.044715 * x * x)))


def gelu_quick(x: Array) -> Array:
    """x * sigmoid(1.702 * x), which is what ggml_gelu_quick computes."""
    return silu(x, 1.702)


def linear(x: Array, tensors: Mapping[str, Array], name: str) -> Array:
    """(n, in) -> (n, out) with NAME.weight, and NAME.bias where the file has one."""
    y = x @ tensors[name + ".weight"].T
    bias = tensors.get(name + ".bias")
    return y if bias is None else y + bias


def split_heads(x: Array, n_head: int) -> Array:
    """(n, n_head * hd) -> (n_head, n, hd)."""
    return x.reshape(len(x), n_head, -1).transpose(1, 0, 2)


def merge_heads(x: Array) -> Array:
    """(n_head, n, hd) -> (n, n_head * hd)."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


@dataclass
class Cache:
    """Keys (after the rotary embedding) and values of one layer, each (n_head_kv, n, hd)."""

    k: Array
    v: Array

    def take(self, rows: Array) -> Cache:
        """The cache with only these rows."""
        return Cache(self.k[:, rows], self.v[:, rows])


@dataclass
class Result:
    """What `Decoder.prune` and `Decoder.extend` leave behind."""

    logits: Array  # (V,) of the last row
    kept: Array  # (n_kept,) indices into the rows given, ascending, text rows included
    scores: Array  # (n_image_rows,) in row order; empty if nothing scored
    image_rows: Array  # (n_image_rows,) the rows that the scores belong to
    caches: list[Cache]  # one per layer, over the kept rows
    column_bias: Array  # (n_layer, n_kept) added to the attention logits of these columns


class Decoder:
    """Text model of architecture "llama" (interleaved rotary pairs) or "qwen2vl" (M-RoPE)."""

    def __init__(self, path: str | Path, kv_dtype: Any = None) -> None:
        """kv_dtype: round keys and values to it before use, as llama.cpp's cache does."""
        self.metadata, self.tensors = load_tensors(path)
        self.architecture: str = self.metadata["general.architecture"]
        if self.architecture not in ("llama", "qwen2vl"):
            raise ValueError(self.architecture)
        self.kv_dtype = kv_dtype
        self.n_layer = int(self._get("block_count"))
        self.n_head = int(self._get("attention.head_count"))
        self.n_head_kv = int(self._get("attention.head_count_kv", self.n_head))
        self.d = int(self._get("embedding_length"))
        self.head_dim = int(self._get("attention.key_length", self.d // self.n_head))
        self.eps = float(self._get("attention.layer_norm_rms_epsilon"))
        base = float(self._get("rope.freq_base", 10000.0))
        self.inverse_freq = base ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        if "rope_freqs.weight" in self.tensors:
            self.inverse_freq = self.inverse_freq / self.tensors["rope_freqs.weight"]
        partial = int(self._get("rope.dimension_count", self.head_dim)) != self.head_dim
        if partial or self._get("rope.scaling.type", "none") != "none":
            raise NotImplementedError("partial or scaled rotary embedding")
        self.mrope = self.architecture == "qwen2vl"
        if self.mrope:
            sections = [int(s) for s in self._get("rope.dimension_sections")]
            sections += [0] * (4 - len(sections))
            pair = np.arange(self.head_dim // 2) % sum(sections)
            self.section_of_pair = np.searchsorted(np.cumsum(sections)[:3], pair, side="right")

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise KeyError(f"{self.architecture}.{key}")
        return value

    def embed(self, tokens: Sequence[int]) -> Array:
        """Token ids (n,) -> rows (n, d)."""
        return self.tensors["token_embd.weight"][np.asarray(tokens, dtype=int)]

    def rotate(self, x: Array, positions: Array) -> Array:
        """Rotary embedding of (n_head, n, hd); positions (n,), or (4, n) for M-RoPE (t, y, x, unused).

        (n,) positions with M-RoPE are a text token's: the same in t, y and x, 0 in the fourth.
        """
        positions = np.asarray(positions, dtype=np.float64)
        if not self.mrope:
            angle = positions[:, None] * self.inverse_freq  # (n, hd/2)
            first, second = slice(0, None, 2), slice(1, None, 2)
        else:
            if positions.ndim == 1:
                positions = np.stack([positions, positions, positions, 0 * positions])
            angle = positions[self.section_of_pair].T * self.inverse_freq
            half = self.head_dim // 2
            first, second = slice(0, half), slice(half, None)
        cos, sin, out = np.cos(angle), np.sin(angle), np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    def _project(self, il: int, x: Array, positions: Array) -> tuple[Array, Cache]:
        """Hidden states (n, d) entering block il -> queries (n_head, n, hd) and their cache rows."""
        t, b = self.tensors, f"blk.{il}."
        h = rms_norm(x, t[b + "attn_norm.weight"], self.eps)
        q = self.rotate(split_heads(linear(h, t, b + "attn_q"), self.n_head), positions)
        k = self.rotate(split_heads(linear(h, t, b + "attn_k"), self.n_head_kv), positions)
        v = split_heads(linear(h, t, b + "attn_v"), self.n_head_kv)
        if self.kv_dtype is not None:
            k, v = (a.astype(self.kv_dtype).astype(np.float64) for a in (k, v))
        return q, Cache(k, v)

    def _weights(self, q: Array, k: Array, column_bias: Array) -> Array:
        """Softmax attention (n_head, n, n_columns); the n queries are the last n of the columns."""
        n, n_columns = q.shape[1], k.shape[1]
        k = np.repeat(k, self.n_head // self.n_head_kv, axis=0)
        logits = q @ k.transpose(0, 2, 1) / np.sqrt(self.head_dim) + column_bias
        visible = np.arange(n_columns)[None, :] <= np.arange(n_columns - n, n_columns)[:, None]
        return softmax(np.where(visible, logits, -np.inf))

    def layer(
        self, il: int, x: Array, positions: Array, past: Cache | None = None, column_bias: Array | float = 0.0
    ) -> tuple[Array, Cache, Array]:
        """Run block il on rows x (n, d) that follow the rows in `past`.

        column_bias is over past and new columns. Returns the block's output (n, d), the cache with
        the new rows appended, and the attention (n_head, n, n_past + n).
        """
        t, b = self.tensors, f"blk.{il}."
        q, cache = self._project(il, x, positions)
        if past is not None:
            cache = Cache(np.concatenate([past.k, cache.k], 1), np.concatenate([past.v, cache.v], 1))
        weights = self._weights(q, cache.k, np.asarray(column_bias))
        read = weights @ np.repeat(cache.v, self.n_head // self.n_head_kv, axis=0)
        x = x + linear(merge_heads(read), t, b + "attn_output")
        h = rms_norm(x, t[b + "ffn_norm.weight"], self.eps)
        gated = silu(linear(h, t, b + "ffn_gate")) * linear(h, t, b + "ffn_up")
        return x + linear(gated, t, b + "ffn_down"), cache, weights

    def logits(self, x: Array) -> Array:
        """Hidden states (n, d) after the last block -> (n, V); the output matrix may be tied."""
        h = rms_norm(x, self.tensors["output_norm.weight"], self.eps)
        return linear(h, self.tensors, "output" if "output.weight" in self.tensors else "token_embd")

    def _per_layer(self, column_bias: Array | None, n: int) -> Array:
        """A bias of None, (n,) or (n_layer, n) -> (n_layer, n)."""
        bias = np.zeros(n) if column_bias is None else np.asarray(column_bias, dtype=np.float64)
        return np.broadcast_to(bias, (self.n_layer, n)).copy()

    def hidden(self, rows: Array, positions: Array, layer: int, column_bias: Array | None = None) -> Array:
        """The hidden states (n, d) that enter block `layer`, unpruned; layer n_layer is the last output."""
        bias, x = self._per_layer(column_bias, len(rows)), np.asarray(rows, dtype=np.float64)
        for il in range(layer):
            x, _, _ = self.layer(il, x, positions, column_bias=bias[il])
        return x

    def forward(self, rows: Array, positions: Array, column_bias: Array | None = None) -> Array:
        """Logits (n, V) of every row, unpruned."""
        return self.logits(self.hidden(rows, positions, self.n_layer, column_bias))

    def attention(self, rows: Array, positions: Array, layer: int, column_bias: Array | None = None) -> Array:
        """Softmax attention (n_head, n, n) of one block, unpruned."""
        bias, x = self._per_layer(column_bias, len(rows)), self.hidden(rows, positions, layer, column_bias)
        return self.layer(layer, x, positions, column_bias=bias[layer])[2]

    def prune(
        self,
        rows: Array,
        positions: Array,
        is_image: Array,
        text_rows: Sequence[int] | None = None,
        n_keep: int | Sequence[int] | Mapping[int, int] | None = None,
        K: int = 0,
        keep_rows: Sequence[int] | None = None,
        column_bias: Array | None = None,
    ) -> Result:
        """Run blocks [0, K) on all rows, score image rows at block K, run [K, n_layer) on what is kept.

        rows (n, d); positions (n,) or (4, n); is_image (n,) bool, or int with the image's number and -1
        for text. text_rows: the rows that score; None is the text after the last image. n_keep: image
        rows to keep, per image (one number is for each image; None or a missing image keeps all of it).
        keep_rows: the image rows to keep, as indices into rows, instead of the choice by score.
        column_bias: (n,), or (n_layer, n) to differ by layer; it is in the scores too.
        """
        x, positions = np.asarray(rows, dtype=np.float64), np.asarray(positions)
        n, bias, caches = len(x), self._per_layer(column_bias, len(x)), []
        is_image = np.asarray(is_image)
        image = np.where(is_image, 0, -1) if is_image.dtype == bool else is_image.astype(int)
        image_rows = np.flatnonzero(image >= 0)
        if text_rows is None:
            text_rows = np.arange(image_rows[-1] + 1 if len(image_rows) else 0, n)
        for il in range(K):
            x, cache, _ = self.layer(il, x, positions, column_bias=bias[il])
            caches.append(cache)
        scores = np.empty(0)
        if len(image_rows) and len(text_rows):
            q, cache = self._project(K, x, positions)
            weights = self._weights(q, cache.k, bias[K])
            scores = weights[:, np.asarray(text_rows)][:, :, image_rows].mean(axis=(0, 1))
        if keep_rows is not None:
            kept_images = np.asarray(keep_rows, dtype=int)
            if np.any(image[kept_images] < 0):
                raise ValueError("keep_rows names a text row")
        else:
            kept_images = self._choose(scores, image[image_rows], image_rows, n_keep)
        kept = np.union1d(np.flatnonzero(image < 0), kept_images)
        caches, x, positions = [c.take(kept) for c in caches], x[kept], positions[..., kept]
        for il in range(K, self.n_layer):
            x, cache, _ = self.layer(il, x, positions, column_bias=bias[il][kept])
            caches.append(cache)
        return Result(self.logits(x[-1:])[0], kept, scores, image_rows, caches, bias[:, kept])

    def progressive(
        self, rows: Array, positions: Array, is_image: Array, windows: Sequence[tuple[int, Sequence[int]]]
    ) -> Result:
        """Several decoder stages: from block K on, for each (K, image rows that stay, as indices into rows), only those
        go on.

        scores of the result: a list with, for each stage, the attention (n,) of the text after the last image to the
        rows that are still there, NaN for the others.
        """
        x, positions, is_image = np.asarray(rows, np.float64), np.asarray(positions), np.asarray(is_image)
        text = np.flatnonzero(is_image < 0)
        last_image = np.flatnonzero(is_image >= 0)[-1]
        alive, caches, scores, stages = np.arange(len(x)), [], [], dict(windows)
        for il in range(self.n_layer):
            if il in stages:
                q, cache = self._project(il, x, positions)
                seen = np.full(len(is_image), np.nan)
                seen[alive] = self._weights(q, cache.k, np.zeros(len(x)))[:, alive > last_image].mean(axis=(0, 1))
                scores.append(seen)
                stay = np.isin(alive, np.concatenate([text, np.asarray(stages[il], int)]))
                caches, x, positions, alive = (
                    [c.take(np.flatnonzero(stay)) for c in caches],
                    x[stay],
                    positions[..., stay],
                    alive[stay],
                )
            x, cache, _ = self.layer(il, x, positions, column_bias=np.zeros(len(x)))
            caches.append(cache)
        return Result(
            self.logits(x[-1:])[0],
            alive,
            scores,
            np.flatnonzero(is_image >= 0),
            caches,
            np.zeros((self.n_layer, len(alive))),
        )

    @staticmethod
    def _choose(scores: Array, image: Array, image_rows: Array, n_keep: Any) -> Array:
        """The best n_keep rows of each image; of equal scores the earlier row."""
        chosen = [np.empty(0, dtype=int)]
        for number in np.unique(image):
            mine, count = np.flatnonzero(image == number), n_keep
            if isinstance(n_keep, Mapping):
                count = n_keep.get(int(number))
            elif n_keep is not None and not np.isscalar(n_keep):
                count = n_keep[number]
            if count is not None and count < len(mine):
                mine = mine[np.argsort(-scores[mine], kind="stable")[:count]]
            chosen.append(image_rows[mine])
        return np.sort(np.concatenate(chosen))

    def extend(self, result: Result, rows: Array, positions: Array, column_bias: Array | None = None) -> Result:
        """Run further rows (m, d) through every block, after the kept rows; `result` is left as it was.

        column_bias: over the result's columns and the m new ones, instead of the result's own.
        """
        x, m = np.asarray(rows, dtype=np.float64), len(rows)
        if column_bias is None:
            bias = np.concatenate([result.column_bias, np.zeros((self.n_layer, m))], axis=1)
        else:
            bias = self._per_layer(column_bias, result.caches[0].k.shape[1] + m)
        caches = []
        for il, past in enumerate(result.caches):
            x, cache, _ = self.layer(il, x, positions, past, bias[il])
            caches.append(cache)
        return Result(self.logits(x[-1:])[0], result.kept, np.empty(0), np.empty(0, dtype=int), caches, bias)

    def generate(
        self, result: Result, n_tokens: int, next_position: int, forced: Sequence[int] | None = None
    ) -> tuple[list[int], list[Array]]:
        """Greedy continuation: tokens, and the logits (V,) that each was chosen from.

        The first token comes from result.logits and has position next_position. forced: feed these
        tokens instead of the chosen ones (to compare logits along a given text).
        """
        tokens, logits = [], []
        for i in range(n_tokens):
            logits.append(result.logits)
            tokens.append(int(np.argmax(result.logits)) if forced is None else int(forced[i]))
            if i + 1 < n_tokens:
                result = self.extend(result, self.embed(tokens[-1:]), np.array([next_position + i]))
        return tokens, logits


class ClipEncoder:
    """CLIP image encoder with projector "mlp", as llama.cpp's own llava graph computes it.

    That graph puts CLS last, yet gives row i position i and feeds rows 1..N on: with a class embedding,
    image token j is row j + 1 of [patch 0 .. patch N-1, CLS], so patch 0 is lost and CLS is a token.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads an mmproj file with clip.projector_type "mlp"."""
        self.metadata, self.tensors = load_tensors(path)
        vision = "clip.vision."
        if self.metadata["clip.projector_type"] != "mlp" or "mm.3.weight" in self.tensors:
            raise ValueError("only the mlp projector is here")
        self.image_size = int(self.metadata[vision + "image_size"])
        self.patch_size = int(self.metadata[vision + "patch_size"])
        self.n_head = int(self.metadata[vision + "attention.head_count"])
        self.eps = float(self.metadata[vision + "attention.layer_norm_epsilon"])
        self.mean, self.std = (np.array(self.metadata[vision + "image_" + name], float) for name in ("mean", "std"))
        feature_layers = self.metadata.get(vision + "feature_layer", [])
        if len(feature_layers) > 1:
            raise NotImplementedError("several feature layers")
        block_count = int(self.metadata[vision + "block_count"])
        self.n_layer_run = int(feature_layers[0]) if len(feature_layers) else block_count - 1
        self.has_class = "v.class_embd" in self.tensors
        self.n_tokens = (self.image_size // self.patch_size) ** 2
        # old files have ffn_up and ffn_down exchanged, and llama.cpp detects it by this shape
        swapped = self.tensors["v.blk.0.ffn_down.weight"].shape[1] == self.metadata[vision + "embedding_length"]
        self.ffn = ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")
        use_gelu, use_silu = (self.metadata.get("clip.use_" + name, False) for name in ("gelu", "silu"))
        self.activation = gelu if use_gelu else silu if use_silu else gelu_quick

    def token_rows(self, repaired: bool = False) -> Array:
        """The encoder row of each image token, (n_tokens,)."""
        return np.arange(self.n_tokens) + (1 if self.has_class and not repaired else 0)

    def encode(self, image: Array, repaired: bool = False) -> tuple[Array, Array]:
        """Image uint8 (H, W, 3) at the model's size -> embeddings (n_tokens, d_text), attention.

        The attention is (n_head, n_rows, n_rows), of the last block that runs. repaired: the positions
        and rows that CLIP meant (patch i has position i + 1, CLS has 0 and is not fed on).
        """
        t, p, side = self.tensors, self.patch_size, self.image_size // self.patch_size
        pixels = (np.asarray(image, dtype=np.float64) / 255.0 - self.mean) / self.std
        patches = pixels.reshape(side, p, side, p, 3).transpose(0, 2, 4, 1, 3).reshape(side * side, -1)
        x = patches @ t["v.patch_embd.weight"].reshape(-1, patches.shape[1]).T
        if "v.patch_embd.bias" in t:
            x = x + t["v.patch_embd.bias"]
        if self.has_class:
            x = np.concatenate([x, t["v.class_embd"].reshape(1, -1)])
        positions = np.arange(len(x))
        if repaired and self.has_class:
            positions = (positions + 1) % len(x)
        x = x + t["v.position_embd.weight"][positions]
        x = self._norm(x, "v.pre_ln") if "v.pre_ln.weight" in t else x
        attention = np.empty((self.n_head, 0, 0))
        for il in range(self.n_layer_run):
            b = f"v.blk.{il}."
            h = self._norm(x, b + "ln1")
            q, k, v = (split_heads(linear(h, t, b + "attn_" + name), self.n_head) for name in "qkv")
            attention = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
            x = x + linear(merge_heads(attention @ v), t, b + "attn_out")
            h = self.activation(linear(self._norm(x, b + "ln2"), t, b + self.ffn[0]))
            x = x + linear(h, t, b + self.ffn[1])
        x = self._norm(x, "v.post_ln") if "v.post_ln.weight" in t else x
        x = gelu(linear(x[self.token_rows(repaired)], t, "mm.0"))
        return (linear(x, t, "mm.2") if "mm.2.weight" in t else x), attention

    def _norm(self, x: Array, name: str) -> Array:
        return layer_norm(x, self.tensors[name + ".weight"], self.tensors[name + ".bias"], self.eps)

    def received(self, attention: Array, repaired: bool = False) -> Array:
        """Attention that each image token's row receives, (n_tokens,): the mean over heads and queries."""
        return attention.mean(axis=(0, 1))[self.token_rows(repaired)]
