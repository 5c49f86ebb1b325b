"""Checks that the header of an mmproj file fits its tensors, before libmtmd sees the file.

libmtmd compares almost nothing (clip_model_loader::load_hparams, load_tensors). A width, a patch size or a merge factor
that contradicts the tensors ends the process when the graph is built or run. Numbers, types of values and types of
tensors are checked in every file. Shapes are checked if the projector's graph (tools/mtmd/models/) is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .gguf import GGUFInfo
from .gguf_check import BF16, F16, F32, Header, type_name

_V = "clip.vision."
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
        _V + "projector_type",
        "clip.audio.projector_type",
        _V + "mm_patch_merge_type",
    ),
    "u32": tuple(
        _V + name
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
    "f32": (_V + "attention.layer_norm_epsilon",),
    "[f32]": (_V + "image_mean", _V + "image_std"),
    "[i32]": (_V + "image_grid_pinpoints", _V + "feature_layer", _V + "wa_layer_indexes"),
}
# Projectors whose file may have up and down the wrong way round (clip_model_loader::load_tensors, is_ffn_swapped)
_SWAPPED = ("mlp", "ldp", "ldpv2", "adapter", "qwen2vl_merger", "qwen2.5vl_merger", "gemma3", "idefics3", "resampler")
_REQUIRED = tuple(
    _V + name
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
_LARGEST_F16 = 65504.0  # llama.cpp rounds pixels to f16 before the first convolution
_MAX_SIDE = 8192  # pixels: clip_model_loader's own bound for image_size
_LDP_SIDE = 24  # patches of a side: a constant of clip_graph_llava
_RESAMPLER_BUCKETS = (
    70  # rows and columns of the position embeddings that MiniCPM-V's patches are put into (clip_image_batch_encode)
)
_RESAMPLER_HEAD = 128  # clip_graph_minicpmv


def check_mmproj(info: GGUFInfo) -> None:
    """Checks a file with a vision encoder.

    Raises:
        ModelFileError: A key has another type than llama.cpp reads, or a number is impossible or contradicts the
            tensors.
    """
    header = Header(info)
    for kind, keys in _KINDS.items():
        header.kinds(kind, keys)
    if not header.get("clip.has_vision_encoder"):
        return
    for key in _REQUIRED:
        if key not in info.metadata:
            header.refuse(f"{key} is missing")
    header.types(exempt=(".input_min", ".input_max", ".output_min", ".output_max"))
    check = _Check(header)
    build = _PROJECTORS.get(check.projector)
    if build is not None:
        build(check)


class _Check:
    """The numbers of a vision encoder, and the shapes that follow from them.

    Attributes:
        d: Width.
        side: Patches along a side of a picture of image_size.
    """

    def __init__(self, header: Header) -> None:
        self.header = h = header
        self.projector = h.get("clip.projector_type") or h.get(_V + "projector_type") or ""
        # Encoders of other graphs may have no heads or layers of the usual kind, and say 0 (Gemma 3n has a MobileNet).
        is_known = self.projector in _PROJECTORS
        self.d = h.whole(_V + "embedding_length", 1, 2**20, 0)
        self.heads = h.whole(_V + "attention.head_count", int(is_known), 2**16, 0)
        self.heads_kv = h.whole(_V + "attention.head_count_kv", int(is_known), 2**16, self.heads)
        self.d_head = h.whole(_V + "attention.head_dim", 0, 2**16, 0)
        self.n_layers = h.whole(_V + "block_count", int(is_known), 2**12, 0)
        self.patch = h.whole(_V + "patch_size", 1, 2**16 - 1, 0)
        self.image = h.whole(_V + "image_size", 0, _MAX_SIDE, 0)
        h.whole(_V + "preproc_image_size", 1, _MAX_SIDE)
        tiles = h.whole(_V + "preproc_max_tiles", 0, 2**10)
        h.whole(
            _V + "preproc_min_tiles", 0, tiles if tiles is not None else 12 if self.projector == "internvl" else 2**10
        )
        h.whole(_V + "image_min_pixels", 0, _MAX_SIDE**2)
        h.whole(_V + "image_max_pixels", 0, _MAX_SIDE**2 * 4)
        if is_known or h.get(_V + "attention.layer_norm_epsilon") != 0:
            h.real(_V + "attention.layer_norm_epsilon")
        h.real(_V + "image_mean", positive=False)
        h.real(_V + "image_std")
        for mean, std in zip(h.get(_V + "image_mean") or [], h.get(_V + "image_std") or []):
            if not max(abs(mean), abs(1 - mean)) <= _LARGEST_F16 * std:
                h.refuse(f"{_V}image_mean = {mean} and {_V}image_std = {std} make pixels of more than {_LARGEST_F16:g}")
        points = h.get(_V + "image_grid_pinpoints") or []
        if any(not 0 < p <= _MAX_SIDE for p in points):
            h.refuse(f"{_V}image_grid_pinpoints = {points}, and they are pixels from 1 to {_MAX_SIDE}")
        if self.d and self.heads and not self.d_head:
            if is_known and self.d % self.heads:
                h.refuse(
                    f"{_V}embedding_length = {self.d} is not a multiple of {_V}attention.head_count = {self.heads}"
                )
            self.d_head = self.d // self.heads
        self.side = self.image // self.patch if self.patch else 0
        if self.image and not self.side:
            h.refuse(f"{_V}image_size = {self.image} is less than {_V}patch_size = {self.patch}")
        self.merge_key = _V + ("spatial_merge_size" if self.projector in _BY_MERGE_SIZE else "projector.scale_factor")

    def merge(self, default: int, least: int = 1) -> int:
        n_merge: int = self.header.whole(self.merge_key, least, max(least, 64), default)
        return n_merge

    # ---- shapes; why: the keys that they follow from ----

    def vector(self, name: str, n: int, why: str, *, required: bool = False) -> None:
        self.header.tensor(name, (n,), why, required=required)
        self.header.added(name)

    def norm(self, name: str, n: int, why: str = _V + "embedding_length") -> None:
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
        why = f"{_V}patch_size = {self.patch} and {_V}embedding_length = {self.d}"
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
        why = f"{_V}image_size = {self.image}, {_V}patch_size = {self.patch} and {_V}embedding_length = {self.d}"
        tensor = self.header.tensor(name, (self.d, n if exact else None), why)
        if (*tensor.shape, 1)[1] < n:
            self.header.refuse(f"tensor {name} is {list(tensor.shape)}, and {n} rows follow from {why}")
        if added:
            self.header.added(name)

    def square_positions(self) -> None:
        """Checks position embeddings that are scaled to the picture's grid."""
        name = "v.position_embd.weight"
        n = (*self.header.tensor(name, (self.d, None), _V + "embedding_length").shape, 1)[1]
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
        width = f"{_V}embedding_length = {self.d}"
        head = f"{_V}attention.head_count = {self.heads}"
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


def _llava(c: _Check) -> None:
    if not c.side:
        c.header.refuse(f"{_V}image_size = {c.image}, and pictures have a fixed size")
    c.patches()
    c.vector("v.class_embd", c.d, _V + "embedding_length")
    # More rows would not fail, but they would belong to another grid.
    c.positions(c.side**2 + ("v.class_embd" in c.header.info.tensors), exact=True, added=False)
    points = c.header.get(_V + "image_grid_pinpoints") or []
    if any(p % c.image for p in points):  # a crop that is left over may be smaller than a patch
        c.header.refuse(f"{_V}image_grid_pinpoints = {points}, and {_V}image_size = {c.image} does not divide them")
    c.layers()
    layers = c.header.get(_V + "feature_layer") or []
    if any(layer > c.n_layers for layer in layers):
        c.header.refuse(f"{_V}feature_layer = {layers}, and {_V}block_count = {c.n_layers}")
    n_in = c.d * max(1, len({layer for layer in layers if layer >= 0}))
    why = f"{_V}embedding_length = {c.d}" + (f" and {_V}feature_layer = {layers}" if layers else "")
    if c.projector == "mlp":
        n = c.linear("mm.0", n_in, why, bias=True)
        if "mm.3.weight" in c.header.info.tensors:  # Yi's, with norms
            for name in ("mm.1", "mm.4"):
                for end in (".weight", ".bias"):
                    c.vector(name + end, n, "mm.0.weight", required=True)
            c.linear("mm.3", n, "mm.0.weight", n, bias=True)
        else:
            c.linear("mm.2", n, "mm.0.weight", bias=True)
        return
    if c.side != _LDP_SIDE:
        c.header.refuse(
            f"{_V}image_size = {c.image} and {_V}patch_size = {c.patch} make {c.side} patches of a side, and "
            f"{c.projector} has 24"
        )
    first, second = (
        ("mm.model.mlp.1", "mm.model.mlp.3") if c.projector == "ldp" else ("mm.model.mlp.0", "mm.model.mlp.2")
    )
    n = c.linear(second, c.linear(first, n_in, why, bias=True), first, bias=True)
    if c.projector == "ldpv2":
        c.depthwise("mm.model.peg.0.weight", n, second)
        c.vector("mm.model.peg.0.bias", n, second, required=True)
        return
    for block in (1, 2):
        b = f"mm.model.mb_block.{block}.block."
        c.depthwise(b + "0.0.weight", n, second)
        for name in ("0.1", "2.1"):
            for end in (".weight", ".bias"):
                c.vector(b + name + end, n, second, required=True)
        c.linear(b + "1.fc2", c.linear(b + "1.fc1", n, second, bias=True), b + "1.fc1", n, bias=True)
        c.header.tensor(b + "2.0.weight", (n, n), second)


def _fixed_grid(c: _Check, n_merge: int, extra: int = 0) -> None:
    """Pictures are always of image_size, and a token is a square of patches."""
    if not c.side or c.side % n_merge:
        c.header.refuse(
            f"{_V}image_size = {c.image} and {_V}patch_size = {c.patch} make {c.side} patches of a side, which is not "
            f"a multiple of {c.merge_key} = {n_merge}"
        )
    c.patches()
    c.positions(c.side**2 + extra, exact=True, added=True)
    c.layers()


def _gemma3(c: _Check) -> None:
    _fixed_grid(c, c.merge(4))
    c.vector("mm.soft_emb_norm.weight", c.d, _V + "embedding_length", required=True)
    # stored transposed
    tensor = c.header.tensor("mm.input_projection.weight", (None, c.d), _V + "embedding_length")
    if tensor.kind not in (F32, F16, BF16):
        c.header.refuse(
            f"tensor mm.input_projection.weight is {type_name(tensor.kind)}, and llama.cpp takes f32, f16 or bf16 there"
        )


def _idefics3(c: _Check) -> None:
    n_merge = c.merge(1, 2)
    _fixed_grid(c, n_merge)
    c.linear("mm.model.fc", c.d * n_merge**2, f"{_V}embedding_length = {c.d} and {c.merge_key} = {n_merge}")


def _internvl(c: _Check) -> None:
    n_merge = c.merge(1)
    c.vector("v.class_embd", c.d, _V + "embedding_length", required=True)
    _fixed_grid(c, n_merge, extra=1)
    n, why = c.d * n_merge**2, f"{_V}embedding_length = {c.d} and {c.merge_key} = {n_merge}"
    c.vector("mm.model.mlp.0.weight", n, why, required=True)
    c.vector("mm.model.mlp.0.bias", n, why, required=True)
    c.linear("mm.model.mlp.3", c.linear("mm.model.mlp.1", n, why, bias=True), "mm.model.mlp.1", bias=True)


def _lfm2(c: _Check) -> None:
    n_merge = c.merge(1, 2)
    c.patches()
    c.square_positions()
    c.layers()
    n, why = c.d * n_merge**2, f"{_V}embedding_length = {c.d} and {c.merge_key} = {n_merge}"
    c.norm("mm.input_norm", n, why)
    c.linear("mm.2", c.linear("mm.1", n, why, bias=True), "mm.1", bias=True)


def _pixtral(c: _Check) -> None:
    n_merge = c.merge(1)
    _rotated_heads(c)
    c.patches()
    c.layers()
    n, why = c.d, f"{_V}embedding_length = {c.d}"
    if "mm.patch_merger.weight" in c.header.info.tensors:
        c.vector("mm.input_norm.weight", c.d, why, required=True)
        n = c.linear("mm.patch_merger", c.d * n_merge**2, f"{why} and {c.merge_key} = {n_merge}")
    elif n_merge != 1:
        c.header.refuse(f"{c.merge_key} = {n_merge}, and tensor mm.patch_merger.weight is missing")
    n = c.linear("mm.2", c.linear("mm.1", n, why), "mm.1")
    if c.projector == "pixtral":
        c.vector("v.token_embd.img_break", n, "mm.2", required=True)


def _rotated_heads(c: _Check) -> None:
    """2D RoPE turns each half of a head in pairs."""
    if c.d_head % 4:
        c.header.refuse(
            f"a head has {c.d_head} values ({_V}attention.head_count = {c.heads}), which two axes cannot share in pairs"
        )


def _qwen(c: _Check) -> None:
    """Qwen2-VL, 2.5 and 3: two patches in time, and squares of 2 x 2, which the graphs have as a constant."""
    if c.merge(2) != 2:
        c.header.refuse(f"{c.merge_key} = {c.merge(2)}, and the graph of {c.projector} merges 2 x 2 patches")
    third = c.projector == "qwen3vl_merger"
    for name in ("v.class_embd",) + (() if third else ("v.patch_embd.bias",)):
        if name in c.header.info.tensors:
            c.header.refuse(f"it has a tensor {name}, which {c.projector} has not")
    _rotated_heads(c)
    c.header.whole(_V + "n_wa_pattern", 0, 2**12)
    c.patches(2)
    if third:
        c.vector("v.patch_embd.bias", c.d, _V + "embedding_length", required=True)
        c.square_positions()
    c.layers(fused=third, biases=True)
    why = f"{_V}embedding_length = {c.d}"
    n = c.linear("mm.2", c.linear("mm.0", 4 * c.d, why, bias=True), "mm.0", bias=True)
    if (
        c.projector == "qwen2.5vl_merger"
        and c.header.get(_V + "n_wa_pattern")
        and c.header.get(_V + "projection_dim") != n
    ):
        c.header.refuse(f"{_V}projection_dim = {c.header.get(_V + 'projection_dim')}, and mm.2.weight makes {n}")
    for i in range(c.n_layers) if third else ():
        b = f"v.deepstack.{i}."
        if b + "fc1.weight" in c.header.info.tensors:
            c.norm(b + "norm", 4 * c.d)
            c.linear(b + "fc2", c.linear(b + "fc1", 4 * c.d, why, bias=True), b + "fc1", n, bias=True)


def _merges_two(c: _Check) -> None:
    """Squares of 2 x 2, a constant of clip_n_output_tokens_x."""
    if c.merge(2) != 2:
        c.header.refuse(f"{c.merge_key} = {c.merge(2)}, and the graph of {c.projector} merges 2 x 2 patches")


def _paddleocr(c: _Check) -> None:
    _rotated_heads(c)
    c.patches()
    c.square_positions()
    c.layers()
    why = f"{_V}embedding_length = {c.d}"
    for end in (".weight", ".bias"):
        c.vector("mm.input_norm" + end, c.d, why, required=True)
    c.linear("mm.2", c.linear("mm.1", 4 * c.d, why, bias=True), "mm.1", bias=True)


def _glm4v(c: _Check) -> None:
    _merges_two(c)
    _rotated_heads(c)
    c.patches(2)
    why = f"{_V}embedding_length = {c.d}"
    c.vector("v.patch_embd.bias", c.d, why, required=True)
    c.vector("v.norm_embd.weight", c.d, why)
    if "v.position_embd.weight" in c.header.info.tensors:
        c.square_positions()
    c.layers()
    n = c.kernel("mm.patch_merger", (2, 2, c.d), why)
    n = c.linear("mm.model.fc", n, "mm.patch_merger")
    c.norm("mm.post_norm", n, "mm.model.fc")
    inner = c.linear("mm.up", n, "mm.model.fc")
    c.linear("mm.gate", n, "mm.up", inner)
    c.linear("mm.down", inner, "mm.up")


def _hunyuan(c: _Check) -> None:
    _merges_two(c)
    c.patches()
    c.square_positions()
    c.layers()
    why = f"{_V}embedding_length = {c.d}"
    c.vector("mm.pre_norm.weight", c.d, why, required=True)
    n = c.kernel("mm.2", (1, 1, c.kernel("mm.0", (2, 2, c.d), why)), "mm.0")
    c.vector("v.image_newline", n, "mm.2", required=True)
    n = c.linear("mm.model.fc", n, "mm.2", bias=True)
    for name in ("mm.image_begin", "mm.image_end", "mm.post_norm.weight"):
        c.vector(name, n, "mm.model.fc", required=True)
    c.vector("v.view_seperator", n, "mm.model.fc")


def _gemma4(c: _Check) -> None:
    n_merge = c.merge(3)
    _rotated_heads(c)
    c.patches()
    c.header.tensor("v.position_embd.weight", (c.d, None, 2), f"{_V}embedding_length = {c.d}")
    c.layers()
    if c.side and c.side < n_merge:
        c.header.refuse(
            f"{c.merge_key} = {n_merge}, and a picture of {_V}image_size = {c.image} has {c.side} patches of a side"
        )
    for name in ("v.std_bias", "v.std_scale"):
        c.vector(name, c.d, _V + "embedding_length")
    c.linear("mm.input_projection", c.d, f"{_V}embedding_length = {c.d}")


def _resampler(c: _Check) -> None:
    h = c.header
    c.patches()
    c.positions(_RESAMPLER_BUCKETS**2, exact=False, added=False)
    c.layers()
    n = (*h.tensor("resampler.proj.weight", (None, None), "resampler.proj.weight").shape, 1)[0]
    if n % _RESAMPLER_HEAD:
        h.refuse(f"tensor resampler.proj.weight has {n} inputs, and a head has {_RESAMPLER_HEAD} of them")
    n_queries = h.whole("clip.minicpmv_query_num", 0, 2**16, 0) or (
        96 if h.get("clip.minicpmv_version", 2) not in (3, 4, 5, 6, 100045) else 64
    )
    why = "resampler.proj.weight"
    h.tensor("resampler.query", (n, n_queries), f"{why} and clip.minicpmv_query_num = {n_queries}")
    h.added("resampler.query")
    h.tensor("resampler.kv.weight", (c.d, n), f"{why} and {_V}embedding_length = {c.d}")
    for name in ("q", "k", "v", "out"):
        c.linear(f"resampler.attn.{name}", n, why, n, bias=True)
    for name in ("q", "kv", "post"):
        for end in (".weight", ".bias"):
            c.vector(f"resampler.ln_{name}{end}", n, why, required=True)


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
    "lightonocr",
    "paddleocr",
)
_PROJECTORS: dict[str, Callable[[_Check], None]] = {
    "mlp": _llava,
    "ldp": _llava,
    "ldpv2": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "lfm2": _lfm2,
    "pixtral": _pixtral,
    "qwen2vl_merger": _qwen,
    "qwen2.5vl_merger": _qwen,
    "qwen3vl_merger": _qwen,
    "gemma4v": _gemma4,
    "glm4v": _glm4v,
    "hunyuanvl": _hunyuan,
    "lightonocr": _pixtral,
    "paddleocr": _paddleocr,
    "resampler": _resampler,
}
