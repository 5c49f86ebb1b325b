"""What the tests of the tap share: random tiny models, stock decodes beside them, and the plans of layer windows.

"Equal" means bit for bit unless a bound is named: the numbers that go in are the same and so is the shape of the batch.
Bounds are what stock rounds in the same mode (bounds.py).
"""

import ctypes

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama

from helpers import bounds
from helpers.reference import Decoder
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.native import ffi, lib
from star_edge.llamacpp.tap import MEAN_ALL, Plan, Tap
from star_edge.rows import Rows
from star_edge.synthetic import DecoderShape, write_decoder

L, D, HEADS = 5, 128, 4
ARCHS = ("llama", "qwen2vl")
KINDS = [(arch, flash) for arch in ARCHS for flash in (False, True)]
kinds = pytest.mark.parametrize(("arch", "flash"), KINDS, ids=[f"{a}-{'flash' if f else 'softmax'}" for a, f in KINDS])
SHAPE = DecoderShape(n_layers=L, n_embd=D, n_heads=HEADS, n_heads_kv=2, n_ff=160, n_vocab=300, n_ctx=1024)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths by architecture."""
    folder = tmp_path_factory.mktemp("tap")
    paths = {arch: str(folder / f"{arch}.gguf") for arch in ARCHS}
    write_decoder(paths["llama"], SHAPE, seed=1, sharpness=1.0)
    write_decoder(
        paths["qwen2vl"], DecoderShape(**{**vars(SHAPE), "rope_sections": (4, 6, 6, 0)}), seed=2, sharpness=1.0
    )
    return paths


@pytest.fixture(scope="module")
def tapped(models):
    """(arch, flash) -> a DecoderContext with a tap, empty and with no lasting settings."""
    made = {}

    def get(arch, flash, **options):
        key = (arch, flash, *sorted(options.items()))
        if key not in made:
            tap = Tap()
            llama = load(models[arch], flash, **options)
            attach_tap(llama, tap)
            made[key] = DecoderContext(llama, tap)
        context = made[key]
        context.clear()
        context.tap.set_position_shift(0, 0)
        context.tap.set_cell_bias(None)
        return context

    yield get
    for context in made.values():
        context.llama.close()
        context.tap.close()


@pytest.fixture(scope="module")
def rounding(models):
    """(arch, flash, **options of the Llama) -> what stock rounds, against the float64 reference with K and V in f16."""
    measured = {}

    def get(arch, flash, **options):
        key = (arch, flash, *sorted(options.items()))
        if key not in measured:
            llama, reference, pairs = load(models[arch], flash, **options), Decoder(models[arch], np.float16), []
            for seed in range(20, 24):
                rows = rows_of(arch, 24, seed=seed)
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
                pairs.append((stock_decode(llama, rows), reference.forward(rows.embeddings, rows.positions)[-1]))
            llama.close()
            measured[key] = bounds.rounding(pairs)
        return measured[key]

    return get


@pytest.fixture
def fresh(models):
    """(arch, flash) -> a stock Llama without a tap, closed at the end of the test."""
    made = []

    def get(arch, flash):
        made.append(load(models[arch], flash))
        return made[-1]

    yield get
    for llama in made:
        llama.close()


def load(path, flash, **options):
    return Llama(
        path, n_ctx=512, n_batch=64, flash_attn=flash, verbose=False, n_threads=1, n_threads_batch=1, **options
    )


def embeddings(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


def text_positions(arch, start, n):
    p = np.arange(start, start + n, dtype=np.int32)
    return np.stack([p, p, p, 0 * p]) if arch == "qwen2vl" else p


def rows_of(arch, n, start=0, seed=0):
    return Rows(text_positions(arch, start, n), embeddings=embeddings(n, seed))


def stock_decode(llama, rows, raw_positions=None):
    """Logits of the last row of an ordinary decode at rows.positions, (n_vocab,) float32."""
    n = len(rows)
    b = llama_cpp.llama_batch()
    b.n_tokens = n
    if rows.tokens is not None:
        tokens = np.ascontiguousarray(rows.tokens, np.int32)
        b.token = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        positions = np.ascontiguousarray(rows.positions if rows.positions.ndim == 1 else rows.positions[0], np.int32)
    else:
        b.embd = rows.embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        positions = np.ascontiguousarray(rows.positions, np.int32).reshape(-1)
    b.pos = positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos))
    counts, ids = np.ones(n, np.int32), (ctypes.POINTER(ctypes.c_int32) * n)(*[(ctypes.c_int32 * 1)(0)] * n)
    flags = np.zeros(n, np.int8)
    flags[-1] = 1
    b.n_seq_id = counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    b.seq_id = ctypes.cast(ids, type(b.seq_id))
    b.logits = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    assert llama_cpp.llama_decode(llama.ctx, b) == 0
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()


def token_step(llama, token):
    """One generated token through Llama's own context, as Llama.eval does it; logits (n_vocab,)."""
    llama._batch.set_batch(batch=[token], n_past=llama.n_tokens, logits_all=False)
    llama._ctx.decode(llama._batch)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()


def n_reused(llama):
    return llama_cpp.llama_perf_context(llama.ctx).n_reused


def decode(context, rows, first=0, **plan):
    """A plain or windowed decode with logits for the last row; (outcome, logits or None)."""
    stops = plan.get("window") is not None and plan["window"][1] < plan["window"][2]
    outcome = context.decode(rows, first, Plan(**plan), "test", logits=not stops)
    return outcome, None if stops else context.logits()


def window_pair(context, rows, layer):
    """Window [0, layer) and then [layer, L) on the same cells: (probe outcome, resume outcome, logits)."""
    hidden = np.empty((len(rows), D), np.float32)
    probe, _ = decode(context, rows, window=(0, layer, L), hidden=hidden, want_cells=True)
    context.remove(0, 0)
    resume, logits = decode(context, Rows(rows.positions), window=(layer, L, L), inject=hidden, want_cells=True)
    return probe, resume, logits


def good_plan():
    """A plan that can be armed, and what keeps its memory alive."""
    f32 = lambda *shape: np.zeros(shape, np.float32)
    keep = [f32(4, 8), f32(4, 8), np.zeros(16, np.int32), np.array([1, 3], np.int32), f32(2, 64)]
    p = ffi.new("se_plan *")
    p.n_layer, p.first, p.last, p.n_rows, p.n_embd = 6, 1, 5, 4, 8
    p.inject, p.hidden = (ffi.cast("float *", a.ctypes.data) for a in keep[:2])
    p.positions, p.n_pos_per_row = ffi.cast("int32_t *", keep[2].ctypes.data), 4
    p.attn_layers, p.n_attn_layers = ffi.cast("int32_t *", keep[3].ctypes.data), 2
    p.attn, p.attn_block = ffi.cast("float *", keep[4].ctypes.data), 64
    p.row_count, p.row_step, p.reduce, p.n_threads = -1, 1, MEAN_ALL, 1
    return p, keep


@pytest.fixture
def raw():
    tap = lib.se_tap_new()
    yield tap
    lib.se_tap_free(tap)
