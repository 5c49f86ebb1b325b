"""GGUF files of random vision encoders with their projectors (mmproj). Tensor names are libmtmd's
(tools/mtmd/clip-impl.h).
"""

from __future__ import annotations

from os import PathLike

import numpy as np

from .shapes import EncoderShape
from .weights import TensorFile

_PROJECTORS = {
    "clip": "mlp",
    "qwen2vl": "qwen2vl_merger",
    "qwen2.5vl": "qwen2.5vl_merger",
    "qwen3vl": "qwen3vl_merger",
    "qwen3.5": "qwen3vl_merger",
    "idefics3": "idefics3",
    "gemma3": "gemma3",
}
_QWEN3 = ("qwen3vl", "qwen3.5")
_CLIP_COLORS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_SIGLIP_COLORS = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def write_encoder(
    path: str | PathLike[str], shape: EncoderShape, projection_dim: int, dtype: str = "f32", seed: int = 0
) -> None:
    """Writes a random vision encoder with its projector.

    Args:
        path: The file.
        shape: Sizes of the encoder.
        projection_dim: Embedding width of the text decoder.
        dtype: As for write_decoder.
        seed: Seed of the weights.

    Raises:
        ValueError: The kind or dtype is unknown, or the dtype cannot hold the rows.
    """
    s, d = shape, shape.n_embd
    if s.kind not in _PROJECTORS:
        raise ValueError(f"unknown kind of encoder {s.kind!r}: use {', '.join(_PROJECTORS)}")
    file = TensorFile(path, "clip", dtype, np.random.default_rng(seed))
    _add_metadata(file, s, projection_dim)
    is_siglip, has_windows = s.kind in ("idefics3", "gemma3"), s.kind == "qwen2.5vl"

    def norm(name: str, has_bias: bool = not has_windows) -> None:  # Qwen2.5-VL has RMS norms
        file.normal(f"{name}.weight", d, mean=1.0)
        if has_bias:
            file.normal(f"{name}.bias", d)

    def linear(name: str, n_out: int, n_in: int) -> None:
        file.matrix(f"{name}.weight", n_out, n_in)
        file.normal(f"{name}.bias", n_out)

    def patch(name: str, kind: str = "f32") -> None:
        file.normal(name, d, 3, s.patch_size, s.patch_size, std=(3 * s.patch_size**2) ** -0.5, dtype=kind)

    n_patches = (s.image_size // s.patch_size) ** 2
    if s.kind == "clip":
        patch("v.patch_embd.weight", "f16")
        file.normal("v.class_embd", d, std=1.0)
        file.normal("v.position_embd.weight", n_patches + 1, d, std=0.5)
        norm("v.pre_ln")
    elif is_siglip:
        patch("v.patch_embd.weight")
        file.normal("v.patch_embd.bias", d)
        file.normal("v.position_embd.weight", n_patches, d, std=0.5)
        norm("v.post_ln")
    else:
        patch("v.patch_embd.weight")
        patch("v.patch_embd.weight.1")
        if s.kind in _QWEN3:
            file.normal("v.patch_embd.bias", d)
            file.normal("v.position_embd.weight", n_patches, d, std=0.5)
        norm("v.post_ln")
    for i in range(s.n_layers):
        b = f"v.blk.{i}."
        if s.kind in _QWEN3:
            linear(b + "attn_qkv", 3 * d, d)
            linear(b + "attn_out", d, d)
        else:
            for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
                linear(b + name, d, d)
        if has_windows:
            linear(b + "ffn_gate", s.n_ff, d)
        linear(b + "ffn_up", s.n_ff, d)
        linear(b + "ffn_down", d, s.n_ff)
        norm(b + "ln1")
        norm(b + "ln2")
    if s.kind == "idefics3":
        file.matrix("mm.model.fc.weight", projection_dim, d * s.n_merge**2)
    elif s.kind == "gemma3":
        file.normal("mm.soft_emb_norm.weight", d, mean=1.0)
        # stored transposed, and transposed by the graph: a quantized type cannot be
        file.normal(
            "mm.input_projection.weight", d, projection_dim, std=d**-0.5, dtype="f32" if dtype == "f32" else "f16"
        )
    else:
        n_in = d if s.kind == "clip" else 4 * d
        n_hidden = projection_dim if s.kind == "clip" else n_in
        linear("mm.0", n_hidden, n_in)
        linear("mm.2", projection_dim, n_hidden)
    for i in s.deepstack:
        file.normal(f"v.deepstack.{i}.norm.weight", 4 * d, mean=1.0)
        file.normal(f"v.deepstack.{i}.norm.bias", 4 * d)
        linear(f"v.deepstack.{i}.fc1", 4 * d, 4 * d)
        linear(f"v.deepstack.{i}.fc2", projection_dim, 4 * d)
    file.finish()


def _add_metadata(file: TensorFile, s: EncoderShape, projection_dim: int) -> None:
    w, p = file.gguf, "clip.vision."
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", _PROJECTORS[s.kind])
    for key, value in (
        ("image_size", s.image_size),
        ("patch_size", s.patch_size),
        ("embedding_length", s.n_embd),
        ("feed_forward_length", s.n_ff),
        ("block_count", s.n_layers),
        ("attention.head_count", s.n_heads),
        ("projection_dim", projection_dim),
    ):
        w.add_uint32(p + key, value)
    w.add_float32(p + "attention.layer_norm_epsilon", 1e-5)
    mean, std = _SIGLIP_COLORS if s.kind in ("idefics3", "gemma3", *_QWEN3) else _CLIP_COLORS
    w.add_array(p + "image_mean", mean)
    w.add_array(p + "image_std", std)
    if s.kind in ("idefics3", "gemma3"):
        w.add_bool("clip.use_gelu", True)
        w.add_uint32(p + "projector.scale_factor", s.n_merge)
    if s.kind in _QWEN3:
        w.add_bool("clip.use_gelu", True)
        w.add_uint32(p + "spatial_merge_size", 2)
        w.add_array(p + "is_deepstack_layers", [i in s.deepstack for i in range(s.n_layers)])
    if s.longest_edge:
        w.add_uint32(p + "preproc_image_size", s.longest_edge)
    if s.kind == "qwen2.5vl":
        w.add_bool("clip.use_silu", True)
        w.add_uint32(p + "n_wa_pattern", s.full_attention_every)
    if s.pinpoints:
        w.add_array(p + "image_grid_pinpoints", [n for size in s.pinpoints for n in size])
