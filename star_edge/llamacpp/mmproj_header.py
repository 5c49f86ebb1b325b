"""The header of an mmproj file: its numbers, and the shapes of tensors that follow from them.

What is checked in every file, and the checks that the rules of a projector (`mmproj_check`) are made of.
"""

from __future__ import annotations

import math
from collections.abc import Container

from .gguf_check import F16, F32, Header, type_name

V = "clip.vision."
_KINDS = {
    "bool": (
        "clip.has_vision_encoder",
        "clip.has_audio_encoder",
        "clip.has_gen_audio_encoder",
        "clip.use_gelu",
        "clip.use_silu",
        "clip.has_llava_projector",
    ),
    "str": (
        "general.name",
        "general.description",
        "clip.projector_type",
        V + "projector_type",
        "clip.audio.projector_type",
        V + "mm_patch_merge_type",
    ),
    "u32": tuple(
        V + name
        for name in (
            "embedding_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.head_dim",
            "feed_forward_length",
            "block_count",
            "projection_dim",
            "image_size",
            "patch_size",
            "image_min_pixels",
            "image_max_pixels",
            "preproc_min_tiles",
            "preproc_max_tiles",
            "preproc_image_size",
            "projector.scale_factor",
            "spatial_merge_size",
            "n_wa_pattern",
            "window_size",
            "projector.query_side",
            "projector.window_side",
            "expert_used_count",
            "sam.head_count",
            "sam.block_count",
            "sam.embedding_length",
        )
    )
    + ("clip.minicpmv_query_num",),
    "i32": ("clip.minicpmv_version",),
    "f32": (V + "attention.layer_norm_epsilon",),
    "[f32]": (V + "image_mean", V + "image_std"),
    "[i32]": (V + "image_grid_pinpoints", V + "feature_layer", V + "wa_layer_indexes"),
}
_REQUIRED = tuple(
    V + name
    for name in (
        "embedding_length",
        "attention.head_count",
        "feed_forward_length",
        "block_count",
        "projection_dim",
        "image_size",
        "patch_size",
        "attention.layer_norm_epsilon",
        "image_mean",
        "image_std",
    )
)
_BY_MERGE_SIZE = (
    "pixtral",
    "lightonocr",
    "qwen2vl_merger",
    "qwen2.5vl_merger",
    "qwen3vl_merger",
    "glm4v",
    "hunyuanvl",
)
_TAKE_FUSED = (  # clip_graph::build_vit
    "gemma3",
    "idefics3",
    "internvl",
    "lfm2",
    "pixtral",
    "gemma4v",
    "resampler",
    "glm4v",
    "hunyuanvl",
    "kimik25",
    "lightonocr",
    "nemotron_v2_vl",
    "paddleocr",
)
# Projectors whose file may have up and down the wrong way round (clip_model_loader::load_tensors, is_ffn_swapped)
_SWAPPED = (
    "mlp",
    "ldp",
    "ldpv2",
    "adapter",
    "qwen2vl_merger",
    "qwen2.5vl_merger",
    "gemma3",
    "idefics3",
    "resampler",
    "minicpmv4_6",
)
_WITHOUT_LAYERS = ("gemma4uv",)  # of those whose graph is known
_LARGEST_F16 = 65504.0  # llama.cpp rounds pixels to f16 before the first convolution
_MAX_SIDE = 8192  # pixels: clip_model_loader's own bound for image_size


def check_kinds(header: Header) -> bool:
    """Checks types of keys and of tensors.

    Returns:
        Whether there is a vision encoder, whose numbers must be checked too.

    Raises:
        ModelFileError: A key is missing or has another type than llama.cpp reads, or a tensor has such a type.
    """
    for kind, keys in _KINDS.items():
        header.kinds(kind, keys)
    if not header.get("clip.has_vision_encoder"):
        return False
    for key in _REQUIRED:
        if key not in header.info.metadata:
            header.refuse(f"{key} is missing")
    header.types(exempt=(".input_min", ".input_max", ".output_min", ".output_max"))
    return True


class MmprojHeader:
    """The numbers of a vision encoder, and the shapes that follow from them.

    Attributes:
        d: Width.
        side: Patches along a side of a picture of image_size.
    """

    def __init__(self, header: Header, projectors: Container[str]) -> None:
        """Checks the numbers. projectors: those whose graph is known.

        Raises:
            ModelFileError: A key is missing or has another type than llama.cpp reads, or a number is impossible.
        """
        self.header = h = header
        self.projector = h.get("clip.projector_type") or h.get(V + "projector_type") or ""
        # Encoders of other graphs may have no heads or layers of the usual kind, and say 0 (Gemma 3n has a MobileNet).
        is_known = self.projector in projectors
        has_layers = is_known and self.projector not in _WITHOUT_LAYERS
        self.d = h.whole(V + "embedding_length", 1, 2**20, 0)
        self.heads = h.whole(V + "attention.head_count", int(has_layers), 2**16, 0)
        self.heads_kv = h.whole(V + "attention.head_count_kv", int(has_layers), 2**16, self.heads)
        self.d_head = h.whole(V + "attention.head_dim", 0, 2**16, 0)
        self.n_layers = h.whole(V + "block_count", int(has_layers), 2**12, 0)
        self.patch = h.whole(V + "patch_size", 1, 2**16 - 1, 0)
        self.image = h.whole(V + "image_size", 0, _MAX_SIDE, 0)
        h.whole(V + "preproc_image_size", 1, _MAX_SIDE)
        tiles = h.whole(V + "preproc_max_tiles", 0, 2**10)
        h.whole(
            V + "preproc_min_tiles", 0, tiles if tiles is not None else 12 if self.projector == "internvl" else 2**10
        )
        h.whole(V + "image_min_pixels", 0, _MAX_SIDE**2)
        h.whole(V + "image_max_pixels", 0, _MAX_SIDE**2 * 4)
        if is_known or h.get(V + "attention.layer_norm_epsilon") != 0:
            h.real(V + "attention.layer_norm_epsilon")
        h.real(V + "image_mean", positive=False)
        h.real(V + "image_std")
        for mean, std in zip(h.get(V + "image_mean") or [], h.get(V + "image_std") or []):
            if not max(abs(mean), abs(1 - mean)) <= _LARGEST_F16 * std:
                h.refuse(f"{V}image_mean = {mean} and {V}image_std = {std} make pixels of more than {_LARGEST_F16:g}")
        points = h.get(V + "image_grid_pinpoints") or []
        if any(not 0 < p <= _MAX_SIDE for p in points):
            h.refuse(f"{V}image_grid_pinpoints = {points}, and they are pixels from 1 to {_MAX_SIDE}")
        if self.d and self.heads and not self.d_head:
            if is_known and self.d % self.heads:
                h.refuse(f"{V}embedding_length = {self.d} is not a multiple of {V}attention.head_count = {self.heads}")
            self.d_head = self.d // self.heads
        self.side = self.image // self.patch if self.patch else 0
        if self.image and not self.side:
            h.refuse(f"{V}image_size = {self.image} is less than {V}patch_size = {self.patch}")
        self.merge_key = V + ("spatial_merge_size" if self.projector in _BY_MERGE_SIZE else "projector.scale_factor")

    def merge(self, default: int, least: int = 1) -> int:
        n_merge: int = self.header.whole(self.merge_key, least, max(least, 64), default)
        return n_merge

    # ---- shapes; why: the keys that they follow from ----

    def vector(self, name: str, n: int, why: str, *, required: bool = False) -> None:
        self.header.tensor(name, (n,), why, required=required)
        self.header.added(name)

    def norm(self, name: str, n: int, why: str = V + "embedding_length") -> None:
        self.vector(name + ".weight", n, why)
        self.vector(name + ".bias", n, why)

    def linear(self, name: str, n_in: int, why: str, n_out: int | None = None, *, bias: bool = False) -> int:
        """Checks a matrix, and its bias if it is present or required. Returns the output width."""
        tensor = self.header.tensor(name + ".weight", (n_in, n_out), why)
        n = (*tensor.shape, 1)[1]
        self.vector(name + ".bias", n, f"{name}.weight", required=bias)
        return n

    def kernel(self, name: str, shape: tuple[int, int, int], why: str) -> int:
        """A convolution of (columns, rows, channels), and its bias. Returns its output channels."""
        tensor = self.header.tensor(name + ".weight", (*shape, None), why)
        n = (*tensor.shape, 1)[3]
        self.vector(name + ".bias", n, name, required=True)
        return n

    def patches(self, n_tensors: int = 1) -> None:
        """Checks the convolution that makes patches."""
        why = f"{V}patch_size = {self.patch} and {V}embedding_length = {self.d}"
        for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")[:n_tensors]:
            tensor = self.header.tensor(name, (self.patch, self.patch, 3, self.d), why)
            if tensor.kind not in (F32, F16):
                self.header.refuse(f"tensor {name} is {type_name(tensor.kind)}, and llama.cpp takes f32 or f16 there")
        self.vector("v.patch_embd.bias", self.d, why)

    def depthwise(self, name: str, n: int, why: str) -> None:
        """Checks a 3 x 3 kernel for each of n channels.

        The legacy converter omits the axis of length one. ggml_conv_2d_dw takes both.
        """
        found = self.header.info.tensors.get(name)
        self.header.tensor(name, (3, 3, n) if found is not None and len(found.shape) == 3 else (3, 3, 1, n), why)

    def positions(self, n: int, *, exact: bool, added: bool) -> None:
        """Checks position embeddings for n rows. added: they are added as they are; otherwise rows are picked."""
        name = "v.position_embd.weight"
        why = f"{V}image_size = {self.image}, {V}patch_size = {self.patch} and {V}embedding_length = {self.d}"
        tensor = self.header.tensor(name, (self.d, n if exact else None), why)
        if (*tensor.shape, 1)[1] < n:
            self.header.refuse(f"tensor {name} is {list(tensor.shape)}, and {n} rows follow from {why}")
        if added:
            self.header.added(name)

    def square_positions(self) -> None:
        """Checks position embeddings that are scaled to the picture's grid."""
        name = "v.position_embd.weight"
        n = (*self.header.tensor(name, (self.d, None), V + "embedding_length").shape, 1)[1]
        if math.isqrt(n) ** 2 != n:
            self.header.refuse(f"tensor {name} has {n} rows, which is not a square")
        if self.header.info.tensors[name].kind != F32:
            self.header.refuse(
                f"tensor {name} is {type_name(self.header.info.tensors[name].kind)}, and llama.cpp scales f32 alone"
            )

    def layers(self, *, fused: bool = False, biases: bool = False) -> None:
        """Checks attention and feed-forward of every layer.

        Args:
            fused: Q, K and V must be one matrix.
            biases: They must have biases.
        """
        width = f"{V}embedding_length = {self.d}"
        head = f"{V}attention.head_count = {self.heads}"
        q, kv = self.d_head * self.heads, self.d_head * self.heads_kv
        self.norm("v.pre_ln", self.d)
        self.norm("v.post_ln", self.d)
        for i in range(self.n_layers):
            b = f"v.blk.{i}."
            for name in ("ln1", "ln2", "attn_post_norm", "ffn_post_norm", "ls1", "ls2"):
                self.norm(b + name, self.d)
            if fused or (b + "attn_qkv.weight" in self.header.info.tensors and self.projector in _TAKE_FUSED):
                self.linear(b + "attn_qkv", self.d, f"{width} and {head}", q + 2 * kv, bias=biases)
            else:
                for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                    self.linear(b + name, self.d, f"{width} and {head}", n, bias=biases)
            for name in ("attn_q_norm", "attn_k_norm"):
                found = self.header.info.tensors.get(b + name + ".weight")
                if (
                    found is not None
                    and found.shape != (self.d_head,)
                    and (self.projector in ("gemma4v", "glm4v") or found.shape != (self.d,))
                ):
                    self.header.refuse(
                        f"tensor {b}{name}.weight is {list(found.shape)}, and a head has {self.d_head} values ({head})"
                    )
            self.linear(b + "attn_out", q, width, self.d)
            self._feed_forward(b, width)

    def _feed_forward(self, b: str, why: str) -> None:
        up, down = b + "ffn_up", b + "ffn_down"
        found = self.header.info.tensors.get(down + ".weight")
        if found is not None and found.shape[0] == self.d and self.projector in _SWAPPED:
            up, down = down, up
        n = self.linear(up, self.d, why)
        if b + "ffn_gate.weight" in self.header.info.tensors:
            self.linear(b + "ffn_gate", self.d, f"{why} and {up}", n)
        self.linear(down, n, f"{up} and {why}", self.d)
