"""Copies of GGUF files whose matrices have another floating-point type.

Uses ggml's own GGUF writer. Only a few megabytes of a file are in memory at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from typing import BinaryIO

import gguf
import numpy as np

from ..errors import ModelFileError
from .gguf import _P, GGUFInfo, _declare, _open, quiet_llama_log
from .gguf_check import BF16, F16, F32
from .native import GGML

FLOATS = {"f16": F16, "bf16": BF16}  # types that matrices can get
_BLOCK = 2**20  # values that are converted at a time

_declare("gguf_set_tensor_type", None, _P, ctypes.c_char_p, ctypes.c_int)
_declare("gguf_get_alignment", ctypes.c_size_t, _P)


def is_readable(kind: int) -> bool:
    """Whether the values of a tensor of that ggml_type can be computed here."""
    if kind in (F32, F16, BF16):
        return True
    try:
        quantized = gguf.GGMLQuantizationType(kind)
        gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[quantized][1], np.uint8), quantized)
    except (ValueError, KeyError, NotImplementedError):  # a type that this version of gguf does not know, or not read
        return False
    return True


def convert(info: GGUFInfo, target: str | PathLike[str], kinds: Mapping[str, int]) -> None:
    """Copies a GGUF file, with other types of some tensors. Values are rounded to the nearest, ties to even.

    Args:
        info: The file.
        target: Where the copy goes.
        kinds: The type that tensors get, F16 or BF16, by name.

    Raises:
        OSError: The copy cannot be written. Too little room is found out before anything is written.
        ModelFileError: The file has changed since its header was read, or a value is too large for its new type.
    """
    source, copy = _open(info.path), _open(info.path)
    try:
        if not source or not copy:
            raise ModelFileError(f"{info.path} has changed: its header can no longer be read", "load it again")
        for name, kind in kinds.items():
            if GGML.gguf_find_tensor(copy, name.encode()) < 0:
                raise ModelFileError(f"{info.path} has changed: tensor {name} is gone", "load it again")
            GGML.gguf_set_tensor_type(copy, name.encode(), kind)
        n_tensors = GGML.gguf_get_n_tensors(copy)
        starts = [GGML.gguf_get_tensor_offset(copy, i) for i in range(n_tensors)]
        sizes = [GGML.gguf_get_tensor_size(copy, i) for i in range(n_tensors)]
        needed = GGML.gguf_get_meta_size(copy) + max(map(sum, zip(starts, sizes)), default=0)
        if needed > shutil.disk_usage(os.path.dirname(os.path.abspath(target))).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with quiet_llama_log():
            written = GGML.gguf_write_to_file(copy, os.fsencode(target), True)
        if not written:
            raise OSError(errno.EIO, "the header cannot be written")
        with open(info.path, "rb") as original, open(target, "r+b") as out:
            out.seek(0, os.SEEK_END)
            data = out.tell()  # which gguf_write_to_file has padded to the file's alignment
            for i in range(n_tensors):
                name = GGML.gguf_get_tensor_name(source, i).decode("utf-8", "replace")
                original.seek(GGML.gguf_get_data_offset(source) + GGML.gguf_get_tensor_offset(source, i))
                n_bytes, kind = GGML.gguf_get_tensor_size(source, i), GGML.gguf_get_tensor_type(source, i)
                out.seek(data + starts[i])
                if name in kinds and kinds[name] != kind:
                    _convert(original, out, n_bytes, kind, kinds[name], f"tensor {name} of {info.path}")
                else:
                    _copy(original, out, n_bytes)
            end, alignment = max(map(sum, zip(starts, sizes)), default=0), GGML.gguf_get_alignment(copy)
            out.truncate(data + -(-end // alignment) * alignment)
    finally:
        for handle in (source, copy):
            if handle:
                GGML.gguf_free(handle)


def _copy(original: BinaryIO, out: BinaryIO, n_bytes: int) -> None:
    while n_bytes:
        block = original.read(min(n_bytes, 4 * _BLOCK))
        if not block:
            raise ModelFileError(f"{original.name} has changed: it has become shorter", "load it again")
        out.write(block)
        n_bytes -= len(block)


def _convert(original: BinaryIO, out: BinaryIO, n_bytes: int, kind: int, to: int, what: str) -> None:
    n_values, n_type = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    step = max(1, _BLOCK // n_values) * n_type
    while n_bytes:
        raw = np.frombuffer(original.read(min(n_bytes, step)), np.uint8)
        if not raw.size or raw.size % n_type:
            raise ModelFileError(f"{original.name} has changed: it has become shorter", "load it again")
        values = _floats(raw, kind)
        if to == BF16:
            out.write(_bf16(values).tobytes())
        else:
            with np.errstate(over="ignore"):
                halves = values.astype("<f2")
            if np.isinf(halves).any() and np.isfinite(values).all():
                raise ModelFileError(f"{what} has values that f16 cannot hold", 'use mmproj_type="file" or "bf16"')
            out.write(halves.tobytes())
        n_bytes -= raw.nbytes


def _floats(raw: np.ndarray, kind: int) -> np.ndarray:
    """Values of whole blocks of a type, (n,) float32. raw: their bytes, (n,) uint8."""
    if kind == F32:
        return raw.view("<f4").astype(np.float32, copy=False)
    if kind == F16:
        return raw.view("<f2").astype(np.float32)
    if kind == BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    values: np.ndarray = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
    return values.astype(np.float32, copy=False).ravel()


def _bf16(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, rounded to nearest even as ggml_compute_fp32_to_bf16 does, (n,) uint16."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(values), (bits >> 16 | 64).astype("<u2"), rounded)
