"""Decoder layers of a GGUF file in NumPy: keys and queries, and the gradient of a loss at a layer.

For methods that need what the engine does not read out (rivals.py). Decoders of Llama's and Qwen2-VL's kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Layers:
    """The layers of a decoder. Rows are (n, n_embd), positions (n,) or with M-RoPE (3, n)."""

    def __init__(self, path: str | Path) -> None:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer")}
        kind = fields["general.architecture"]
        if kind not in ("llama", "qwen2vl"):
            raise ValueError(f"{path} is a {kind}: llama and qwen2vl are known")
        self.tensors = {t.name: t for t in reader.tensors}
        self.n_layers, self.n_heads = fields[f"{kind}.block_count"], fields[f"{kind}.attention.head_count"]
        self.n_kv = fields[f"{kind}.attention.head_count_kv"]
        self.size = fields[f"{kind}.embedding_length"] // self.n_heads
        self.epsilon = fields[f"{kind}.attention.layer_norm_rms_epsilon"]
        self.base = fields.get(f"{kind}.rope.freq_base", 10000.0)
        sections = fields.get(f"{kind}.rope.dimension_sections")
        self.sections = None if sections is None else np.repeat(np.arange(3), sections[:3])
        self._weights: dict[str, Array] = {}
        self.halves = kind == "qwen2vl"  # RoPE pairs (i, i + size / 2), otherwise (2i, 2i + 1)

    def weight(self, name: str) -> Array:
        """A tensor by name, (out, in) float32; zeros for a bias that there is not."""
        if name not in self._weights:
            tensor = self.tensors.get(name)
            if tensor is None and not name.endswith(".bias"):
                raise KeyError(name)
            data = np.zeros(1) if tensor is None else dequantize(tensor.data, tensor.tensor_type)
            self._weights[name] = data.astype(np.float32)
        return self._weights[name]

    def embed(self, tokens: Array) -> Array:
        return self.weight("token_embd.weight")[tokens]

    def norm(self, x: Array, weight: Array) -> Array:
        scaled: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon) * weight
        return scaled

    def norm_back(self, x: Array, weight: Array, grad: Array) -> Array:
        """The gradient at x of `norm`, from the gradient at its result."""
        scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        grad = grad * weight
        back: Array = scale * (grad - x * scale**2 * (grad * x).mean(axis=-1, keepdims=True))
        return back

    def rope(self, x: Array, positions: Array, back: bool = False) -> Array:
        """x: (n, heads, size). back: turned the other way round."""
        pairs = np.arange(self.size // 2)
        at = positions[:, None] if positions.ndim == 1 else positions[self.sections].T
        angle = (at * self.base ** (-2.0 * pairs / self.size))[:, None].astype(x.dtype)
        cos, sin = np.cos(angle), np.sin(angle) * (-1 if back else 1)
        half = self.size // 2
        a, b = (x[..., :half], x[..., half:]) if self.halves else (x[..., ::2], x[..., 1::2])
        turned = np.empty_like(x)
        to_a, to_b = (turned[..., :half], turned[..., half:]) if self.halves else (turned[..., ::2], turned[..., 1::2])
        to_a[...] = a * cos - b * sin
        to_b[...] = a * sin + b * cos
        return turned

    def project(self, layer: int, hidden: Array, which: str) -> Array:
        """Queries, keys or values ("q", "k", "v") of a layer before RoPE, (n, heads, size)."""
        name = f"blk.{layer}.attn_"
        rows = self.norm(hidden, self.weight(name + "norm.weight")) @ self.weight(f"{name}{which}.weight").T
        rows = rows + self.weight(f"{name}{which}.bias")
        return rows.reshape(len(hidden), -1, self.size)

    def attention(self, layer: int, hidden: Array, positions: Array, queries: Array) -> tuple[Array, Array, Array]:
        """Causal attention of some rows: (heads, queries, n), the turned queries and the turned keys."""
        q = self.rope(self.project(layer, hidden[queries], "q"), positions[..., queries])
        k = self.rope(self.project(layer, hidden, "k"), positions)
        by_head = k.repeat(self.n_heads // self.n_kv, axis=1)
        logits = np.einsum("rhd,nhd->hrn", q, by_head) / np.sqrt(self.size)
        logits[:, np.arange(len(hidden)) > queries[:, None]] = -np.inf
        return softmax(logits), q, k

    def run(self, layer: int, hidden: Array, positions: Array) -> Array:
        """The rows after a layer."""
        return self._after(layer, hidden, positions, np.arange(len(hidden)))[0]

    def _after(self, layer: int, hidden: Array, positions: Array, rows: Array) -> tuple[Array, ...]:
        name = f"blk.{layer}."
        attention, q, _ = self.attention(layer, hidden, positions, rows)
        v = self.project(layer, hidden, "v").repeat(self.n_heads // self.n_kv, axis=1)
        read = np.einsum("hrn,nhd->rhd", attention, v).reshape(len(rows), -1)
        middle = hidden[rows] + read @ self.weight(name + "attn_output.weight").T
        normed = self.norm(middle, self.weight(name + "ffn_norm.weight"))
        gate, up = (normed @ self.weight(f"{name}ffn_{x}.weight").T for x in ("gate", "up"))
        fed = gate / (1 + np.exp(-gate)) * up
        return middle + fed @ self.weight(name + "ffn_down.weight").T, attention, q, v, middle, gate, up

    def proxy_loss(self, layer: int, hidden: Array, positions: Array, rows: Array) -> float:
        """Mean cross entropy of the most likely tokens at some rows, if the decoder ended after this layer."""
        after = self._after(layer, hidden, positions, rows)[0]
        p = softmax(self.norm(after, self.weight("output_norm.weight")) @ self.weight("output.weight").T)
        return float(-np.log(p.max(axis=-1)).mean())

    def proxy_gradient(self, layer: int, hidden: Array, positions: Array, rows: Array) -> Array:
        """The gradient of `proxy_loss` at all rows of `hidden` outside of `rows`, (n, n_embd); the tokens stay."""
        name = f"blk.{layer}."
        after, attention, q, v, middle, gate, up = self._after(layer, hidden, positions, rows)
        head, end = self.weight("output.weight"), self.weight("output_norm.weight")
        grad = softmax(self.norm(after, end) @ head.T)
        grad[np.arange(len(rows)), grad.argmax(axis=-1)] -= 1
        grad = self.norm_back(after, end, grad @ head / len(rows))
        fed = grad @ self.weight(name + "ffn_down.weight")
        sigmoid = 1 / (1 + np.exp(-gate))
        of_gate = fed * up * sigmoid * (1 + gate * (1 - sigmoid))
        normed = of_gate @ self.weight(name + "ffn_gate.weight") + fed * gate * sigmoid @ self.weight(
            name + "ffn_up.weight"
        )
        grad = grad + self.norm_back(middle, self.weight(name + "ffn_norm.weight"), normed)
        read = (grad @ self.weight(name + "attn_output.weight")).reshape(len(rows), self.n_heads, self.size)
        to_v = np.einsum("hrn,rhd->nhd", attention, read)
        towards = np.einsum("rhd,nhd->hrn", read, v)
        logits = attention * (towards - (attention * towards).sum(axis=-1, keepdims=True))
        to_k = np.einsum("hrn,rhd->nhd", logits, q) / np.sqrt(self.size)
        shape = (len(hidden), self.n_kv, self.n_heads // self.n_kv, self.size)
        to_k, to_v = to_k.reshape(shape).sum(axis=2), to_v.reshape(shape).sum(axis=2)
        to_k = self.rope(to_k, positions, back=True)
        to_normed = to_k.reshape(len(hidden), -1) @ self.weight(name + "attn_k.weight")
        to_normed = to_normed + to_v.reshape(len(hidden), -1) @ self.weight(name + "attn_v.weight")
        return self.norm_back(hidden, self.weight(name + "attn_norm.weight"), to_normed)
