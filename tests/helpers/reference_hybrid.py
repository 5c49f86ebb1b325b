"""The float64 reference of hybrid decoders: Qwen3.5 (gated delta nets, attention with an output gate, interleaved
M-RoPE) and LFM2 (short convolutions).

Written from the recurrence of Gated Delta Networks (arXiv 2412.06464, equation 10) and llama.cpp's graphs, row by
row, so that no chunked form is shared with anybody. A recurrent layer sees the rows that run through it, and keeps its
state when rows are removed later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.reference import Array, Cache, Decoder, linear, load_tensors, merge_heads, rms_norm, silu, split_heads


@dataclass
class State:
    """Of a recurrent layer after its last row: (kernel - 1, n) inputs of the convolution, and the delta net's memory
    (n_heads, d, d) or None.
    """

    window: Array
    memory: Array | None

    def take(self, rows: Array) -> State:
        return self


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


class HybridDecoder(Decoder):
    """Architecture "qwen35" or "lfm2"."""

    def __init__(self, path: str | Path, kv_dtype: Any = None) -> None:
        self.metadata, self.tensors = load_tensors(path)
        self.architecture = self.metadata["general.architecture"]
        if self.architecture not in ("qwen35", "lfm2"):
            raise ValueError(self.architecture)
        self.is_qwen = self.architecture == "qwen35"
        self.kv_dtype = kv_dtype
        self.n_layer = int(self._get("block_count"))
        self.n_head = int(self._get("attention.head_count"))
        heads_kv = self.metadata[f"{self.architecture}.attention.head_count_kv"]
        self.n_head_kv = int(np.max(heads_kv))
        self.d = int(self._get("embedding_length"))
        self.head_dim = int(self._get("attention.key_length", self.d // self.n_head))
        self.eps = float(self._get("attention.layer_norm_rms_epsilon"))
        self.n_rot = int(self._get("rope.dimension_count", self.head_dim))
        base = float(self._get("rope.freq_base", 10000.0))
        self.inverse_freq = base ** (-np.arange(0, self.n_rot, 2, dtype=np.float64) / self.n_rot)
        self.mrope = self.is_qwen
        if self.is_qwen:
            t, y, x, _ = (int(s) for s in self._get("rope.dimension_sections"))
            pair = np.arange(self.n_rot // 2) % (t + y + x)
            # interleaved: t, y, x, t, y, x, ... as long as each has pairs left
            self.section_of_pair = np.where(
                (pair % 3 == 1) & (pair < 3 * y), 1, np.where((pair % 3 == 2) & (pair < 3 * x), 2, 0)
            )
            assert 3 * t > pair[pair % 3 == 0].max()
        self.recurrent = [f"blk.{il}.attn_k.weight" not in self.tensors for il in range(self.n_layer)]

    def rotate(self, x: Array, positions: Array) -> Array:
        """Pairs (i, i + n_rot / 2) of the first n_rot values of a head."""
        positions = np.asarray(positions, np.float64)
        if self.mrope:
            if positions.ndim == 1:
                positions = np.stack([positions] * 3 + [0 * positions])
            angle = positions[self.section_of_pair].T * self.inverse_freq
        else:
            angle = positions[:, None] * self.inverse_freq
        cos, sin, half = np.cos(angle), np.sin(angle), self.n_rot // 2
        out = x.copy()
        out[..., :half] = x[..., :half] * cos - x[..., half : self.n_rot] * sin
        out[..., half : self.n_rot] = x[..., :half] * sin + x[..., half : self.n_rot] * cos
        return out

    def _project(self, il: int, x: Array, positions: Array) -> tuple[Array, Cache]:
        t, b = self.tensors, f"blk.{il}."
        h = rms_norm(x, t[b + "attn_norm.weight"], self.eps)
        q = split_heads(linear(h, t, b + "attn_q"), self.n_head)[..., : self.head_dim]
        k = split_heads(linear(h, t, b + "attn_k"), self.n_head_kv)
        q = self.rotate(rms_norm(q, t[b + "attn_q_norm.weight"], self.eps), positions)
        k = self.rotate(rms_norm(k, t[b + "attn_k_norm.weight"], self.eps), positions)
        v = split_heads(linear(h, t, b + "attn_v"), self.n_head_kv)
        if self.kv_dtype is not None:
            k, v = (a.astype(self.kv_dtype).astype(np.float64) for a in (k, v))
        return q, Cache(k, v)

    def prune(self, rows, positions, is_image, text_rows=None, n_keep=None, K=0, **options):
        """As Decoder.prune. At a recurrent layer nothing can be scored."""
        return super().prune(rows, positions, is_image, [] if self.recurrent[K] else text_rows, n_keep, K, **options)

    def layer(self, il, x, positions, past=None, column_bias=0.0):
        t, b = self.tensors, f"blk.{il}."
        h = rms_norm(x, t[b + "attn_norm.weight"], self.eps)
        if self.recurrent[il]:
            read, cache = (self._delta_net if self.is_qwen else self._convolution)(b, h, past)
            weights = np.empty((self.n_head, len(x), 0))
        else:
            q, cache = self._project(il, x, positions)
            if past is not None:
                cache = Cache(np.concatenate([past.k, cache.k], 1), np.concatenate([past.v, cache.v], 1))
            weights = self._weights(q, cache.k, np.asarray(column_bias))
            read = weights @ np.repeat(cache.v, self.n_head // self.n_head_kv, axis=0)
            if self.is_qwen:
                read = read * sigmoid(split_heads(linear(h, t, b + "attn_q"), self.n_head)[..., self.head_dim :])
            read = linear(merge_heads(read), t, b + "attn_output")
        x = x + read
        h = rms_norm(x, t[b + ("post_attention_norm" if self.is_qwen else "ffn_norm") + ".weight"], self.eps)
        gated = silu(linear(h, t, b + "ffn_gate")) * linear(h, t, b + "ffn_up")
        return x + linear(gated, t, b + "ffn_down"), cache, weights

    def logits(self, x: Array) -> Array:
        norm = "output_norm.weight" if self.is_qwen else "token_embd_norm.weight"
        h = rms_norm(x, self.tensors[norm], self.eps)
        return linear(h, self.tensors, "output" if "output.weight" in self.tensors else "token_embd")

    @staticmethod
    def _causal(x: Array, kernel: Array, past: State | None) -> tuple[Array, Array]:
        """Causal convolution of each column, kernel (n, taps); the last taps - 1 rows go into the state."""
        taps = kernel.shape[1]
        before = np.zeros((taps - 1, x.shape[1])) if past is None else past.window
        padded = np.concatenate([before, x])
        return sum(padded[i : i + len(x)] * kernel[:, i] for i in range(taps)), padded[len(x) :]

    def _convolution(self, b: str, h: Array, past: State | None) -> tuple[Array, State]:
        gate_in, gate_out, x = np.split(linear(h, self.tensors, b + "shortconv.in_proj"), 3, axis=1)
        y, window = self._causal(gate_in * x, self.tensors[b + "shortconv.conv.weight"], past)
        return linear(gate_out * y, self.tensors, b + "shortconv.out_proj"), State(window, None)

    def _delta_net(self, b: str, h: Array, past: State | None) -> tuple[Array, State]:
        """S <- a S (I - b k k^T) + b v k^T; o = S q. Heads of values take turns with those of keys."""
        t, d = self.tensors, int(self._get("ssm.state_size"))
        n_k, n_v = int(self._get("ssm.group_count")), int(self._get("ssm.time_step_rank"))
        mixed, window = self._causal(linear(h, t, b + "attn_qkv"), t[b + "ssm_conv1d.weight"], past)
        q, k, v = np.split(silu(mixed), [n_k * d, 2 * n_k * d], axis=1)
        q, k = (split_heads(a, n_k)[np.arange(n_v) % n_k] for a in (q, k))
        v = split_heads(v, n_v)
        # ggml_l2_norm: the length is at least epsilon
        q, k = (a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), self.eps) for a in (q, k))
        beta = sigmoid(linear(h, t, b + "ssm_beta"))
        softplus = np.logaddexp(0, linear(h, t, b + "ssm_alpha") + t[b + "ssm_dt.bias"])
        decay = np.exp(t[b + "ssm_a"].reshape(-1) * softplus)
        memory = np.zeros((n_v, d, d)) if past is None else past.memory
        out = np.empty((n_v, len(h), d))
        for i in range(len(h)):
            memory = memory * decay[i][:, None, None]
            seen = np.einsum("hvk,hk->hv", memory, k[:, i])
            memory = memory + np.einsum("hv,hk->hvk", beta[i][:, None] * (v[:, i] - seen), k[:, i])
            out[:, i] = np.einsum("hvk,hk->hv", memory, q[:, i]) / np.sqrt(d)
        z = split_heads(linear(h, t, b + "attn_gate"), n_v)
        out = rms_norm(out, t[b + "ssm_norm.weight"], self.eps) * silu(z)
        return linear(merge_heads(out), t, b + "ssm_out"), State(window, memory)


def open_decoder(path: str | Path) -> Decoder:
    """The reference for a file's architecture."""
    try:
        return Decoder(path)
    except ValueError:
        return HybridDecoder(path)
