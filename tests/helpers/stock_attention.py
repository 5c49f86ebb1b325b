"""The attention of stock llama.cpp on this backend, read by a callback of its own: nothing of star_edge is used.

Where the graph has a SOFT_MAX its result is taken as it is. With flash attention the probabilities are nowhere in the
graph: they are worked out in float64 from the operands that the backend made of the prompt (q, K as it lies in the
    cache, the mask).
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

import gguf
import llama_cpp
import numpy as np
from llama_cpp import _internals

from helpers import stock
from helpers.ggml_tensors import CALLBACK, get_bytes, nbytes, op_name
from helpers.reference import softmax


def values(pointer) -> np.ndarray:
    """A tensor of up to three axes as float64, slowest axis first."""
    t = pointer.contents
    raw = np.empty(nbytes(pointer), np.uint8)
    get_bytes(pointer, raw.ctypes.data, 0, raw.size)
    kind = gguf.GGMLQuantizationType(t.type)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = t.ne[0] // block * size
    rows = np.lib.stride_tricks.as_strided(raw, (t.ne[2], t.ne[1], row), (t.nb[2], t.nb[1], 1))
    return gguf.quants.dequantize(np.ascontiguousarray(rows), kind).astype(np.float64)


def _flash(node) -> np.ndarray:
    """Probabilities of a FLASH_ATTN_EXT, (n_head, n_rows, n_kv)."""
    q, k = values(node.src[0]), values(node.src[1])
    scale, max_bias, softcap = np.frombuffer(bytes(node.op_params)[:12], np.float32).astype(np.float64)
    assert max_bias == 0 and not node.src[4]  # no ALiBi and no sinks among what is tested
    products = scale * q @ np.repeat(k, len(q) // len(k), axis=0).transpose(0, 2, 1)
    if softcap:
        products = softcap * np.tanh(products / softcap)
    if node.src[3]:
        products = products + values(node.src[3])[:, : q.shape[1], : k.shape[1]]
    return softmax(products)


class Reader:
    """Gives a stock Llama a context that notes the attention of one layer. Decode through stock.py as usual."""

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self.llama, self._layer, self._seen, self._problem = llama, None, 0, None
        self.last: np.ndarray | None = None  # of the last graph, (n_head, n_rows, n_kv)
        self._callback = CALLBACK(self._visit)
        params = type(llama.context_params).from_buffer_copy(llama.context_params)
        params.cb_eval = ctypes.cast(self._callback, llama_cpp.ggml_backend_sched_eval_callback)
        llama._ctx.close()
        llama._ctx = _internals.LlamaContext(model=llama._model, params=params, verbose=False)
        llama._stack.callback(llama._ctx.close)

    @contextmanager
    def layer(self, index: int):
        """Notes the attention of this layer, counted over those that have any, in each decode: `last` is that of the
        last one.
        """
        self._layer, self._seen, self.last = index, 0, None
        try:
            yield self
        finally:
            self._layer = None
        if self._problem is not None:
            raise self._problem

    def _visit(self, node, asking, _):
        try:
            t = node.contents
            if self._layer is None:
                return not asking
            op = op_name(t.op)
            attends = op == b"FLASH_ATTN_EXT" or (op == b"SOFT_MAX" and t.ne[2] > 1)
            if asking:
                self._seen = 0 if t.name == b"result_norm" else self._seen + attends
                return bool(attends and self._seen == self._layer + 1)
            self.last = _flash(t) if op == b"FLASH_ATTN_EXT" else values(node)
        except BaseException as error:  # nothing may leave a callback
            self._problem = error
        return True


def of_images(reader: Reader, segments, layer: int) -> list[np.ndarray]:
    """What the text after the last image attends to at `layer`, counted over those that have attention: (n_head, rows
    of that text, n) for each image of n rows.

    That text is the last segment and one decode, and the segments' positions have no gaps, which stock would not take.
    """
    stock.clear(reader.llama)
    with reader.layer(layer):
        stock.run_segments(reader.llama, segments, 0)
    assert reader.last.shape[1] == len(segments[-1].rows)
    edges = np.cumsum([0] + [len(s.rows) for s in segments])
    return [reader.last[:, :, a:b] for s, a, b in zip(segments, edges, edges[1:]) if s.image is not None]
