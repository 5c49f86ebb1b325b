"""Checks that the header of an mmproj file fits its tensors, before libmtmd sees the file.

libmtmd compares almost nothing (clip_model_loader::load_hparams, load_tensors). A width, a patch size or a merge factor
that contradicts the tensors ends the process when the graph is built or run. Numbers, types of values and types of
tensors are checked in every file (`mmproj_header`). Shapes are checked if the projector's graph (tools/mtmd/models/) is
known here: each has a rule.
"""

from __future__ import annotations

from collections.abc import Callable

from .gguf import GGUFInfo
from .gguf_check import BF16, F16, F32, Header, type_name
from .mmproj_header import MmprojHeader, V, check_kinds
from .names import MAX_LEARNED_ROWS

_LDP_SIDE = 24  # patches of a side: a constant of clip_graph_llava
_RESAMPLER_BUCKETS = (
    70  # rows and columns of the position embeddings that MiniCPM-V's patches are put into (clip_image_batch_encode)
)
_RESAMPLER_HEAD = 128  # clip_graph_minicpmv
_SAMPLES = 640  # of a token of sound: clip_graph_gemma4ua


def check_mmproj(info: GGUFInfo) -> None:
    """Checks a file with a vision encoder.

    Raises:
        ModelFileError: A key has another type than llama.cpp reads, or a number is impossible or contradicts the
            tensors.
    """
    header = Header(info)
    if not check_kinds(header):
        return
    checked = MmprojHeader(header, _PROJECTORS)
    rule = _PROJECTORS.get(checked.projector)
    if rule is not None:
        rule(checked)


def _llava(c: MmprojHeader) -> None:
    if not c.side:
        c.header.refuse(f"{V}image_size = {c.image}, and pictures have a fixed size")
    c.patches()
    c.vector("v.class_embd", c.d, V + "embedding_length")
    # More rows would not fail, but they would belong to another grid.
    c.positions(c.side**2 + ("v.class_embd" in c.header.info.tensors), exact=True, added=False)
    points = c.header.get(V + "image_grid_pinpoints") or []
    if any(p % c.image for p in points):  # a crop that is left over may be smaller than a patch
        c.header.refuse(f"{V}image_grid_pinpoints = {points}, and {V}image_size = {c.image} does not divide them")
    c.layers()
    layers = c.header.get(V + "feature_layer") or []
    if any(layer > c.n_layers for layer in layers):
        c.header.refuse(f"{V}feature_layer = {layers}, and {V}block_count = {c.n_layers}")
    n_in = c.d * max(1, len({layer for layer in layers if layer >= 0}))
    why = f"{V}embedding_length = {c.d}" + (f" and {V}feature_layer = {layers}" if layers else "")
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
            f"{V}image_size = {c.image} and {V}patch_size = {c.patch} make {c.side} patches of a side, and "
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


def _fixed_grid(c: MmprojHeader, n_merge: int, extra: int = 0) -> None:
    """Pictures are always of image_size, and a token is a square of patches."""
    if not c.side or c.side % n_merge:
        c.header.refuse(
            f"{V}image_size = {c.image} and {V}patch_size = {c.patch} make {c.side} patches of a side, which is not "
            f"a multiple of {c.merge_key} = {n_merge}"
        )
    c.patches()
    c.positions(c.side**2 + extra, exact=True, added=True)
    c.layers()


def _gemma3(c: MmprojHeader) -> None:
    _fixed_grid(c, c.merge(4))
    c.vector("mm.soft_emb_norm.weight", c.d, V + "embedding_length", required=True)
    # stored transposed
    tensor = c.header.tensor("mm.input_projection.weight", (None, c.d), V + "embedding_length")
    if tensor.kind not in (F32, F16, BF16):
        c.header.refuse(
            f"tensor mm.input_projection.weight is {type_name(tensor.kind)}, and llama.cpp takes f32, f16 or bf16 there"
        )


def _idefics3(c: MmprojHeader) -> None:
    n_merge = c.merge(1, 2)
    _fixed_grid(c, n_merge)
    c.linear("mm.model.fc", c.d * n_merge**2, f"{V}embedding_length = {c.d} and {c.merge_key} = {n_merge}")


def _internvl(c: MmprojHeader) -> None:
    n_merge = c.merge(1)
    c.vector("v.class_embd", c.d, V + "embedding_length", required=True)
    _fixed_grid(c, n_merge, extra=1)
    n, why = c.d * n_merge**2, f"{V}embedding_length = {c.d} and {c.merge_key} = {n_merge}"
    c.vector("mm.model.mlp.0.weight", n, why, required=True)
    c.vector("mm.model.mlp.0.bias", n, why, required=True)
    c.linear("mm.model.mlp.3", c.linear("mm.model.mlp.1", n, why, bias=True), "mm.model.mlp.1", bias=True)


def _lfm2(c: MmprojHeader) -> None:
    n_merge = c.merge(1, 2)
    c.patches()
    c.square_positions()
    c.layers()
    n, why = c.d * n_merge**2, f"{V}embedding_length = {c.d} and {c.merge_key} = {n_merge}"
    c.norm("mm.input_norm", n, why)
    c.linear("mm.2", c.linear("mm.1", n, why, bias=True), "mm.1", bias=True)


def _pixtral(c: MmprojHeader) -> None:
    n_merge = c.merge(1)
    _rotated_heads(c)
    c.patches()
    c.layers()
    n, why = c.d, f"{V}embedding_length = {c.d}"
    if "mm.patch_merger.weight" in c.header.info.tensors:
        c.vector("mm.input_norm.weight", c.d, why, required=True)
        n = c.linear("mm.patch_merger", c.d * n_merge**2, f"{why} and {c.merge_key} = {n_merge}")
    elif n_merge != 1:
        c.header.refuse(f"{c.merge_key} = {n_merge}, and tensor mm.patch_merger.weight is missing")
    n = c.linear("mm.2", c.linear("mm.1", n, why), "mm.1")
    if c.projector == "pixtral":
        c.vector("v.token_embd.img_break", n, "mm.2", required=True)


def _rotated_heads(c: MmprojHeader) -> None:
    """2D RoPE turns each half of a head in pairs."""
    if c.d_head % 4:
        c.header.refuse(
            f"a head has {c.d_head} values ({V}attention.head_count = {c.heads}), which two axes cannot share in pairs"
        )


def _qwen(c: MmprojHeader) -> None:
    """Qwen2-VL, 2.5 and 3: two patches in time, and squares of 2 x 2, which the graphs have as a constant."""
    if c.merge(2) != 2:
        c.header.refuse(f"{c.merge_key} = {c.merge(2)}, and the graph of {c.projector} merges 2 x 2 patches")
    third = c.projector == "qwen3vl_merger"
    for name in ("v.class_embd",) + (() if third else ("v.patch_embd.bias",)):
        if name in c.header.info.tensors:
            c.header.refuse(f"it has a tensor {name}, which {c.projector} has not")
    _rotated_heads(c)
    c.header.whole(V + "n_wa_pattern", 0, 2**12)
    c.patches(2)
    if third:
        c.vector("v.patch_embd.bias", c.d, V + "embedding_length", required=True)
        c.square_positions()
    c.layers(fused=third, biases=True)
    why = f"{V}embedding_length = {c.d}"
    n = c.linear("mm.2", c.linear("mm.0", 4 * c.d, why, bias=True), "mm.0", bias=True)
    if (
        c.projector == "qwen2.5vl_merger"
        and c.header.get(V + "n_wa_pattern")
        and c.header.get(V + "projection_dim") != n
    ):
        c.header.refuse(f"{V}projection_dim = {c.header.get(V + 'projection_dim')}, and mm.2.weight makes {n}")
    for i in range(c.n_layers) if third else ():
        b = f"v.deepstack.{i}."
        if b + "fc1.weight" in c.header.info.tensors:
            c.norm(b + "norm", 4 * c.d)
            c.linear(b + "fc2", c.linear(b + "fc1", 4 * c.d, why, bias=True), b + "fc1", n, bias=True)


def _merges_two(c: MmprojHeader, default: int = 2) -> None:
    """Squares of 2 x 2: a constant of clip_n_output_tokens_x, or what every published file has."""
    if c.merge(default) != 2:
        c.header.refuse(f"{c.merge_key} = {c.merge(default)}, and the graph of {c.projector} merges 2 x 2 patches")


def _paddleocr(c: MmprojHeader) -> None:
    _rotated_heads(c)
    c.patches()
    c.square_positions()
    c.layers()
    why = f"{V}embedding_length = {c.d}"
    for end in (".weight", ".bias"):
        c.vector("mm.input_norm" + end, c.d, why, required=True)
    c.linear("mm.2", c.linear("mm.1", 4 * c.d, why, bias=True), "mm.1", bias=True)


def _glm4v(c: MmprojHeader) -> None:
    _merges_two(c)
    _rotated_heads(c)
    c.patches(2)
    why = f"{V}embedding_length = {c.d}"
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


def _hunyuan(c: MmprojHeader) -> None:
    _merges_two(c)
    c.patches()
    c.square_positions()
    c.layers()
    why = f"{V}embedding_length = {c.d}"
    c.vector("mm.pre_norm.weight", c.d, why, required=True)
    n = c.kernel("mm.2", (1, 1, c.kernel("mm.0", (2, 2, c.d), why)), "mm.0")
    c.vector("v.image_newline", n, "mm.2", required=True)
    n = c.linear("mm.model.fc", n, "mm.2", bias=True)
    for name in ("mm.image_begin", "mm.image_end", "mm.post_norm.weight"):
        c.vector(name, n, "mm.model.fc", required=True)
    c.vector("v.view_seperator", n, "mm.model.fc")


def _gemma4(c: MmprojHeader) -> None:
    n_merge = c.merge(3)
    _rotated_heads(c)
    c.patches()
    c.header.tensor("v.position_embd.weight", (c.d, None, 2), f"{V}embedding_length = {c.d}")
    c.layers()
    if c.side and c.side < n_merge:
        c.header.refuse(
            f"{c.merge_key} = {n_merge}, and a picture of {V}image_size = {c.image} has {c.side} patches of a side"
        )
    for name in ("v.std_bias", "v.std_scale"):
        c.vector(name, c.d, V + "embedding_length")
    c.linear("mm.input_projection", c.d, f"{V}embedding_length = {c.d}")


def _gemma4_unified(c: MmprojHeader) -> None:
    """A matrix in place of an encoder: a token is a square of pixels."""
    n = 3 * (c.patch * c.merge(3)) ** 2
    why = f"{V}patch_size = {c.patch} and {c.merge_key} = {c.merge(3)}"
    for end in (".weight", ".bias"):
        c.vector("v.patch_norm.1" + end, n, why, required=True)
        for i in (2, 3):
            c.vector(f"v.patch_norm.{i}{end}", c.d, V + "embedding_length", required=True)
    c.linear("v.patch_embd", n, why, c.d, bias=True)
    c.header.tensor("v.position_embd.weight", (c.d, None, 2), f"{V}embedding_length = {c.d}")
    c.linear("mm.input_projection", c.d, f"{V}embedding_length = {c.d}")
    if c.header.get("clip.audio.projector_type") == "gemma4ua":
        c.linear("mm.a.input_projection", _SAMPLES, f"{_SAMPLES} samples")


def _kimi_k25(c: MmprojHeader) -> None:
    _merges_two(c, 1)
    _rotated_heads(c)
    c.patches()
    c.header.tensor("v.position_embd.weight", (c.d, None, None), f"{V}embedding_length = {c.d}")
    c.layers()
    why = f"{V}embedding_length = {c.d}"
    for end in (".weight", ".bias"):
        c.vector("mm.input_norm" + end, c.d, why, required=True)
    c.linear("mm.2", c.linear("mm.1", 4 * c.d, why, bias=True), "mm.1", bias=True)


def _nemotron_vl(c: MmprojHeader) -> None:
    _merges_two(c, 1)
    _fixed_grid(c, 2)
    n_learned = (*c.header.tensor("v.class_embd", (c.d, None), V + "embedding_length").shape, 1)[1]
    if n_learned > MAX_LEARNED_ROWS:
        c.header.refuse(f"tensor v.class_embd has {n_learned} rows, and {MAX_LEARNED_ROWS} are the most")
    why = f"{V}embedding_length = {c.d}"
    c.vector("mm.model.mlp.0.weight", 4 * c.d, why, required=True)
    c.linear("mm.model.mlp.3", c.linear("mm.model.mlp.1", 4 * c.d, why), "mm.model.mlp.1")


def _resampler(c: MmprojHeader) -> None:
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
    h.tensor("resampler.kv.weight", (c.d, n), f"{why} and {V}embedding_length = {c.d}")
    for name in ("q", "k", "v", "out"):
        c.linear(f"resampler.attn.{name}", n, why, n, bias=True)
    for name in ("q", "kv", "post"):
        for end in (".weight", ".bias"):
            c.vector(f"resampler.ln_{name}{end}", n, why, required=True)


def _minicpmv4_6(c: MmprojHeader) -> None:
    n_merge = c.merge(4)
    if n_merge not in (2, 4):
        c.header.refuse(f"{c.merge_key} = {n_merge}, and this projector merges by 2 or 4")
    c.patches()
    c.positions(_RESAMPLER_BUCKETS**2, exact=False, added=False)
    c.layers()
    why = f"{V}embedding_length = {c.d}"
    four = 4 * c.d  # rows of 2 x 2 side by side
    if n_merge == 4:
        merger = "v.vit_merger."
        c.norm(merger + "ln1", c.d)
        for name in ("q", "k", "v", "out"):
            c.linear(f"{merger}attn_{name}", c.d, why, c.d)
        c.norm(merger + "ds_ln", four, why)
        c.linear(merger + "ds_ffn_down", c.linear(merger + "ds_ffn_up", four, why), merger + "ds_ffn_up", c.d)
    c.vector("mm.input_norm.weight", four, why, required=True)
    c.vector("mm.input_norm.bias", four, why)
    c.linear("mm.down", c.linear("mm.up", four, why), "mm.up")


_PROJECTORS: dict[str, Callable[[MmprojHeader], None]] = {
    "mlp": _llava,
    "ldp": _llava,
    "ldpv2": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "lfm2": _lfm2,
    "pixtral": _pixtral,
    "minicpmv4_6": _minicpmv4_6,
    "qwen2vl_merger": _qwen,
    "qwen2.5vl_merger": _qwen,
    "qwen3vl_merger": _qwen,
    "gemma4v": _gemma4,
    "gemma4uv": _gemma4_unified,
    "glm4v": _glm4v,
    "hunyuanvl": _hunyuan,
    "kimik25": _kimi_k25,
    "lightonocr": _pixtral,
    "nemotron_v2_vl": _nemotron_vl,
    "paddleocr": _paddleocr,
    "resampler": _resampler,
}
