"""Checks arguments of `llama_cpp.Llama` that its annotations do not describe.

llama.cpp aborts on some of them, and silently takes others that make no sense.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import jinja2
import llama_cpp
from llama_cpp import Llama

from ..arguments import Range, check
from ..errors import ConfigError, EngineError, ModelFileError
from .devices import list_devices
from .names import is_about_context

_INT32 = 2**31 - 1
_KEY_BYTES = 127  # of struct llama_model_kv_override, and a final NUL
# Values of enumerations in llama.h and ggml.h, and numbers that llama.cpp computes with
_RANGES: Mapping[str, Range] = {
    "split_mode": Range(llama_cpp.LLAMA_SPLIT_MODE_NONE, llama_cpp.LLAMA_SPLIT_MODE_TENSOR),
    "main_gpu": Range(0, _INT32),
    "seed": Range(-(2**63), 2**64 - 1),  # its low 32 bits
    "rope_scaling_type": Range(
        llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ROPE_SCALING_TYPE_LONGROPE
    ),
    "pooling_type": Range(llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_RANK),
    "attention_type": Range(-1, llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL),
    "numa": Range(0, llama_cpp.GGML_NUMA_STRATEGY_COUNT - 1),
    "rope_freq_base": Range(0),  # 0: the model's own
    "rope_freq_scale": Range(0),
    "yarn_orig_ctx": Range(0, _INT32),
    "last_n_tokens_size": Range(0, _INT32),
}


def check_llama_options(options: Mapping[str, Any], taken: Container[str] = ()) -> dict[str, Any]:
    """Checks arguments of Llama, and converts them to its annotations.

    Args:
        options: The arguments.
        taken: Names that the caller sets itself.

    Raises:
        ConfigError: An argument is unknown, is among `taken`, or cannot be used.
    """
    named = sorted(name for name in options if name in taken)
    if named:
        raise ConfigError(f"{named[0]} is not an option here: it follows from the others", "leave it out")
    checked = check(Llama.__init__, options, _RANGES)
    split = checked.get("tensor_split")
    most = llama_cpp.llama_max_devices()
    if split is not None and (len(split) > most or any(part not in Range(0) for part in split)):
        raise ConfigError(f"tensor_split={str(split)[:60]} is not a split", f"use {most} numbers of 0 or more at most")
    if checked.get("main_gpu", 0) >= max(1, len(list_devices())):
        raise ConfigError(f"main_gpu={checked['main_gpu']} is not a device", f"there are {len(list_devices())}")
    for key, value in (checked.get("kv_overrides") or {}).items():
        for text in (key, value):
            if isinstance(text, str) and ("\0" in text or len(text.encode("utf-8", "replace")) > _KEY_BYTES):
                raise ConfigError(f"kv_overrides has {text[:60]!r}", f"use texts of {_KEY_BYTES} bytes at most")
        if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"kv_overrides has a number of {value.bit_length()} bits for {key!r}", "use 64 at most")
    return checked


def load_llama(path: str, *, n_ctx: int, **options: Any) -> Llama:
    """Loads a file whose header has been checked (star_edge.llamacpp.gguf_check).

    Raises:
        ModelFileError: llama.cpp cannot load the file.
        EngineError: llama.cpp could not create a context, or there is not enough memory.
    """
    try:
        return Llama(path, n_ctx=n_ctx, **options)
    except ValueError as error:
        if is_about_context(error):
            raise EngineError(
                f"llama.cpp could not create a context of {n_ctx} tokens",
                "lower n_ctx, or quantize the KV cache (type_k, type_v)",
            ) from error
        raise ModelFileError(
            f"{path} cannot be loaded ({error})", "check that this llama.cpp supports the model, or lower n_ctx"
        ) from error
    except jinja2.TemplateError as error:  # Llama parses every template that the file has
        reason = " ".join(str(error).split())
        raise ModelFileError(
            f"{path} has a chat template that cannot be parsed ({reason})", "convert the model again"
        ) from error
    except MemoryError as error:
        raise EngineError(
            f"there is not enough memory for {path} with a context of {n_ctx} tokens", "lower n_ctx"
        ) from error
