"""Stock llama-cpp-python beside star_edge on the same model: contexts without a callback, and llama_cpp's own chat
handler, timed from outside.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from llama_cpp import Llama, _internals
from llama_cpp.llama_chat_format import MTMDChatHandler

from ..errors import ContextLengthError, EngineError


class Watched:
    """Proxy for `mtmd_cpp` that takes times and counts tokens. It makes the same calls.

    Args:
        image_max_tokens: Most tokens of an image. MTMDChatHandler has no argument for it.
        n_ctx: Context in tokens.
    """

    def __init__(self, image_max_tokens: int | None, n_ctx: int) -> None:
        self.image_max_tokens, self.n_ctx = image_max_tokens, n_ctx
        self.llama_context: Any = None
        self.begin()

    def begin(self) -> None:
        self.tokenized = self.decoded = 0.0
        self.encode = 0.0
        self.n_text = self.n_image = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(mtmd, name)

    def mtmd_context_params_default(self) -> Any:
        params = mtmd.mtmd_context_params_default()
        if self.image_max_tokens is not None:
            params.image_max_tokens = self.image_max_tokens
        return params

    def mtmd_tokenize(self, context: Any, chunks: Any, *rest: Any) -> int:
        status: int = mtmd.mtmd_tokenize(context, chunks, *rest)
        self.tokenized = time.perf_counter()
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                self.n_text += n
            else:
                self.n_image += n
        if self.n_text + self.n_image >= self.n_ctx:  # llama.cpp pads the context; the Llama's arrays are not padded
            raise ContextLengthError(
                f"the prompt takes {self.n_text + self.n_image} tokens of a context of {self.n_ctx}",
                "raise n_ctx (-c), or use a smaller picture",
            )
        return status

    def mtmd_helper_eval_chunk_single(
        self,
        context: Any,
        llama: Any,
        chunk: Any,
        n_past: Any,
        seq_id: Any,
        n_batch: int,
        logits_last: bool,
        new_n_past: Any,
    ) -> int:
        """Does what the helper of that name does with an image, but times encoder and decoder apart."""
        self.llama_context = llama
        start = time.perf_counter()
        status: int = mtmd.mtmd_encode_chunk(context, chunk)
        self.encode += time.perf_counter() - start
        if status:
            return status
        embeddings = mtmd.mtmd_get_output_embd(context)
        no_callback = mtmd.mtmd_helper_post_decode_callback()
        status = mtmd.mtmd_helper_decode_image_chunk(
            context, llama, chunk, embeddings, n_past, seq_id, n_batch, new_n_past, no_callback, None
        )
        return status

    def mtmd_input_chunks_free(self, chunks: Any) -> None:
        """The prompt has been submitted, but a GPU may still work on it. The sampler would wait for it now."""
        if self.llama_context is not None:
            llama_cpp.llama_synchronize(self.llama_context)
        self.decoded = time.perf_counter()
        mtmd.mtmd_input_chunks_free(chunks)


def stock_context(llama: Llama, params: Any, flash_attn: bool) -> tuple[Any, Any]:
    """Makes a context without a callback for the model of a Llama. Closing the Llama closes it.

    Args:
        llama: The Llama.
        params: Parameters of a context of the same size.
        flash_attn: Whether to use flash attention.

    Returns:
        The context and its parameters.

    Raises:
        EngineError: It cannot be made.
    """
    params = type(params).from_buffer_copy(params)
    params.cb_eval, params.cb_eval_user_data = llama_cpp.ggml_backend_sched_eval_callback(), None
    params.n_seq_max, params.kv_unified = 1, False
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    try:
        context = _internals.LlamaContext(model=llama._model, params=params, verbose=False)
    except ValueError as error:
        raise EngineError(
            "llama.cpp could not create the context", "lower n_ctx (-c), or measure fewer sides (--baseline)"
        ) from error
    llama._stack.callback(context.close)
    return context, params


def stock_handler(mmproj: str, use_gpu: bool, watched: Watched) -> MTMDChatHandler:
    """llama_cpp's own chat handler. Its calls of libmtmd go through `watched`."""
    handler = MTMDChatHandler(mmproj, verbose=False, use_gpu=use_gpu)
    libmtmd: Any = watched  # in place of the module
    handler._mtmd_cpp = libmtmd
    return handler


def context_of(llama: Llama) -> Any:
    return llama._ctx


def install(llama: Llama, context: Any, params: Any) -> None:
    """Gives the Llama a context, and drops what an earlier request has left in the Llama."""
    llama._ctx, llama.context_params = context, params
    llama.reset()


def is_end(llama: Llama, token: int) -> bool:
    """Whether a token ends an answer."""
    return bool(llama_cpp.llama_vocab_is_eog(llama._model.vocab, token))


def clear_cache(context: Any) -> None:
    context.kv_cache_clear()


def sequence_bytes(context: Any) -> int:
    """Bytes that the cache holds in all layers, as llama.cpp counts them to save the sequence."""
    return int(llama_cpp.llama_state_seq_get_size(context.ctx, 0))


def decode_token(context: Any, token: int, position: int) -> None:
    """One llama_decode of one row in sequence 0, with logits."""
    ids, at, one, sequence = (np.array([n], np.int32) for n in (token, position, 1, 0))
    wants = np.ones(1, np.int8)

    def pointer(array: np.ndarray, kind: Any = ctypes.c_int32) -> Any:
        return array.ctypes.data_as(ctypes.POINTER(kind))

    batch: Any = llama_cpp.llama_batch()  # its annotations say array where it has pointers
    batch.n_tokens = 1
    batch.token, batch.pos, batch.n_seq_id = pointer(ids), pointer(at), pointer(one)
    of_row: Any = (ctypes.POINTER(ctypes.c_int32) * 1)(pointer(sequence))
    batch.seq_id = ctypes.cast(of_row, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
    batch.logits = pointer(wants, ctypes.c_int8)
    if llama_cpp.llama_decode(context.ctx, batch):
        raise EngineError("llama_decode failed")
    llama_cpp.llama_get_logits_ith(context.ctx, -1)  # waits for the result
