"""Headers of GGUF files: what a file is, and whether it is complete, before it is loaded.

Uses the GGUF reader of the ggml library, which is loaded anyway. It reads only the header, fast for any vocabulary.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from ..errors import ModelFileError
from .native import GGML


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _declare(name: str, result: object, *arguments: object) -> None:
    function = getattr(GGML, name)
    function.restype, function.argtypes = result, list(arguments)


_P = ctypes.c_void_p
_declare("gguf_init_from_file", _P, ctypes.c_char_p, _InitParams)
_declare("gguf_free", None, _P)
_declare("gguf_find_key", ctypes.c_int64, _P, ctypes.c_char_p)
_declare("gguf_get_kv_type", ctypes.c_int, _P, ctypes.c_int64)
_declare("gguf_get_n_kv", ctypes.c_int64, _P)
_declare("gguf_get_key", ctypes.c_char_p, _P, ctypes.c_int64)
_declare("gguf_get_arr_type", ctypes.c_int, _P, ctypes.c_int64)
_declare("gguf_get_arr_n", ctypes.c_size_t, _P, ctypes.c_int64)
_declare("gguf_get_arr_data", _P, _P, ctypes.c_int64)
_declare("gguf_get_arr_str", ctypes.c_char_p, _P, ctypes.c_int64, ctypes.c_size_t)
_declare("gguf_get_val_str", ctypes.c_char_p, _P, ctypes.c_int64)
_declare("gguf_get_data_offset", ctypes.c_size_t, _P)
_declare("gguf_get_n_tensors", ctypes.c_int64, _P)
_declare("gguf_find_tensor", ctypes.c_int64, _P, ctypes.c_char_p)
_declare("gguf_get_tensor_offset", ctypes.c_size_t, _P, ctypes.c_int64)
_declare("gguf_get_tensor_size", ctypes.c_size_t, _P, ctypes.c_int64)
_declare("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)
_declare("gguf_get_tensor_name", ctypes.c_char_p, _P, ctypes.c_int64)
_declare("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), _P, ctypes.c_int64)
_declare("gguf_get_tensor_type", ctypes.c_int, _P, ctypes.c_int64)
_declare("gguf_set_arr_data", None, _P, ctypes.c_char_p, ctypes.c_int, _P, ctypes.c_size_t)
_declare("gguf_set_val_bool", None, _P, ctypes.c_char_p, ctypes.c_bool)
_declare("gguf_get_meta_size", ctypes.c_size_t, _P)
_declare("gguf_write_to_file", ctypes.c_bool, _P, ctypes.c_char_p, ctypes.c_bool)

# enum gguf_type -> (ctypes type, reader)
_SCALARS = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    7: ("bool", ctypes.c_bool),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}
for _kind, (_suffix, _ctype) in _SCALARS.items():
    _declare(f"gguf_get_val_{_suffix}", _ctype, _P, ctypes.c_int64)
_INT32, _STRING, _ARRAY = 5, 8, 9
_KIND_NAMES = {kind: name for kind, (name, _) in _SCALARS.items()} | {_STRING: "str"}
_MAX_LISTED = 4096  # values of an array that `metadata` holds; longer ones are vocabularies


@contextmanager
def quiet_llama_log() -> Iterator[None]:
    """Keeps llama.cpp's log from stderr. What goes wrong here is raised as an error."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: As in ggml: the contiguous axis first, without ones at the end.
        kind: enum ggml_type.
    """

    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class Value:
    """The value of a key.

    Attributes:
        kind: "u32", "f32", "str", ..., and for a list "[u32]".
        value: A number, a bool, a str or a list of numbers. None for lists of strings, and for more than 4,096 values.
        n: Number of values in a list, otherwise 1.
    """

    kind: str
    value: object
    n: int = 1


@dataclass(frozen=True)
class GGUFInfo:
    """The header of a file.

    Attributes:
        path: The file.
        n_bytes: Its size.
        architecture: Its general.architecture.
        values: Values of the keys that were asked for, None if absent.
        tensors: Tensors by name.
        metadata: Values of all keys.
    """

    path: str
    n_bytes: int
    architecture: str
    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Value] = field(default_factory=dict)


def read_gguf_info(path: str | PathLike[str], keys: tuple[str, ...] = ()) -> GGUFInfo:
    """Reads the header and checks that every tensor lies inside the file.

    Raises:
        ModelFileError: The file is missing, a directory, unreadable, not a GGUF file, or truncated.
    """
    name = _path(path)
    if not os.path.exists(name):
        raise ModelFileError(f"{name} does not exist", "check the path")
    if not os.path.isfile(name):
        raise ModelFileError(f"{name} is not a file", "give the path of a .gguf file")
    try:
        with open(name, "rb") as f:
            magic = f.read(4)
    except OSError as error:
        raise ModelFileError(f"{name} cannot be read ({error.strerror})", "check its permissions") from error
    n_bytes = os.path.getsize(name)
    if magic != b"GGUF":
        cause = "is empty" if not n_bytes else f"is not a GGUF file (it begins with {magic!r})"
        raise ModelFileError(f"{name} {cause}", "download it again, or convert the model to GGUF")

    handle = _open(name)
    if not handle:
        raise ModelFileError(
            f"{name} is truncated or damaged: its header cannot be read ({n_bytes} bytes)", "download it again"
        )
    try:
        data = GGML.gguf_get_data_offset(handle)
        tensors = range(GGML.gguf_get_n_tensors(handle))
        ends = [GGML.gguf_get_tensor_offset(handle, i) + GGML.gguf_get_tensor_size(handle, i) for i in tensors]
        needed = data + max(ends, default=0)
        if n_bytes < needed:
            raise ModelFileError(f"{name} is truncated: it has {n_bytes} bytes and needs {needed}", "download it again")
        values = {key: _value(handle, key) for key in keys}
        metadata = dict(_typed_value(handle, i) for i in range(GGML.gguf_get_n_kv(handle)))
        described = dict(_tensor(handle, i) for i in tensors)
        return GGUFInfo(name, n_bytes, str(_value(handle, "general.architecture")), values, described, metadata)
    finally:
        GGML.gguf_free(handle)


def _path(path: str | bytes | PathLike[str]) -> str:
    """The path as llama_cpp takes it: a str in UTF-8, with ~ expanded."""
    try:
        name = os.path.expanduser(os.fsdecode(path))
    except TypeError as error:
        raise ModelFileError(f"{path!r} is not a path", "give the path of a .gguf file") from error
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ModelFileError(f"{name!r} is not UTF-8, and llama_cpp cannot open such a file", "rename it") from error
    if not name or "\0" in name:
        raise ModelFileError(f"{name!r} names no file", "give the path of a .gguf file")
    return name


def read_tensor(info: GGUFInfo, name: str) -> np.ndarray:
    """The bytes of one tensor, (n,) uint8.

    Raises:
        ModelFileError: The file has changed since its header was read.
    """
    handle = _open(info.path)
    index = GGML.gguf_find_tensor(handle, name.encode()) if handle else -1
    try:
        if index >= 0:
            start = GGML.gguf_get_data_offset(handle) + GGML.gguf_get_tensor_offset(handle, index)
            return np.fromfile(info.path, np.uint8, GGML.gguf_get_tensor_size(handle, index), offset=start)
    finally:
        if handle:
            GGML.gguf_free(handle)
    raise ModelFileError(f"{info.path} has changed: tensor {name} is gone", "load it again")


def count_rows(info: GGUFInfo, name: str, n_columns: int) -> int:
    """How many rows of n_columns values a tensor has. 0 if there is no such tensor, or its rows are not whole."""
    handle = _open(info.path)
    if not handle:
        return 0
    try:
        index = GGML.gguf_find_tensor(handle, name.encode())
        row = (
            0 if index < 0 or n_columns < 1 else GGML.ggml_row_size(GGML.gguf_get_tensor_type(handle, index), n_columns)
        )
        return GGML.gguf_get_tensor_size(handle, index) // row if row else 0
    finally:
        GGML.gguf_free(handle)


def copy_with_metadata(
    source: str | PathLike[str], target: str | PathLike[str], changes: Mapping[str, np.ndarray | bool]
) -> None:
    """Copies a GGUF file with some keys added or replaced. The bytes of tensors stay as they are.

    Args:
        source: The file.
        target: Where the copy goes.
        changes: Values by key: (n,) int32, or bool.

    Raises:
        OSError: The copy cannot be written. Too little room is found out before anything is written.
        ModelFileError: The file has changed since its header was read.
    """
    handle = _open(os.fspath(source))
    if not handle:
        raise ModelFileError(f"{os.fspath(source)} has changed: its header can no longer be read", "load it again")
    try:
        data = GGML.gguf_get_data_offset(handle)
        for key, value in changes.items():
            if isinstance(value, bool):
                GGML.gguf_set_val_bool(handle, key.encode(), value)
            else:
                values = np.ascontiguousarray(value, np.int32)
                GGML.gguf_set_arr_data(handle, key.encode(), _INT32, values.ctypes.data, len(values))
        needed = GGML.gguf_get_meta_size(handle) + os.path.getsize(source) - data
        if needed > shutil.disk_usage(os.path.dirname(os.path.abspath(target))).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with quiet_llama_log():
            written = GGML.gguf_write_to_file(handle, os.fsencode(target), True)
        if not written:
            raise OSError(errno.EIO, "the header cannot be written")
    finally:
        GGML.gguf_free(handle)
    # Offsets of tensors count from the end of the header, which gguf_write_to_file has padded to the file's alignment.
    with open(source, "rb") as original, open(target, "ab") as copy:
        original.seek(data)
        shutil.copyfileobj(original, copy, 2**20)


def repeated_text(info: GGUFInfo, key: str) -> str | None:
    """The first text that an array of strings has twice, empty texts aside. None if all differ, or it is missing."""
    handle = _open(info.path)
    if not handle:
        return None
    try:
        index = GGML.gguf_find_key(handle, key.encode())
        if (
            index < 0
            or GGML.gguf_get_kv_type(handle, index) != _ARRAY
            or GGML.gguf_get_arr_type(handle, index) != _STRING
        ):
            return None
        seen: set[bytes] = set()
        for i in range(GGML.gguf_get_arr_n(handle, index)):
            text: bytes = GGML.gguf_get_arr_str(handle, index, i)
            if text in seen:
                return text.decode("utf-8", "replace")
            if text:
                seen.add(text)
        return None
    finally:
        GGML.gguf_free(handle)


def _open(name: str) -> int | None:
    with quiet_llama_log():
        handle: int | None = GGML.gguf_init_from_file(name.encode(), _InitParams(no_alloc=True, ctx=None))
    return handle


def _tensor(handle: int, index: int) -> tuple[str, Tensor]:
    shape = GGML.gguf_get_tensor_ne(handle, index)[:4]
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return GGML.gguf_get_tensor_name(handle, index).decode("utf-8", "replace"), Tensor(
        tuple(shape), GGML.gguf_get_tensor_type(handle, index)
    )


def _typed_value(handle: int, index: int) -> tuple[str, Value]:
    key, kind = GGML.gguf_get_key(handle, index), GGML.gguf_get_kv_type(handle, index)
    name = key.decode("utf-8", "replace")
    if kind != _ARRAY:
        return name, Value(_KIND_NAMES[kind], _value(handle, name) if name.encode() == key else None)
    kind, n = GGML.gguf_get_arr_type(handle, index), GGML.gguf_get_arr_n(handle, index)
    listed = kind in _SCALARS and n <= _MAX_LISTED and name.encode() == key
    return name, Value(f"[{_KIND_NAMES.get(kind, '?')}]", _value(handle, name) if listed else None, n)


def _value(handle: int, key: str) -> object:
    index = GGML.gguf_find_key(handle, key.encode())
    if index < 0:
        return None
    kind = GGML.gguf_get_kv_type(handle, index)
    if kind == _STRING:
        return GGML.gguf_get_val_str(handle, index).decode("utf-8", "replace")
    if kind == _ARRAY:
        kind, n = GGML.gguf_get_arr_type(handle, index), GGML.gguf_get_arr_n(handle, index)
        if kind not in _SCALARS:
            return None
        return list((_SCALARS[kind][1] * n).from_address(GGML.gguf_get_arr_data(handle, index))) if n else []
    return getattr(GGML, f"gguf_get_val_{_SCALARS[kind][0]}")(handle, index)
