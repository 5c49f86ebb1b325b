"""Checks that the header of a GGUF file fits its tensors, before llama.cpp sees the file.

llama.cpp trusts a header in many places, and ends the process if it is wrong: a number of another type than it reads, a
width that no tensor has, a missing tensor, a type that cannot be multiplied. Checked here is what the tensors
contradict, and what llama.cpp asserts (llama_model_base::load_hparams, llama_adapter_lora_init_impl). llama.cpp itself
checks most shapes of a text model (llama_model_loader::create_tensor). Projectors: star_edge.llamacpp.mmproj_check.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, NoReturn, overload

import llama_cpp

from ..errors import ModelFileError, ModelMismatchError
from .gguf import GGUFInfo, Tensor, Value, read_gguf_info, repeated_text
from .native import GGML

F32, F16, BF16 = 0, 1, 30
REMEDY = "convert the model again, or download the file again"
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_WINDOW = 2**30  # llama_kv_cache_iswa multiplies it by the number of sequences, as uint32
_DELTA_NETS = ("qwen35", "qwen35moe", "qwen3next")  # architectures with gated delta nets
# Architectures whose graph asserts that RoPE turns whole heads, and that keys and values are as long
# (src/models/*.cpp). Others may differ.
_WHOLE_HEADS = frozenset(
    (
        "llama",
        "llama4",
        "deci",
        "mistral3",
        "qwen2",
        "qwen2moe",
        "qwen2vl",
        "qwen3",
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
        "granite",
        "internlm2",
        "smollm3",
        "cogvlm",
        "hunyuan-vl",
        "paddleocr",
        "ernie4_5",
        "olmo2",
        "exaone",
        "exaone4",
        "nemotron",
        "starcoder2",
        "seed_oss",
    )
)
_EQUAL_HEADS = _WHOLE_HEADS | {
    "gemma4",
    "phi2",
    "phi3",
    "chatglm",
    "glm4",
    "falcon",
    "stablelm",
    "command-r",
    "cohere2",
}
_INDICES = ("ffn_gate_tid2eid.weight", "d2t")  # tensors of whole numbers (src/llama-arch.cpp)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


GGML.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
GGML.ggml_get_type_traits.argtypes = [ctypes.c_int]


@functools.cache
def type_name(kind: int) -> str:
    return (GGML.ggml_get_type_traits(kind).contents.type_name or b"?").decode()


@functools.cache
def is_multiplied(kind: int) -> bool:
    """Whether ggml can multiply by a matrix of that type: f32, or what it can convert to f32."""
    return kind == F32 or bool(GGML.ggml_get_type_traits(kind).contents.to_float)


@functools.cache
def is_added(kind: int) -> bool:
    """Whether this llama.cpp's backends can add a vector of that type to float32 rows, or multiply them by it.

    The CPU backend takes only f32 (ggml-cpu/binary-ops.cpp).
    """
    return kind == F32 or (kind in (F16, BF16) and llama_cpp.llama_supports_gpu_offload())


class Header:
    """The header of a file, and checks of it.

    Every method raises ModelFileError if the header is wrong.
    """

    def __init__(self, info: GGUFInfo) -> None:
        self.info = info

    def refuse(self, cause: str) -> NoReturn:
        raise ModelFileError(f"{self.info.path}: {cause}", REMEDY)

    def get(self, key: str, default: Any = None) -> Any:
        found = self.info.metadata.get(key)
        return default if found is None or found.value is None else found.value

    def kinds(self, kind: str, keys: Iterable[str]) -> None:
        """Checks that the given keys, if present, have the only type that llama.cpp reads."""
        for key in keys:
            found = self.info.metadata.get(key)
            if found is not None and found.kind != kind:
                self.refuse(f"{key} is of type {found.kind}, and llama.cpp reads {kind}")

    def whole(self, key: str, least: int, most: int, default: int | list[int] | None = None, of_layers: int = 0) -> Any:
        """A whole number, or `default` if it is missing. With of_layers, also a list with one for each layer."""
        found = self.info.metadata.get(key)
        if found is None:
            return default
        if found.kind.startswith("[") and of_layers and found.n < of_layers:
            self.refuse(f"{key} has {found.n} values for {of_layers} layers")
        values = found.value if isinstance(found.value, list) else [found.value]
        for value in values:
            if not isinstance(value, int) or not least <= value <= most:
                self.refuse(f"{key} = {value}, and it must be from {least} to {most}")
        return found.value

    def real(self, key: str, *, positive: bool = True) -> None:
        value = self.get(key)
        if value is None:
            return
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float) and (not math.isfinite(v) or (positive and v <= 0)):
                self.refuse(f"{key} = {v}, and it must be {'more than 0' if positive else 'finite'}")

    @overload
    def tensor(
        self, name: str, shape: tuple[int | None, ...], why: str, *, required: Literal[True] = True
    ) -> Tensor: ...

    @overload
    def tensor(self, name: str, shape: tuple[int | None, ...], why: str, *, required: bool) -> Tensor | None: ...

    def tensor(self, name: str, shape: tuple[int | None, ...], why: str, *, required: bool = True) -> Tensor | None:
        """A tensor, checked for a shape. None stands for any number. `why`: the keys that the shape follows from."""
        tensor = self.info.tensors.get(name)
        if tensor is None:
            if required:
                self.refuse(f"tensor {name} is missing")
            return None
        wanted = list(shape)
        while len(wanted) > 1 and wanted[-1] == 1:
            wanted.pop()
        if len(tensor.shape) != len(wanted) or any(w is not None and w != n for w, n in zip(wanted, tensor.shape)):
            wanted_text = ", ".join("any" if w is None else str(w) for w in wanted)
            self.refuse(f"tensor {name} is {list(tensor.shape)}, and [{wanted_text}] follows from {why}")
        return tensor

    def added(self, name: str) -> None:
        """Checks a tensor, if present, that is added to activations or multiplied with them, element by element."""
        tensor = self.info.tensors.get(name)
        if tensor is not None and not is_added(tensor.kind):
            self.refuse(f"tensor {name} is {type_name(tensor.kind)}, and llama.cpp takes f32 there")

    def multiplied(self, name: str) -> None:
        tensor = self.info.tensors.get(name)
        if tensor is not None and not is_multiplied(tensor.kind):
            self.refuse(f"tensor {name} is {type_name(tensor.kind)}, which llama.cpp cannot multiply")

    def types(self, *, exempt: tuple[str, ...] = ()) -> None:
        """Checks that every tensor has elements, and a type that llama.cpp can compute with."""
        for name, tensor in self.info.tensors.items():
            if not math.prod(tensor.shape):
                self.refuse(f"tensor {name} is {list(tensor.shape)}: it has no elements")
            if name.endswith(exempt):
                continue
            if name.endswith(".bias") or (len(tensor.shape) == 1 and name.endswith(".weight")):
                self.added(name)
            else:
                self.multiplied(name)


def read_text_model(
    path: str | PathLike[str], overrides: Mapping[str, bool | int | float | str] | None = None
) -> GGUFInfo:
    """The header of a text model, checked for llama.cpp.

    Args:
        path: The file.
        overrides: Metadata in place of the file's, as in Llama's kv_overrides.

    Raises:
        ModelFileError: llama.cpp cannot be given the file. The message says why.
    """
    info = read_gguf_info(path)
    if overrides:
        unknown = Value("", None)
        changed = {k: replace(info.metadata.get(k, unknown), value=v, n=1) for k, v in overrides.items()}
        info = replace(info, metadata={**info.metadata, **changed})
    check_shards(info.path)
    if info.architecture == "clip":
        raise ModelFileError(
            f"{info.path} is an mmproj file, not a text model", "give it as mmproj, and the text model first"
        )
    check_text_model(info)
    twice = repeated_text(info, "tokenizer.ggml.tokens")
    if twice is not None:  # llama_vocab::impl::load ends the process then. It gives empty tokens names of their own.
        raise ModelFileError(
            f"{info.path} has the token {twice[:60]!r} twice in its vocabulary",
            "download it again, or convert it again",
        )
    return info


def check_text_model(info: GGUFInfo) -> None:
    """Checks what llama.cpp asserts of a text model.

    Raises:
        ModelFileError: A number is impossible, or contradicts the tensors.
    """
    header = Header(info)
    arch = info.architecture

    def key(name: str) -> str:
        return f"{arch}.{name}"

    header.types(exempt=_INDICES)
    n_layers = header.whole(key("block_count"), 1, _MAX_LAYERS)
    if isinstance(n_layers, int):
        header.whole(key("nextn_predict_layers"), 0, n_layers)
    _check_attention(header, key, n_layers if isinstance(n_layers, int) else 0)
    _check_experts(header, key)
    if arch in _DELTA_NETS:
        _check_delta_net(header, key)
    header.whole(
        key("attention.sliding_window"), 0, _MAX_WINDOW, of_layers=n_layers if isinstance(n_layers, int) else 0
    )
    for name in ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"):
        header.real(key(f"attention.{name}"))
    for name in ("rope.freq_base", "rope.freq_base_swa"):
        header.real(key(name))
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "logit_scale",
        "embedding_scale",
        "residual_scale",
        "attention.scale",
        "rope.scaling.factor",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
    ):
        header.real(key(name), positive=False)
    scaling = header.get(key("rope.scaling.type"))
    if isinstance(scaling, str) and scaling not in ("none", "linear", "yarn", "longrope"):
        header.refuse(f"{key('rope.scaling.type')} = {scaling!r}, and llama.cpp knows none, linear, yarn and longrope")


def _check_attention(header: Header, key: Callable[[str], str], n_layers: int) -> None:
    """Checks heads, their sizes, and how much of a head RoPE rotates."""
    n_embd = header.whole(key("embedding_length"), 1, 2**20)
    heads = header.whole(key("attention.head_count"), 0, 2**16, of_layers=n_layers)
    heads_kv = header.whole(key("attention.head_count_kv"), 0, 2**16, default=heads, of_layers=n_layers)
    for n, n_kv in zip(_each(heads, n_layers), _each(heads_kv, n_layers)):
        if n and n_kv and n % n_kv:
            header.refuse(
                f"{key('attention.head_count')} = {n} is not a multiple of {key('attention.head_count_kv')} = {n_kv}"
            )
    first = _each(heads, 1)[0]
    if not first or not n_embd:
        return
    arch = header.info.architecture
    size = size_v = n_embd // first
    full = header.get(key("attention.key_length"), size)
    n_rot: Any = None
    for suffix in ("", "_swa"):  # without keys of their own, sliding-window layers are like the others
        size = header.whole(key(f"attention.key_length{suffix}"), 1, 2**16, default=size)
        size_v = header.whole(key(f"attention.value_length{suffix}"), 1, 2**16, default=size_v)
        n_rot = header.whole(key(f"rope.dimension_count{suffix}"), 0, 2**16, default=size if n_rot is None else n_rot)
        if not all(isinstance(n, int) for n in (size, size_v, n_rot)):
            continue  # a list, which only some architectures read
        rot = f"{key(f'rope.dimension_count{suffix}')} = {n_rot}"
        if n_rot > size or n_rot % 2:
            header.refuse(f"{rot} is odd, or more than the {size} values of a head")
        if arch in _EQUAL_HEADS and n_rot == 0:
            header.refuse(f"{rot}, and {arch} has RoPE")
        if arch in _WHOLE_HEADS and n_rot != size:
            header.refuse(f"{rot}, and {arch} turns all {size} values of a head")
        if arch in _EQUAL_HEADS and size_v != size:
            header.refuse(f"{key(f'attention.value_length{suffix}')} = {size_v}, and keys have {size} values in {arch}")
    rank, rotated = header.get(key("attention.kv_lora_rank")), header.get(key("rope.dimension_count"))
    is_latent = bool(header.get(key("attention.key_length_mla"))) and isinstance(rank, int) and isinstance(rotated, int)
    if is_latent and full != rank + rotated:  # what a row of the cache holds (src/models/deepseek2.cpp)
        header.refuse(
            f"{key('attention.key_length')} = {full}, and {key('attention.kv_lora_rank')} = {rank} and "
            f"{key('rope.dimension_count')} = {rotated} make {rank + rotated}"
        )
    if (
        arch == "gemma4"
    ):  # the two last layers with keys of their own are read by the others (llama_model::create_memory)
        header.whole(key("attention.shared_kv_layers"), 0, max(0, n_layers - 2), default=0)
    sections = header.get(key("rope.dimension_sections"))
    if isinstance(sections, list) and (any(s < 0 for s in sections) or not 0 < sum(sections[:4]) <= full):
        header.refuse(f"{key('rope.dimension_sections')} = {sections} are not sections of the {full} values of a head")


def _each(value: int | list[int] | None, n: int) -> list[int]:
    return (
        value[: max(n, 1)]
        if isinstance(value, list) and value
        else [value if isinstance(value, int) else 0] * max(n, 1)
    )


def _check_experts(header: Header, key: Callable[[str], str]) -> None:
    n = header.whole(key("expert_count"), 0, 2**10, default=0)
    used = header.get(key("expert_used_count"), 0)
    most = max(used) if isinstance(used, list) and used else used
    if isinstance(n, int) and isinstance(most, int) and (most > n or (n > 0 and most <= 0)):
        header.refuse(f"{key('expert_used_count')} = {most}, and {key('expert_count')} = {n}")


def _check_delta_net(header: Header, key: Callable[[str], str]) -> None:
    """Checks the width of the recurrent layers: tensors are made by heads and their size, states by the width alone
    (src/models/qwen35.cpp; llama_hparams::n_embd_s).
    """
    width = header.whole(key("ssm.inner_size"), 1, 2**20)
    size = header.whole(key("ssm.state_size"), 1, 2**16)
    heads = header.whole(key("ssm.time_step_rank"), 1, 2**16)
    header.whole(key("ssm.group_count"), 1, 2**16)
    header.whole(key("ssm.conv_kernel"), 1, 2**16)
    if all(isinstance(n, int) for n in (width, size, heads)) and width != size * heads:
        header.refuse(
            f"{key('ssm.inner_size')} = {width}, and {heads} heads ({key('ssm.time_step_rank')}) of {size} values "
            f"({key('ssm.state_size')}) have {heads * size}"
        )


def read_lora(path: str | PathLike[str], model: GGUFInfo) -> GGUFInfo:
    """The header of a LoRA file, checked against the text model that it is for (llama_adapter_lora_init_impl).

    Raises:
        ModelFileError: The file is missing, damaged, or not a LoRA adapter.
        ModelMismatchError: The adapter was made for another model.
    """
    info = read_gguf_info(path)
    header = Header(info)
    header.kinds("str", ("general.type", "adapter.type", "general.architecture"))
    header.kinds("f32", ("adapter.lora.alpha",))
    if header.get("general.type") != "adapter" or header.get("adapter.type") != "lora":
        raise ModelFileError(
            f"{info.path} is not a LoRA adapter (general.type {header.get('general.type')!r}, adapter.type "
            f"{header.get('adapter.type')!r})",
            "convert the adapter with llama.cpp's convert_lora_to_gguf.py",
        )
    header.real("adapter.lora.alpha", positive=False)
    header.types()
    if info.architecture != model.architecture:
        raise ModelMismatchError(
            f"{info.path} is an adapter for {info.architecture}, and the text model is {model.architecture}",
            "use the model that it was made for",
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in info.tensors.items():
        base, _, end = name.rpartition(".lora_")
        if end in ("a", "b") and base:
            pairs.setdefault(base, {})[end] = tensor
        elif not name.endswith("_norm.weight"):
            header.refuse(f"tensor {name} is not part of a LoRA adapter")
    if not pairs:
        header.refuse("it has no tensors")
    for base, pair in pairs.items():
        if len(pair) != 2:
            header.refuse(f"tensor {base}.lora_{'b' if 'a' in pair else 'a'} is missing")
        if base in model.tensors:
            _check_pair(header, base, pair, model.tensors[base])
        elif not _SHARD.match(os.path.basename(model.path)):  # a part of a split model does not have all tensors
            raise ModelMismatchError(
                f"{info.path} changes {base}, which the text model does not have", "use the model that it was made for"
            )
    return info


def _check_pair(header: Header, base: str, pair: dict[str, Tensor], target: Tensor) -> None:

    def two(tensor: Tensor) -> tuple[int, ...]:
        return (*tensor.shape, 1)[:2]

    (a_in, a_out), (b_in, b_out), (n_in, n_out) = two(pair["a"]), two(pair["b"]), two(target)
    flipped = base.endswith("token_embd.weight")  # see llm_graph_context::build_inp_embd: A and B change places
    fits = (
        (n_in, n_out) == (b_out, a_out) and a_in == b_in
        if flipped
        else (n_in, n_out) == (a_in, b_out) and a_out == b_in
    )
    if not fits:
        raise ModelMismatchError(
            f"{header.info.path}: {base} is {list(target.shape)} in the text model, and the adapter has "
            f"{list(pair['a'].shape)} and {list(pair['b'].shape)} for it",
            "use the model that it was made for",
        )


def check_shards(path: str | PathLike[str]) -> None:
    """Checks that all files of a split model are beside the first (llama_model_loader: split.count).

    Raises:
        ModelFileError: A file is missing, or the path is not that of the first.
    """
    folder, name = os.path.split(os.fspath(path))
    found = _SHARD.match(name)
    if not found:
        return
    stem, number, count = found[1], int(found[2]), int(found[3])
    if number != 1:
        raise ModelFileError(
            f"{os.fspath(path)} is part {number} of {count} of a split model",
            f"give the first part, {stem}-00001-of-{count:05d}.gguf",
        )
    for i in range(2, count + 1):
        part = os.path.join(folder, f"{stem}-{i:05d}-of-{count:05d}.gguf")
        if not os.path.exists(part):
            raise ModelFileError(
                f"{os.path.basename(part)} is missing: {name} is the first of {count} parts",
                f"put it into {folder or '.'}",
            )
        Header(read_gguf_info(part)).types(exempt=_INDICES)
