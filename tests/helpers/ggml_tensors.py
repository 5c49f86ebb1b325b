"""ggml's tensors as ctypes sees them, for callbacks of the tests' own."""

from __future__ import annotations

import ctypes

from star_edge.llamacpp.native import GGML


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml 0.25.3, as tests/test_tap_splits.py checks it."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
]

op_name = GGML.ggml_op_name
op_name.restype, op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
nbytes = GGML.ggml_nbytes
nbytes.restype, nbytes.argtypes = ctypes.c_size_t, [ctypes.POINTER(Tensor)]
get_bytes = GGML.ggml_backend_tensor_get
get_bytes.restype, get_bytes.argtypes = (
    None,
    [ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
)
set_bytes = GGML.ggml_backend_tensor_set
set_bytes.restype, set_bytes.argtypes = (
    None,
    [ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
)
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)
