"""Graphs as ggml's scheduler shows them to a callback of the tests' own: names, operations and operands, in order."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
from llama_cpp import _internals

from helpers import ggml_tensors as ggml

N = 12  # rows of a recorded decode


@dataclass(frozen=True)
class Operand:
    name: str
    op: str


@dataclass(frozen=True)
class Node:
    """sources: (n,) operands, None where there is none. view: name of the tensor that a view looks into, or ""."""

    name: str
    op: str
    flags: int
    kind: int
    ne: tuple[int, ...]
    sources: tuple[Operand | None, ...]
    view: str


def rename(name: str) -> str:
    """The hook with which a test fakes a llama.cpp that names a tensor otherwise (tests/test_check_llama.py)."""
    return name


def name_of(tensor: ggml.Tensor) -> str:
    return rename(tensor.name.decode("utf-8", "replace"))


def node_of(tensor: ggml.Tensor) -> Node:
    op = lambda t: ggml.op_name(t.op).decode()
    sources = tuple(Operand(name_of(s.contents), op(s.contents)) if s else None for s in tensor.src)
    view = name_of(ctypes.cast(tensor.view_src, ctypes.POINTER(ggml.Tensor)).contents) if tensor.view_src else ""
    return Node(name_of(tensor), op(tensor), tensor.flags, tensor.type, tuple(tensor.ne), sources, view)


@dataclass(repr=False)
class Recorder:
    """nodes: of the graphs since the list was cleared. At `on_ask[name]` the tensor is given to a function that may
    change it, and computed alone; `on_done[name]` gets it once it has been computed.
    """

    nodes: list[Node] = field(default_factory=list)
    on_ask: dict = field(default_factory=dict)
    on_done: dict = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)  # of those functions: nothing can be raised through C

    def __post_init__(self):
        self._reference = ggml.CALLBACK(self._call)

    @property
    def callback(self):
        return ctypes.cast(self._reference, llama_cpp.ggml_backend_sched_eval_callback)

    def _call(self, pointer, asking, _):
        tensor = pointer.contents
        try:
            if asking:
                self.nodes.append(node_of(tensor))
            (self.on_ask if asking else self.on_done).get(name_of(tensor), lambda t: None)(tensor)
        except Exception as error:
            self.errors.append(error)
        # "yes" ends what is computed at once: whatever is asked about next finds all before it computed
        return not asking or bool(self.on_ask or self.on_done)

    def of(self, *ops):
        return [node for node in self.nodes if node.op in ops]


def recorded(llama, recorder, **changes):
    """A context of its own for the model of a Llama, whose graphs go to the recorder. As `stock.decode` takes it."""
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.cb_eval, params.cb_eval_user_data = recorder.callback, None
    for name, value in changes.items():
        setattr(params, name, value)
    context = _internals.LlamaContext(model=llama._model, params=params, verbose=False)
    return SimpleNamespace(ctx=context.ctx, n_vocab=llama.n_vocab, context=context, close=context.close)


class RecordedEncoder:
    """libmtmd with an mmproj file beside a stock Llama; the graphs of its encoder go to `recorder`."""

    def __init__(self, llama, mmproj):
        self.recorder = Recorder()
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads = False, False, 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = self.recorder.callback
        self.width = llama_cpp.llama_model_n_embd_inp(llama.model)
        self.ctx = mtmd.mtmd_init_from_file(str(mmproj).encode(), llama.model, params)
        assert self.ctx is not None
        self.handle = None

    def tokenize(self, image, text=None, name=b"name"):
        """The chunks of a prompt of one image ((h, w, 3) uint8), which hold until the next."""
        self._free()
        data = (mtmd.mtmd_default_marker().decode() if text is None else text).encode()
        self.handle = mtmd.mtmd_input_chunks_init()
        inner = mtmd.mtmd_input_text(text=data, text_len=len(data), add_special=True, parse_special=True)
        pixels = image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
        mtmd.mtmd_bitmap_set_id(bitmap, name)
        array = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(self.ctx, self.handle, ctypes.byref(inner), array, 1) == 0
        mtmd.mtmd_bitmap_free(bitmap)
        n = mtmd.mtmd_input_chunks_size(self.handle)
        return [mtmd.mtmd_input_chunks_get(self.handle, i) for i in range(n)]

    def images(self, image, **options):
        image_type = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        return [c for c in self.tokenize(image, **options) if mtmd.mtmd_input_chunk_get_type(c) == image_type]

    def encode(self, image):
        """The nodes of one run of the encoder."""
        chunk = self.images(image)[0]
        self.recorder.nodes.clear()
        assert mtmd.mtmd_encode_chunk(self.ctx, chunk) == 0
        return list(self.recorder.nodes)

    def _free(self):
        if self.handle is not None:
            mtmd.mtmd_input_chunks_free(self.handle)
            self.handle = None

    def close(self):
        self._free()
        mtmd.mtmd_free(self.ctx)
