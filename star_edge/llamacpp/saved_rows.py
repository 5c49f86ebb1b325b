"""Rows of a cache as bytes, as llama.cpp writes them: whole sequences, and recurrent states alone.

They go back into the same context, or into another of the same model and types.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama

from ..errors import EngineError
from .context import MAIN


def save_rows(llama: Llama, sequence: int, most: int) -> np.ndarray | None:
    """A sequence, (n,) uint8: positions, K and V of its cells in the order of the cells, and the recurrent state where
    there is one. None if that is more than `most` bytes.

    Raises:
        EngineError: llama.cpp did not give it.
    """
    size = llama_cpp.llama_state_seq_get_size(llama.ctx, sequence)
    if size > most:
        return None
    data = np.empty(size, np.uint8)
    if llama_cpp.llama_state_seq_get_data(llama.ctx, _bytes_of(data), size, sequence) != size:
        raise EngineError("llama.cpp did not give the rows of a prompt", "use prompt_cache_bytes=0")
    return data


def restore_rows(llama: Llama, sequence: int, data: np.ndarray) -> None:
    """Puts a saved sequence into an empty cache: row i into cell i, since llama_kv_cache::find_slot fills an empty
    cache from its first cell on.

    Args:
        llama: Its cache is empty.
        sequence: Where the rows go.
        data: From `save_rows`; not changed.

    Raises:
        EngineError: llama.cpp did not take it.
    """
    n = llama_cpp.llama_state_seq_set_data(llama.ctx, _bytes_of(data), len(data), sequence)
    if n != len(data):
        raise EngineError("llama.cpp did not take the rows of a prompt back", "ask again")


def save_state(llama: Llama) -> np.ndarray:
    """The recurrent state of MAIN in all layers, (n,) uint8.

    Raises:
        EngineError: llama.cpp did not give it, or lays it out otherwise than `restore_state` expects.
    """
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    data = np.empty(llama_cpp.llama_state_seq_get_size_ext(llama.ctx, MAIN, flags), np.uint8)
    n = llama_cpp.llama_state_seq_get_data_ext(llama.ctx, _bytes_of(data), len(data), MAIN, flags)
    if n != len(data) or n < 20:
        raise EngineError("llama.cpp did not give the recurrent state", "use reuse=False")
    n_cells, _, n_seq_id = data[8:20].view(np.int32)
    if (n_cells, n_seq_id) != (1, 0):
        raise EngineError("llama.cpp lays out a recurrent state in an unknown way", "use reuse=False")
    return data


def restore_state(llama: Llama, data: np.ndarray, position: int) -> None:
    """Puts a saved state back, as that of the row at a dense position. KV cells of attention stay as they are.

    Layout (llama_context::state_seq_write_data, llama_memory_recurrent::state_write, state_write_meta), int32: a magic
    number, the sequence, the number of cells; then for each cell its position and a number of sequences, 0.

    Args:
        llama: Its sequence MAIN gets the state.
        data: From `save_state`; not changed.
        position: The dense position.

    Raises:
        EngineError: llama.cpp did not take it.
    """
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    moved = data.copy()
    moved[12:16].view(np.int32)[0] = position
    n = llama_cpp.llama_state_seq_set_data_ext(llama.ctx, _bytes_of(moved), len(moved), MAIN, flags)
    if n != len(moved):
        raise EngineError("llama.cpp did not take the recurrent state back", "ask again")


def _bytes_of(data: np.ndarray) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
