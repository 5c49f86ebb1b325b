"""Float64 NumPy reference of encoders of any picture size, over some of a picture's units, from any layer on.

Written from the models' definitions in Hugging Face transformers (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Pixtral, Mistral 3.1,
GLM-4.1V, GLM-OCR and PaddleOCR-VL): it shares no code with the engine. A unit is the square of patches that becomes one
image token; (n, side * side, ...) arrays hold the patches of n units, row by row within each unit. Activations are what
llama.cpp takes for the same files. With all units it is checked against transformers' own features (tests/fixtures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    silu,
    softmax,
    split_heads,
)

ROPE_BASE = 10000.0


class UnitEncoder:
    """An mmproj file of one of these families."""

    def __init__(self, path: str | Path) -> None:
        self.metadata, self.t = load_tensors(path)
        get = lambda name, default=None: self.metadata.get("clip.vision." + name, default)
        self.kind = self.metadata["clip.projector_type"]
        self.patch, self.n_layer, self.n_head = (
            int(get(name)) for name in ("patch_size", "block_count", "attention.head_count")
        )
        self.eps = float(get("attention.layer_norm_epsilon"))
        self.is_glm, self.is_paddle = self.kind == "glm4v", self.kind == "paddleocr"
        self.is_qwen = self.kind != "pixtral"  # in how positions turn, and how large a unit is
        self.side = 2 if self.is_qwen else int(get("spatial_merge_size", 1))
        self.full_every = int(get("n_wa_pattern", 0)) or 1
        self.window = int(get("window_size", 112)) // self.patch // self.side
        self.deepstack = [i for i, flag in enumerate(get("is_deepstack_layers", [])) if flag]
        use = lambda name: self.metadata.get("clip.use_" + name, False)
        self.activation: Callable[[Array], Array] = gelu if use("gelu") else silu if use("silu") else gelu_quick
        self.mean, self.std = (np.array(get("image_" + name), float) for name in ("mean", "std"))

    # ---- before the layers ----

    def grid(self, image: Array) -> tuple[int, int]:
        """(rows, columns) of units."""
        return tuple(n // (self.patch * self.side) for n in image.shape[:2])

    def pixels(self, image: Array) -> Array:
        """(h, w, 3) uint8 -> (n_units, side * side, 3, patch, patch), normalized."""
        rows, columns = self.grid(image)
        s, p = self.side, self.patch
        x = (np.asarray(image, float) / 255 - self.mean) / self.std
        return x.reshape(rows, s, p, columns, s, p, 3).transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, s * s, 3, p, p)

    def places(self, image: Array) -> tuple[Array, Array]:
        """y and x of each patch, (n_units, side * side) each."""
        rows, columns = self.grid(image)
        s = self.side
        y, x = np.mgrid[: rows * s, : columns * s]
        in_units = lambda a: a.reshape(rows, s, columns, s).swapaxes(1, 2).reshape(-1, s * s)
        return in_units(y), in_units(x)

    def embed(self, image: Array) -> Array:
        """What enters layer 0, (n_units, side * side, d)."""
        t, pixels = self.t, self.pixels(image)
        filters = t["v.patch_embd.weight"] + t.get("v.patch_embd.weight.1", 0)  # a still image: both frames are one
        x = pixels.reshape(*pixels.shape[:2], -1) @ filters.reshape(len(filters), -1).T
        x = x + t.get("v.patch_embd.bias", 0)
        if "v.norm_embd.weight" in t:
            x = self._norm(x, "v.norm_embd")
        if "v.position_embd.weight" in t:
            qwen = not (self.is_glm or self.is_paddle)
            x = x + (self._position_embeddings(image) if qwen else self._resampled_embeddings(image))
        if "v.pre_ln.weight" in t:
            x = self._norm(x, "v.pre_ln")
        return x

    def _position_embeddings(self, image: Array) -> Array:
        """Bilinear between the embeddings of a square grid, corners on corners (Qwen3VLVisionModel)."""
        table = self.t["v.position_embd.weight"]
        n = int(len(table) ** 0.5)
        rows, columns = self.grid(image)
        y, x = self.places(image)
        y = y * (n - 1) / (rows * self.side - 1)
        x = x * (n - 1) / (columns * self.side - 1)
        y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
        y1, x1 = np.minimum(y0 + 1, n - 1), np.minimum(x0 + 1, n - 1)
        dy, dx = (y - y0)[..., None], (x - x0)[..., None]
        at = lambda a, b: table[a * n + b]
        return (1 - dy) * ((1 - dx) * at(y0, x0) + dx * at(y0, x1)) + dy * ((1 - dx) * at(y1, x0) + dx * at(y1, x1))

    def _resampled_embeddings(self, image: Array) -> Array:
        """Sampled at the centres of patches, edges repeated: bicubic with a = -0.75 (torch's grid_sample, which
        Glm4vVisionEmbeddings uses), or bilinear (torch's interpolate, as PaddleOCRVisionEmbeddings).
        """
        table = self.t["v.position_embd.weight"]
        n = int(len(table) ** 0.5)
        sizes = [side * self.side for side in self.grid(image)]
        places = [(place + 0.5) * n / size - 0.5 for place, size in zip(self.places(image), sizes)]
        total = 0.0
        for dy, wy in self._kernel(places[0]):
            for dx, wx in self._kernel(places[1]):
                y, x = (np.clip(np.floor(p).astype(int) + d, 0, n - 1) for p, d in zip(places, (dy, dx)))
                total = total + (wy * wx)[..., None] * table[y * n + x]
        return total

    def _kernel(self, place: Array) -> list[tuple[int, Array]]:
        """(offset, weight of the entry there) for each neighbour of a place between two entries."""
        t = place - np.floor(place)
        if self.is_paddle:
            return [(0, 1 - t), (1, t)]
        a = -0.75
        near = lambda s: (a + 2) * s**3 - (a + 3) * s**2 + 1
        far = lambda s: a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a
        return [(-1, far(t + 1)), (0, near(t)), (1, near(1 - t)), (2, far(2 - t))]

    # ---- the layers ----

    def encode(self, image: Array, keep: Array, layer: int = 0) -> Array:
        """Features of the units `keep` if the others leave before layer `layer` (0: they never enter).

        image: (h, w, 3) uint8, whose sides are whole units. keep: raster numbers. Returns (len(keep), n_embd_inp).
        """
        x, (py, px) = self.embed(image), self.places(image)
        units = np.arange(len(x))
        planes: list[Array] = []
        for il in range(self.n_layer + 1):
            if il == layer:
                x, py, px, units = x[keep], py[keep], px[keep], units[keep]
                planes = [plane[keep] for plane in planes]
            if il < self.n_layer:
                x = self.layer(il, x, py, px, self._mask(il, units, image))[0]
                if il in self.deepstack:
                    planes.append(self._deepstack(il, x))
        return np.concatenate([self._project(x), *planes], axis=1)

    def received(self, image: Array, units: Array, layer: int) -> Array:
        """Attention that each of these units receives in a layer if the others never entered: the mean over heads and
        query rows, and over its patches. (n,)
        """
        x, (py, px) = self.embed(image)[units], (place[units] for place in self.places(image))
        for il in range(layer + 1):
            x, attention = self.layer(il, x, py, px, self._mask(il, units, image))
        return attention.mean(axis=(0, 1)).reshape(len(units), -1).mean(axis=1)

    def _mask(self, il: int, units: Array, image: Array) -> Array:
        """(rows, rows) of what is added to attention logits: units of other windows are hidden from some layers."""
        patches = self.side**2
        if self.full_every == 1 or (il + 1) % self.full_every == 0:
            return np.zeros((1, 1))
        y, x = np.divmod(units, self.grid(image)[1])
        window = np.repeat(y // self.window * 1000 + x // self.window, patches)
        return np.where(window[:, None] == window, 0.0, -np.inf)

    def layer(self, il: int, x: Array, py: Array, px: Array, mask: Array) -> tuple[Array, Array]:
        """(n, side * side, d) -> the same after a layer, and its attention, (n_head, rows, rows)."""
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        t, b = self.t, f"v.blk.{il}."
        h = self._norm(x, b + "ln1")
        if b + "attn_qkv.weight" in t:
            parts = np.split(linear(h, t, b + "attn_qkv"), 3, axis=1)
        else:
            parts = [linear(h, t, b + "attn_" + name) for name in "qkv"]
        q, k, v = (split_heads(part, self.n_head) for part in parts)
        if b + "attn_q_norm.weight" in t:
            q, k = (rms_norm(a, t[f"{b}attn_{name}_norm.weight"], self.eps) for a, name in ((q, "q"), (k, "k")))
        rotate = rotate_halves if self.is_qwen else rotate_pairs
        q, k = (rotate(a, py.ravel(), px.ravel()) for a in (q, k))
        attention = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + mask)
        x = x + linear(merge_heads(attention @ v), t, b + "attn_out")
        h = self._norm(x, b + "ln2")
        up = linear(h, t, b + "ffn_up")
        up = self.activation(linear(h, t, b + "ffn_gate")) * up if b + "ffn_gate.weight" in t else self.activation(up)
        return (x + linear(up, t, b + "ffn_down")).reshape(shape), attention

    # ---- after the layers ----

    def _deepstack(self, il: int, x: Array) -> Array:
        b = f"v.deepstack.{il}."
        h = self._norm(x.reshape(len(x), -1), b + "norm")
        return linear(gelu(linear(h, self.t, b + "fc1")), self.t, b + "fc2")

    def _project(self, x: Array) -> Array:
        t = self.t
        if self.is_glm:  # Glm4vVisionPatchMerger behind a convolution over each unit
            x = self._norm(x, "v.post_ln").reshape(len(x), self.side, self.side, -1)
            x = np.einsum("nyxc,ocyx->no", x, t["mm.patch_merger.weight"]) + t["mm.patch_merger.bias"]
            x = layer_norm(linear(x, t, "mm.model.fc"), t["mm.post_norm.weight"], t["mm.post_norm.bias"], 1e-5)
            x = gelu_exact(x)
            return linear(silu(linear(x, t, "mm.gate")) * linear(x, t, "mm.up"), t, "mm.down")
        if self.is_paddle:
            x = layer_norm(self._norm(x, "v.post_ln"), t["mm.input_norm.weight"], t["mm.input_norm.bias"], 1e-5)
            return linear(gelu(linear(x.reshape(len(x), -1), t, "mm.1")), t, "mm.2")
        if self.is_qwen:
            x = self._norm(x, "v.post_ln").reshape(len(x), -1)
            return linear(gelu(linear(x, t, "mm.0")), t, "mm.2")
        if "mm.patch_merger.weight" in t:  # Mistral3PatchMerger: channels of a square of patches, channel by channel
            x = rms_norm(x, t["mm.input_norm.weight"], self.eps).swapaxes(1, 2).reshape(len(x), -1)
            x = linear(x, t, "mm.patch_merger")
        return linear(gelu(linear(x.reshape(len(x), -1), t, "mm.1")), t, "mm.2")

    def _norm(self, x: Array, name: str) -> Array:
        t: Mapping[str, Array] = self.t
        if name + ".bias" in t:
            return layer_norm(x, t[name + ".weight"], t[name + ".bias"], self.eps)
        return rms_norm(x, t[name + ".weight"], self.eps)


def gelu_exact(x: Array) -> Array:
    """x times the normal distribution's integral, which is what ggml_gelu_erf computes."""
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def rotate_halves(x: Array, y_of: Array, x_of: Array) -> Array:
    """Qwen's: element j goes with j + hd/2; of these pairs the first half turns with y, the other with x."""
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    frequency = ROPE_BASE ** (-np.arange(quarter) * 2.0 / half)
    angle = np.concatenate([y_of[:, None] * frequency, x_of[:, None] * frequency], axis=1)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], axis=-1
    )


def rotate_pairs(x: Array, y_of: Array, x_of: Array) -> Array:
    """Pixtral's (PixtralRotaryEmbedding), as converters order it: neighbours are pairs; the first half of them turns
    with y at the even frequencies, the second with x at the odd ones.
    """
    n_pairs = x.shape[-1] // 2
    frequency = ROPE_BASE ** (-np.arange(n_pairs) / n_pairs)
    angle = np.concatenate([y_of[:, None] * frequency[::2], x_of[:, None] * frequency[1::2]], axis=1)
    even, odd = x[..., ::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
    out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return out
