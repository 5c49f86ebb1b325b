"""Stock llama.cpp, driven through llama_cpp's own bindings: the oracle of exactness. Nothing of star_edge's engine is
used.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import pytest
from llama_cpp import Llama

from helpers import ggml_tensors as ggml
from helpers import gpu

IS_0_3_35 = llama_cpp.__version__.partition("+")[0] == "0.3.35"


def skip_unless_loaded(path):
    """Skips a test of a file that this llama.cpp does not load though a later one does: llama.cpp itself is asked."""
    if IS_0_3_35:
        try:
            Llama(str(path), n_ctx=64, n_threads=1, verbose=False).close()
        except ValueError:
            name = Path(path).parent.name if Path(path).stem == "text" else Path(path).stem
            pytest.skip(f"llama-cpp-python {llama_cpp.__version__} does not load {name}: its header is of later ones")


def load(path, flash_attn, n_ctx=1024, n_threads=2, **options):
    skip_unless_loaded(path)
    threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
    return Llama(
        str(path), n_ctx=n_ctx, n_batch=512, n_ubatch=512, flash_attn=flash_attn, verbose=False, **threads, **options
    )


def clear(llama):
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)


def logits(llama):
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return np.ctypeslib.as_array(pointer, (llama.n_vocab(),)).copy()


def decode(llama, tokens=None, embeddings=None, positions=None):
    """One llama_decode in sequence 0; positions (n,) or, for embeddings of M-RoPE models, (4, n). Logits of the last
    row.
    """
    n = len(tokens) if tokens is not None else len(embeddings)
    batch = llama_cpp.llama_batch()
    batch.n_tokens = n
    keep = [np.ascontiguousarray(positions, np.int32).reshape(-1), np.ones(n, np.int32), np.zeros(n, np.int8)]
    keep[2][-1] = 1
    if tokens is not None:
        keep.append(np.ascontiguousarray(tokens, np.int32))
        batch.token = keep[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    else:
        keep.append(np.ascontiguousarray(embeddings, np.float32))
        batch.embd = keep[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch.pos = keep[0].ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.n_seq_id = keep[1].ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    zero = (ctypes.c_int32 * 1)(0)
    ids = (ctypes.POINTER(ctypes.c_int32) * n)(*[zero] * n)
    batch.seq_id = ctypes.cast(ids, type(batch.seq_id))
    batch.logits = keep[2].ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    assert llama_cpp.llama_decode(llama.ctx, batch) == 0
    return logits(llama)


def run_segments(llama, segments, next_position, n_generate=0):
    """Decodes segments (objects with .causal, .rows.tokens, .rows.embeddings, .rows.positions) one after the other,
    then greedily.

    Returns (list of logits: after the prompt and after each generated token, generated token ids).
    """
    for segment in segments:
        rows = segment.rows
        if rows.tokens is not None:
            positions = rows.positions if rows.positions.ndim == 1 else rows.positions[0]
            out = decode(llama, tokens=rows.tokens, positions=positions)
        else:
            llama_cpp.llama_set_causal_attn(llama.ctx, segment.causal)  # as mtmd_helper_decode_image_chunk
            out = decode(llama, embeddings=rows.embeddings, positions=rows.positions)
            llama_cpp.llama_set_causal_attn(llama.ctx, True)
    return generate(llama, out, next_position, n_generate)


def generate(llama, out, next_position, n_generate):
    history, tokens = [out], []
    for i in range(n_generate):
        tokens.append(int(out.argmax()))
        out = decode(llama, tokens=tokens[-1:], positions=[next_position + i])
        history.append(out)
    return history, tokens


@ggml.CALLBACK
def clear_unwritten(pointer, asking, _):
    """Pixtral's [IMG_BREAK] rows are made from memory that nobody has written, times 0 (clip_graph_pixtral): NaN where
    it holds a NaN. To ask again does not help, since a new context often gets the same memory: it is set to zero here
    before it is read. What has been written is left alone, and no node is computed apart from the others, so nothing
    else changes.
    """
    node = pointer.contents
    if (
        asking
        and ggml.op_name(node.op) == b"SCALE"
        and ctypes.c_float.from_buffer_copy(ctypes.c_int32(node.op_params[0])).value == 0.0
    ):
        source = node.src[0]
        if ggml.op_name(source.contents.op) == b"NONE":
            size = ggml.nbytes(source)
            ggml.set_bytes(source, bytes(size), 0, size)
    return not asking


class Multimodal:
    """libmtmd beside a stock Llama, as llama_cpp's MTMDChatHandler uses it."""

    def __init__(self, llama, mmproj, flash_attn):
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads = gpu.ON, False, llama.n_threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.cb_eval = ctypes.cast(clear_unwritten, llama_cpp.ggml_backend_sched_eval_callback)
        self.llama = llama
        self.ctx = mtmd.mtmd_init_from_file(str(mmproj).encode(), llama.model, params)
        assert self.ctx is not None

    def close(self):
        mtmd.mtmd_free(self.ctx)

    def ask(self, prompt, images, n_generate=0):
        """prompt: the whole text with one marker for each image ((h, w, 3) uint8). As `run_segments`."""
        out, past = self._read(prompt, images)
        return generate(self.llama, out, past, n_generate)

    def _read(self, prompt, images):
        """Logits of the last row, and the position after it."""
        data = prompt.encode()
        text = mtmd.mtmd_input_text(text=data, text_len=len(data), add_special=True, parse_special=True)
        bitmaps = [
            mtmd.mtmd_bitmap_init(i.shape[1], i.shape[0], i.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
            for i in images
        ]
        chunks = mtmd.mtmd_input_chunks_init()
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        assert mtmd.mtmd_tokenize(self.ctx, chunks, ctypes.byref(text), array, len(bitmaps)) == 0
        clear(self.llama)
        past = llama_cpp.llama_pos(0)
        assert mtmd.mtmd_helper_eval_chunks(self.ctx, self.llama.ctx, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
        out = logits(self.llama)
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return out, past.value
