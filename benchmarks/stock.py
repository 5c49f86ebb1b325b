"""Stock llama-cpp-python, without any callback: the other side of every comparison."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from llama_cpp import Llama


class Stock:
    """A Llama and, with mmproj, libmtmd beside it; flash attention on in both."""

    def __init__(self, model: Path, mmproj: Path | None, n_threads: int, n_ctx: int = 2048) -> None:
        options = {"n_ctx": n_ctx, "n_batch": 2048, "n_ubatch": 512, "flash_attn": True, "verbose": False}
        self.llama = Llama(str(model), n_threads=n_threads, n_threads_batch=n_threads, **options)
        self.mtmd = None
        if mmproj is not None:
            params = mtmd.mtmd_context_params_default()
            params.use_gpu, params.print_timings, params.n_threads = False, False, n_threads
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            self.mtmd = mtmd.mtmd_init_from_file(str(mmproj).encode(), self.llama.model, params)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), False)

    def decode(self, tokens: np.ndarray | None = None, embeddings: np.ndarray | None = None, start: int = 0, logits: bool = False) -> None:
        """One llama_decode of rows at positions start, start + 1, ..."""
        n = len(tokens) if tokens is not None else len(embeddings)
        batch = llama_cpp.llama_batch()
        batch.n_tokens = n
        wants = np.zeros(n, np.int8)
        wants[-1] = logits
        positions, ones = np.arange(start, start + n, dtype=np.int32), np.ones(n, np.int32)
        if tokens is not None:
            batch.token = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        zero = (ctypes.c_int32 * 1)(0)
        ids = (ctypes.POINTER(ctypes.c_int32) * n)(*[zero] * n)
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.n_seq_id = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = ctypes.cast(ids, type(batch.seq_id))
        batch.logits = wants.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        if llama_cpp.llama_decode(self.llama.ctx, batch):
            raise RuntimeError("llama_decode failed")
        if logits:
            llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)  # waits for the result

    def ask(self, prompt: str, image: np.ndarray) -> None:
        """Image and text to the logits of the first answer token, as llama_cpp's MTMDChatHandler does it."""
        data = prompt.encode()
        text = mtmd.mtmd_input_text(text=data, text_len=len(data), add_special=True, parse_special=True)
        bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        past = llama_cpp.llama_pos(0)
        failed = mtmd.mtmd_tokenize(self.mtmd, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
        self.clear()
        failed = failed or mtmd.mtmd_helper_eval_chunks(self.mtmd, self.llama.ctx, chunks, 0, 0, 2048, True, ctypes.byref(past))
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError("libmtmd failed")
        llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)

    def close(self) -> None:
        if self.mtmd is not None:
            mtmd.mtmd_free(self.mtmd)
        self.llama.close()
