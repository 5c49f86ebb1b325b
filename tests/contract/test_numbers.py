"""Numbers and layouts that star_edge has written down, against what ggml and llama_cpp say themselves."""

import ctypes

import gguf
import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import pytest
from helpers import ggml_tensors as ggml

from star_edge.llamacpp import gguf as reader
from star_edge.llamacpp import gguf_check, native
from star_edge.llamacpp.names import KV_TYPES

GGML = native.GGML
GGML.ggml_type_name.restype, GGML.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
GGML.gguf_type_name.restype, GGML.gguf_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]


def structure_of(name):
    return next((getattr(m, name) for m in (llama_cpp, mtmd) if hasattr(m, name)), None)


@pytest.mark.parametrize("name", KV_TYPES)
def test_the_number_of_a_kv_cache_type_is_ggmls(name):
    assert GGML.ggml_type_name(KV_TYPES[name]).decode() == name


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_the_number_of_a_float_type_is_ggmls(name):
    assert GGML.ggml_type_name(getattr(gguf_check, name.upper())).decode() == name


@pytest.mark.parametrize("kind", sorted(reader._KIND_NAMES))
def test_the_number_of_a_gguf_value_type_is_ggmls(kind):
    assert GGML.gguf_type_name(kind).decode() == reader._KIND_NAMES[kind]
    assert gguf.GGUFValueType(kind).name.lower().startswith(reader._KIND_NAMES[kind][0])


def test_a_gguf_array_has_type_9():
    assert GGML.gguf_type_name(reader._ARRAY) == b"arr" and GGML.gguf_type_name(13) is None


LAYOUTS = list(native._layouts())


@pytest.mark.parametrize(("name", "field", "n"), LAYOUTS, ids=[f"{n}.{f}" if f else n for n, f, _ in LAYOUTS])
def test_llama_cpp_lays_a_structure_out_as_the_headers_do(name, field, n):
    structure = structure_of(name)
    assert structure is not None, f"llama_cpp has no {name}"
    assert (getattr(structure, field).offset if field else ctypes.sizeof(structure)) == n


def test_ggml_tensor_has_the_size_that_ggml_says():
    GGML.ggml_tensor_overhead.restype = ctypes.c_size_t
    ggml_object = 32  # struct ggml_object: two sizes, a pointer, an enum, padding
    assert GGML.ggml_tensor_overhead() - ggml_object == -(-ctypes.sizeof(ggml.Tensor) // 16) * 16


def test_type_traits_have_the_layout_that_is_read():
    q4_0 = GGML.ggml_get_type_traits(2).contents
    assert (q4_0.type_name, q4_0.blck_size, q4_0.type_size, q4_0.is_quantized) == (b"q4_0", 32, 18, True)
    f32 = GGML.ggml_get_type_traits(0).contents
    assert (f32.type_name, f32.blck_size, f32.type_size, f32.is_quantized) == (b"f32", 1, 4, False)
    assert q4_0.to_float and not f32.to_float


@pytest.mark.parametrize("name", native.BOUND_FUNCTIONS)
def test_the_loaded_ggml_has_the_functions_that_the_core_is_bound_to(name):
    assert getattr(GGML, name)


@pytest.mark.parametrize("op", ["ROPE", "SET_ROWS", "SOFT_MAX", "FLASH_ATTN_EXT", "CONCAT", "SCALE", "REPEAT"])
def test_ggml_has_the_operation(op):
    assert op in {ggml.op_name(i).decode() for i in range(80)}  # GGML_OP_COUNT is above


def test_llama_cpp_is_the_version_that_the_core_was_compiled_against():
    native.check_version(native.ffi.string(native.lib.se_built_against()).decode(), llama_cpp.__version__)


def test_llama_cpp_has_the_rope_types_and_flash_attention_types_by_name():
    assert llama_cpp.LLAMA_ROPE_TYPE_MROPE != llama_cpp.LLAMA_ROPE_TYPE_IMROPE
    assert {llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED} == {0, 1}
