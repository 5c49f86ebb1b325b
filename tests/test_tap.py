"""The tap on its own: its checks, layer windows and overwritten inputs in running graphs, and the walk over a graph's splits.

Models are random and tiny. "Equal" means bit for bit unless a tolerance is named: the numbers that go in are the same and so is the
shape of the batch. Tolerances: STATE covers a KV cache in f16 (2^-11 of K and V, through five layers), LOOSE one in q8_0.
"""

import ctypes

import cffi
import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama
from reference import Decoder

from star_edge.decoder.context import DecoderContext, Rows, attach_tap
from star_edge.errors import EngineError
from star_edge.native import GGML, ffi, lib
from star_edge.synthetic import DecoderShape, EncoderShape, write_decoder, write_encoder
from star_edge.tap import MEAN_ALL, MEAN_HEADS, MEAN_ROWS, AttentionRead, Plan, Tap
from star_edge.vision.encoder import MEDIA_MARKER, VisionEncoder

L, D, HEADS = 5, 128, 4
STATE, LOOSE = 2e-3, 2e-2  # of attention probabilities
LOGITS = {False: 2e-2, True: 4e-2}  # of logits of size 1, with an f16 cache; with flash attention V is summed in f16 too
CHANGED = 0.1  # logits that ought to differ do so by more than this
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
    write_decoder(paths["qwen2vl"], DecoderShape(**{**vars(SHAPE), "rope_sections": (4, 6, 6, 0)}), seed=2, sharpness=1.0)
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
    return Llama(path, n_ctx=512, n_batch=64, flash_attn=flash, verbose=False, n_threads=1, n_threads_batch=1, **options)


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


# ---- what a plan may be ----


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


BAD_PLANS = [
    dict(n_layer=-1), dict(n_rows=-1), dict(n_attn_layers=-1), dict(n_rows=0), dict(first=-1), dict(first=5), dict(first=6, last=6),
    dict(last=7), dict(last=1), dict(n_embd=0), dict(n_embd=-8), dict(inject=ffi.NULL), dict(last=6), dict(n_pos_per_row=0),
    dict(n_pos_per_row=2), dict(n_pos_per_row=3), dict(attn_layers=ffi.NULL), dict(attn=ffi.NULL), dict(attn_block=0), dict(attn_block=-1), dict(row_step=0),
    dict(row_step=-1), dict(row_first=-1), dict(reduce=-1), dict(reduce=4), dict(n_layer=0, n_rows=0),
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD_PLANS, ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()))
def test_invalid_plans_do_not_arm(raw, fields):
    plan, keep = good_plan()
    for name, value in fields.items():
        setattr(plan, name, value)
    assert lib.se_tap_arm(raw, plan) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_finish(raw, ffi.NULL) == lib.SE_ERR_ARGUMENT  # nothing was armed


@pytest.mark.parametrize("layers", [[3, 1], [2, 2]], ids=str)
def test_attention_layers_must_ascend(raw, layers):
    plan, keep = good_plan()
    keep[3][:] = layers
    assert lib.se_tap_arm(raw, plan) == lib.SE_ERR_ARGUMENT


def test_arm_once_finish_once(raw):
    plan, keep = good_plan()
    result = ffi.new("se_result *")
    assert lib.se_tap_finish(raw, result) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_arm(raw, plan) == lib.SE_OK
    assert lib.se_tap_arm(raw, plan) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_finish(raw, result) == lib.SE_OK  # no graph ran: nothing to complain about
    assert (result.n_attention, result.n_graphs, result.n_skipped, result.stopped, result.last_unmasked) == (0, 0, 0, 0, -1)
    assert lib.se_tap_finish(raw, result) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_arm(raw, plan) == lib.SE_OK
    assert lib.se_tap_finish(raw, ffi.NULL) == lib.SE_OK


def test_nulls(raw):
    plan, keep = good_plan()
    numbers = ffi.new("float[4]", [1, 2, 3, 4])
    assert lib.se_tap_arm(ffi.NULL, plan) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_arm(raw, ffi.NULL) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_finish(ffi.NULL, ffi.NULL) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_position_shift(ffi.NULL, 0, 1) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_cell_bias(ffi.NULL, numbers, 4) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_cell_bias(raw, numbers, 0) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_cell_bias(raw, numbers, -1) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_cell_bias(raw, ffi.NULL, 0) == lib.SE_OK
    assert lib.se_tap_watched_bytes(ffi.NULL) == 0
    lib.se_tap_begin(ffi.NULL)
    lib.se_tap_free(ffi.NULL)
    assert lib.se_bind(ffi.NULL, 1) == lib.SE_ERR_ARGUMENT
    assert lib.se_bind(b"ggml_nbytes", 0) == lib.SE_ERR_ARGUMENT
    assert lib.se_bind(b"no_such_function", 1) == lib.SE_ERR_ARGUMENT
    assert lib.se_bind_missing() == ffi.NULL


def test_set_input_slots(raw):
    """Four names fit; a name can be set again, and removing any of them makes room for one."""
    data = ffi.new("char[8]")
    add = lambda name, size=8: lib.se_tap_set_input(raw, name, data, size)
    drop = lambda name: lib.se_tap_set_input(raw, name, ffi.NULL, 0)
    assert [add(name) for name in (b"a", b"b", b"c", b"d")] == [lib.SE_OK] * 4
    assert add(b"e") == lib.SE_ERR_CAPACITY
    assert add(b"b", 4) == lib.SE_OK
    assert drop(b"nobody") == lib.SE_OK
    assert add(b"e") == lib.SE_ERR_CAPACITY
    for gone, new in ((b"a", b"e"), (b"e", b"f"), (b"d", b"g"), (b"c", b"h")):
        assert drop(gone) == lib.SE_OK
        assert add(new) == lib.SE_OK
        assert add(b"one too many") == lib.SE_ERR_CAPACITY
    for bad_name in (ffi.NULL, b"", b"n" * 64, b"n" * 1000):
        assert lib.se_tap_set_input(raw, bad_name, data, 8) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_input(raw, b"a", data, 0) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_set_input(ffi.NULL, b"a", data, 8) == lib.SE_ERR_ARGUMENT
    assert [drop(name) for name in (b"b", b"f", b"g", b"h")] == [lib.SE_OK] * 4
    assert add(b"n" * 63) == lib.SE_OK


def test_watch_input_arguments(raw):
    out = ffi.new("char[8]")
    for bad_name in (ffi.NULL, b"", b"n" * 64):
        assert lib.se_tap_watch_input(raw, bad_name, out, 8) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_watch_input(ffi.NULL, b"a", out, 8) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_watch_input(raw, b"a", out, 8) == lib.SE_OK
    assert lib.se_tap_watched_bytes(raw) == 0
    assert lib.se_tap_watch_input(raw, ffi.NULL, ffi.NULL, 0) == lib.SE_OK


def test_python_checks_its_arrays(tapped):
    context = tapped("llama", True)
    rows = rows_of("llama", 6)
    for plan in (dict(hidden=np.empty((5, D), np.float32), window=(0, 2, L)), dict(inject=np.empty((6, D), np.float64), window=(2, L, L)),
                 dict(inject=np.empty((D, 6), np.float32).T, window=(2, L, L))):  # fmt: skip
        with pytest.raises(EngineError, match="test"):
            decode(context, rows, **plan)
    with pytest.raises(EngineError, match="out of range"):
        decode(context, rows, window=(3, 3, L), inject=np.zeros((6, D), np.float32))
    decode(context, rows)


# ---- layer windows ----


@kinds
def test_graph_is_whole_again_after_windows(arch, flash, tapped, fresh):
    """The ordinary decode reuses the very graph that the resume had skipped nodes of."""
    rows = rows_of(arch, 24)
    want = stock_decode(fresh(arch, flash), rows)
    context = tapped(arch, flash)
    for layer in (2, 1, L - 1):
        context.clear()
        probe, resume, logits = window_pair(context, rows, layer)
        assert np.array_equal(probe.cells, np.arange(24)) and np.array_equal(resume.cells, probe.cells)
        assert np.array_equal(logits, want)
        context.clear()
        before = n_reused(context.llama)
        got = stock_decode(context.llama, rows)
        assert n_reused(context.llama) == before + 1
        assert np.array_equal(got, want)


@kinds
def test_what_a_window_reports(arch, flash, tapped):
    context = tapped(arch, flash)
    rows = rows_of(arch, 24)
    plain, _ = decode(context, rows, want_cells=True)
    assert (plain.n_attention, plain.n_skipped, plain.stopped, plain.flash, plain.last_unmasked, plain.error) == (L, 0, False, flash, -1, 0)
    context.clear()
    probe, resume, _ = window_pair(context, rows, 2)
    assert (probe.n_attention, probe.stopped, probe.flash) == (3, True, flash)
    assert probe.n_skipped == (1 if flash else 0)  # the attention that the graph ends at is not computed with flash attention
    assert (resume.n_attention, resume.stopped, resume.flash) == (L, False, flash)
    assert resume.n_skipped > 2 * 10  # two layers
    skipped = [resume.n_skipped]
    for layer in (3, 4):
        context.clear()
        skipped.append(window_pair(context, rows, layer)[1].n_skipped)
    assert skipped[1] - skipped[0] == skipped[2] - skipped[1] > 10  # every layer has the same nodes


@kinds
def test_middle_window_and_hidden_states(arch, flash, tapped, models):
    """[0, 1), [1, 3), [3, L) equals an ordinary decode, and what it saves is the hidden state."""
    context = tapped(arch, flash)
    rows = rows_of(arch, 24)
    _, want = decode(context, rows)
    context.clear()
    first, second = (np.empty((24, D), np.float32) for _ in range(2))
    decode(context, rows, window=(0, 1, L), hidden=first)
    context.remove(0, 0)
    outcome, _ = decode(context, Rows(rows.positions), window=(1, 3, L), inject=first, hidden=second)
    assert outcome.stopped and outcome.n_attention == 4
    context.remove(0, 0)
    _, got = decode(context, Rows(rows.positions), window=(3, L, L), inject=second)
    assert np.array_equal(got, want)
    model = Decoder(models[arch], np.float16)
    for layer, hidden in ((1, first), (3, second)):
        np.testing.assert_allclose(hidden, model.hidden(rows.embeddings, rows.positions, layer), atol=LOGITS[flash])


@kinds
def test_plans_beyond_the_model(arch, flash, tapped, fresh):
    """A window or a read that names layers the model lacks is an error with a clear text; the next decode is an ordinary one."""
    context = tapped(arch, flash)
    rows = rows_of(arch, 24)
    want = stock_decode(fresh(arch, flash), rows)
    inject = np.zeros((24, D), np.float32)
    cases = [
        (dict(window=(0, L + 2, L + 4)), "fewer attention operations than layers"),
        (dict(window=(0, L + 2, L + 4), hidden=np.empty((24, D), np.float32)), "names no layer output"),
        (dict(window=(L + 2, L + 4, L + 4), inject=inject), "names no layer output"),
        (dict(attention=AttentionRead([1, L], 512)), "fewer attention operations than layers"),
        (dict(attention=AttentionRead([1], 8)), "output buffer is too small"),
        (dict(attention=AttentionRead([1], 512, rows=(24, 1, 1))), "out of range"),
        (dict(attention=AttentionRead([1], 512, rows=(0, 25, 1))), "out of range"),
        (dict(window=(1, L, L), inject=np.zeros((24, D // 2), np.float32)), "unexpected shape"),
        (dict(window=(0, 2, L), hidden=np.empty((24, 2 * D), np.float32)), "unexpected shape"),
    ]
    for plan, text in cases:
        with pytest.raises(EngineError, match=text):
            decode(context, rows, **plan)
        context.clear()
        assert np.array_equal(stock_decode(context.llama, rows), want)
        context.clear()


def test_exception_in_the_block_disarms(tapped, fresh):
    context = tapped("llama", True)
    with pytest.raises(ZeroDivisionError):
        with context.tap.armed(Plan(n_rows=4, window=(0, 2, L)), "test"):
            1 / 0
    rows = rows_of("llama", 9)
    assert np.array_equal(decode(context, rows)[1], stock_decode(fresh("llama", True), rows))


# ---- positions ----


@kinds
def test_positions_given_are_positions_of_a_stock_decode(arch, flash, tapped, fresh):
    """The cache counts from 0 and RoPE sees the positions of the plan; llama.cpp takes them as they are from a fresh sequence."""
    context = tapped(arch, flash)
    rows = rows_of(arch, 24, start=70)
    _, got = decode(context, rows)
    assert np.array_equal(got, stock_decode(fresh(arch, flash), rows))
    at_zero = Rows(text_positions(arch, 0, 24), embeddings=rows.embeddings)
    context.clear()
    assert np.abs(decode(context, at_zero)[1] - got).max() < LOGITS[flash]  # RoPE is relative ...
    apart = Rows(text_positions(arch, 0, 24) * 3, embeddings=rows.embeddings)
    context.clear()
    assert np.abs(decode(context, apart)[1] - got).max() > CHANGED  # ... but not blind


@pytest.mark.parametrize("flash", [False, True])
def test_image_positions_with_sections(flash, tapped, fresh, models):
    """(t, y, x) of a 4 x 6 image, which llama.cpp takes from an embedding batch by itself."""
    i = np.arange(24)
    positions = np.stack([0 * i + 3, 3 + i // 6, 3 + i % 6, 0 * i]).astype(np.int32)
    rows = Rows(positions, embeddings=embeddings(24))
    _, got = decode(tapped("qwen2vl", flash), rows)
    assert np.array_equal(got, stock_decode(fresh("qwen2vl", flash), rows))
    np.testing.assert_allclose(got, Decoder(models["qwen2vl"], np.float16).forward(rows.embeddings, positions)[-1], atol=LOGITS[flash])


@kinds
def test_position_shift_equals_true_positions(arch, flash, tapped, fresh):
    """Generation at dense position n with shift 70 is generation at 70 + n."""
    context, llama = tapped(arch, flash), fresh(arch, flash)
    rows = rows_of(arch, 24, start=70)
    decode(context, rows)
    stock_decode(llama, rows)
    context.tap.set_position_shift(24, 70)
    for step, token in enumerate((7, 100, 33)):
        context.llama.n_tokens = 24 + step
        want = stock_decode(llama, Rows(np.array([94 + step], np.int32), tokens=np.array([token])))
        assert np.array_equal(token_step(context.llama, token), want)
    context.llama.n_tokens = 0


@kinds
def test_position_shift_over_a_gap(arch, flash, tapped, models):
    """After rows at 0..9 and 40..49 the answer goes on at 50, and at another place without the shift."""
    context, model = tapped(arch, flash), Decoder(models[arch], np.float16)
    positions = np.concatenate([text_positions(arch, 0, 10), text_positions(arch, 40, 10)], axis=-1)
    rows = Rows(positions, embeddings=embeddings(20))
    decode(context, rows)
    tokens = [7, 100]
    inputs = np.concatenate([rows.embeddings, model.embed(tokens)])
    want = model.forward(inputs, np.concatenate([positions, text_positions(arch, 50, 2)], axis=-1))[-2:]
    wrong = model.forward(inputs, np.concatenate([positions, text_positions(arch, 20, 2)], axis=-1))[-2:]
    context.tap.set_position_shift(20, 30)
    for step, token in enumerate(tokens):
        context.llama.n_tokens = 20 + step
        np.testing.assert_allclose(token_step(context.llama, token), want[step], atol=LOGITS[flash])
    context.tap.set_position_shift(20, 0)
    context.remove(0, 20)
    context.llama.n_tokens = 20
    np.testing.assert_allclose(token_step(context.llama, tokens[0]), wrong[0], atol=LOGITS[flash])
    assert np.abs(want[0] - wrong[0]).max() > CHANGED
    context.llama.n_tokens = 0


def test_shift_leaves_smaller_positions_alone(tapped, fresh):
    """Only positions from `start` on are moved."""
    context, llama = tapped("llama", False), fresh("llama", False)
    rows = rows_of("llama", 24)
    context.tap.set_position_shift(24, 500)
    _, got = decode(context, rows)
    assert np.array_equal(got, stock_decode(llama, rows))


# ---- cell bias ----


@kinds
def test_cell_bias_makes_a_cell_count_three_times(arch, flash, tapped, models):
    """log 3 on the cell of one row, at prefill and for a generated token; the column bias of the reference is the oracle."""
    context, model = tapped(arch, flash), Decoder(models[arch], np.float16)
    rows = rows_of(arch, 24, seed=4)
    row, token = 5, 77
    decode(context, rows_of(arch, 3, seed=9))
    context.park(0)  # three cells of another sequence: row i is not in cell i
    outcome, _ = decode(context, rows, want_cells=True)
    assert outcome.cells[row] == row + 3
    bias = np.zeros(row + 4, np.float32)  # shorter than the cache: the other cells have no bias
    bias[outcome.cells[row]] = np.log(3)
    context.llama.n_tokens = 24
    base = token_step(context.llama, token)
    context.remove(0, 0)
    context.tap.set_cell_bias(bias)
    _, prefill = decode(context, rows)
    step = token_step(context.llama, token)
    column = np.zeros(25)
    column[row] = np.log(3)
    inputs = np.concatenate([rows.embeddings, model.embed([token])])
    want = model.forward(inputs, text_positions(arch, 0, 25), column)
    np.testing.assert_allclose(prefill, want[23], atol=LOGITS[flash])
    np.testing.assert_allclose(step, want[24], atol=LOGITS[flash])
    assert np.abs(step - base).max() > CHANGED
    context.tap.set_cell_bias(None)
    context.remove(0, 0)
    decode(context, rows)
    assert np.array_equal(token_step(context.llama, token), base)
    context.llama.n_tokens = 0


@kinds
def test_cell_bias_is_three_copies_of_a_row(arch, flash, tapped):
    """Three equal cells at one position weigh as one with bias log 3: the copies are made by RoPE positions alone."""
    context = tapped(arch, flash)
    rows = embeddings(12, 8)
    copies = [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    layer = 1  # only the first block: there, equal rows at equal positions have equal keys and values
    tripled, single = np.empty((14, D), np.float32), np.empty((12, D), np.float32)
    positions = text_positions(arch, 0, 12)
    decode(context, Rows(np.ascontiguousarray(positions[..., copies]), embeddings=rows[copies]), window=(0, layer, L), hidden=tripled)
    context.clear()
    bias = np.zeros(12, np.float32)
    bias[2] = np.log(3)
    context.tap.set_cell_bias(bias)
    decode(context, Rows(positions, embeddings=rows), window=(0, layer, L), hidden=single)
    np.testing.assert_allclose(single[3:], tripled[5:], atol=5e-3)
    context.tap.set_cell_bias(None)
    context.clear()
    plain = np.empty((12, D), np.float32)
    decode(context, Rows(positions, embeddings=rows), window=(0, layer, L), hidden=plain)
    assert np.abs(plain[3:] - tripled[5:]).max() > 0.02


@pytest.mark.parametrize("flash", [False, True])
def test_cell_bias_never_opens_a_masked_cell(flash, tapped):
    """Row 0 sees only itself, whatever the bias of later cells."""
    context = tapped("llama", flash)
    rows = rows_of("llama", 8)
    read = lambda: AttentionRead([0], 512, (0, 1, 1), 0, max_rows=1, max_heads=HEADS)
    context.tap.set_cell_bias(np.full(8, 9.0, np.float32))
    outcome, _ = decode(context, rows, attention=read())
    weights = outcome.attention[0][:, 0]
    np.testing.assert_allclose(weights[:, 0], 1.0, atol=1e-6)
    assert (weights[:, 1:] == 0).all()


# ---- attention out of a running decode ----


def all_heads(layers, n, **options):
    return AttentionRead(layers, 512, max_rows=n, max_heads=HEADS, reduce=0, **options)


@kinds
@pytest.mark.parametrize(("cache", "tolerance"), [("f16", STATE), ("q8_0", LOOSE)])
def test_attention_of_several_layers(arch, flash, cache, tolerance, tapped, models):
    kind = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
    context = tapped(arch, flash, type_k=kind, **({"type_v": kind} if flash else {}))
    rows = rows_of(arch, 24)
    outcome, _ = decode(context, rows, attention=all_heads([0, 2, L - 1], 24), want_cells=True)
    assert len(outcome.attention) == 3 and outcome.score_seconds > 0
    model = Decoder(models[arch], np.float16)
    for layer, got in zip((0, 2, L - 1), outcome.attention):
        want = model.attention(rows.embeddings, rows.positions, layer)
        assert got.shape[:2] == want.shape[:2]
        np.testing.assert_allclose(got[..., outcome.cells], want, atol=tolerance)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-4)
        rest = np.ones(got.shape[-1], bool)
        rest[outcome.cells] = False
        assert (got[..., rest] == 0).all()


@kinds
def test_attention_rows_and_reductions(arch, flash, tapped):
    context = tapped(arch, flash)
    rows = rows_of(arch, 24)
    outcome, _ = decode(context, rows, attention=all_heads([1, 3], 24))
    full = [a.astype(np.float64) for a in outcome.attention]
    for first, count, step in ((0, -1, 1), (3, -1, 4), (5, 2, 7), (23, 1, 1), (23, -1, 50)):
        picked = np.arange(first, 24, step)[: None if count < 0 else count]
        for reduce, axes in ((0, ()), (MEAN_HEADS, (0,)), (MEAN_ROWS, (1,)), (MEAN_ALL, (0, 1))):
            context.clear()
            read = AttentionRead([1, 3], 512, (first, count, step), reduce, max_rows=len(picked), max_heads=HEADS, n_threads=2)
            got, _ = decode(context, rows, attention=read)
            for a, b in zip(got.attention, full):
                np.testing.assert_allclose(a, b[:, picked].mean(axis=axes) if axes else b[:, picked], atol=1e-6)


@kinds
def test_attention_where_the_graph_ends(arch, flash, tapped, models):
    """The layer that a window stops at is read without being computed, in a second decode that sees the cells of the first."""
    context, model = tapped(arch, flash), Decoder(models[arch], np.float16)
    x = embeddings(30)
    positions = text_positions(arch, 0, 30)
    decode(context, Rows(np.ascontiguousarray(positions[..., :18]), embeddings=x[:18]), want_cells=True)
    tail = Rows(np.ascontiguousarray(positions[..., 18:]), embeddings=x[18:])
    outcome, _ = decode(context, tail, 18, window=(0, 2, L), attention=AttentionRead([2], 512, (4, -1, 1)))
    want = model.attention(x, positions, 2)[:, 22:].mean(axis=(0, 1))
    np.testing.assert_allclose(outcome.attention[0][:30], want, atol=STATE)


def test_attention_with_cell_bias(tapped, models):
    """The bias is in the scores, as it is in the softmax that the graph computes."""
    rows = rows_of("llama", 24)
    bias = np.linspace(0, 2, 24).astype(np.float32)
    model = Decoder(models["llama"], np.float16)
    for flash in (False, True):
        context = tapped("llama", flash)
        context.tap.set_cell_bias(bias)
        outcome, _ = decode(context, rows, attention=all_heads([1], 24))
        np.testing.assert_allclose(outcome.attention[0][..., :24], model.attention(rows.embeddings, rows.positions, 1, bias), atol=STATE)


# ---- inputs of an encoder ----


@pytest.fixture(scope="module")
def encoders(models, tmp_path_factory):
    """kind -> a VisionEncoder and one image's chunk."""
    folder, made = tmp_path_factory.mktemp("encoders"), {}
    opened = []

    def get(kind):
        if kind not in made:
            path = folder / f"{kind}.gguf"
            shape = EncoderShape(image_size=56, patch_size=14, n_layers=3, n_embd=64, n_heads=4, n_ff=96, kind=kind)
            write_encoder(path, shape, projection_dim=D)
            llama = load(models["llama" if kind == "clip" else "qwen2vl"], True)
            encoder = VisionEncoder(path, llama, flash_attn=True, use_gpu=False)
            pixels = np.random.default_rng(3).integers(0, 256, (56, 56, 3), dtype=np.uint8)
            prompt = encoder.tokenize(MEDIA_MARKER, [pixels])
            opened.append((prompt, encoder, llama))
            made[kind] = encoder, next(c for c in prompt.chunks if hasattr(c, "handle"))
        return made[kind]

    yield get
    for prompt, encoder, llama in opened:
        prompt.close()
        encoder.close()
        llama.close()


@pytest.mark.parametrize("kind", ["clip", "qwen2vl"])
def test_set_input_and_watch(kind, encoders):
    encoder, chunk = encoders(kind)
    encode = lambda: encoder.encode(chunk, want_scores=False).embeddings.copy()
    seen = np.full(4096, -1, np.int32)
    with encoder.tap.watching("positions", seen):
        before = encode()
    n = encoder.tap.watched() // 4
    assert n >= chunk.n_tokens and (seen[n:] == -1).all() and (seen[:n] >= 0).all()
    other = np.ascontiguousarray(seen[:n][::-1])
    encoder.tap.set_input("positions", other)
    again = np.full(4096, -1, np.int32)
    try:
        with encoder.tap.watching("positions", again):
            changed = encode()
        assert np.array_equal(again[:n], other)  # what is watched is what the graph gets
        assert np.abs(changed - before).max() > 1e-2
        assert np.array_equal(encode(), changed)
        encoder.tap.set_input("positions", seen[:n])
        assert np.array_equal(encode(), before)
        encoder.tap.set_input("positions", seen[: n - 1])
        with pytest.raises(EngineError, match="unexpected shape"):
            encode()
    finally:
        encoder.tap.set_input("positions", None)
    assert np.array_equal(encode(), before)
    with encoder.tap.watching("positions", seen[: n - 1]), pytest.raises(EngineError, match="too small"):
        encode()
    with encoder.tap.watching("no such input", seen):
        assert np.array_equal(encode(), before)
    assert encoder.tap.watched() == 0


# ---- the walk over a graph in several splits ----

TENSOR = """
typedef struct tensor {
    int type; void * buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t op_params[16]; int32_t flags;
    struct tensor * src[10]; struct tensor * view_src; size_t view_offs; void * data; char name[64]; void * extra; char padding[8];
} tensor;
typedef struct { size_t mem_size; void * mem_buffer; bool no_alloc; } init_params;
void * ggml_init(init_params);
void ggml_free(void *);
size_t ggml_tensor_overhead(void);
tensor * ggml_new_tensor_2d(void *, int, int64_t, int64_t);
tensor * ggml_set_name(tensor *, const char *);
tensor * ggml_add(void *, tensor *, tensor *);
tensor * ggml_rope(void *, tensor *, tensor *, int, int);
tensor * ggml_soft_max_ext(void *, tensor *, tensor *, float, float);
tensor * ggml_new_tensor_3d(void *, int, int64_t, int64_t, int64_t);
tensor * ggml_new_tensor_1d(void *, int, int64_t);
void * ggml_backend_cpu_buffer_type(void);
void * ggml_backend_alloc_ctx_tensors_from_buft(void *, void *);
void ggml_backend_buffer_free(void *);
"""
F32, I32 = int(gguf.GGMLQuantizationType.F32), int(gguf.GGMLQuantizationType.I32)
COMPUTE = 16
OBJECT_SIZE = 32


class Graph:
    """Tensors made by libggml-base, and the scheduler's loop over them with a tap for its callback. Nothing is computed."""

    def __init__(self):
        self.ffi = cffi.FFI()
        self.ffi.cdef(TENSOR)
        self.ggml = self.ffi.dlopen(GGML._name)
        assert self.ffi.sizeof("tensor") + OBJECT_SIZE == self.ggml.ggml_tensor_overhead()
        self.context = self.ggml.ggml_init((1 << 16, self.ffi.NULL, True))
        self.buffer = None
        self.tap = lib.se_tap_new()

    def close(self):
        lib.se_tap_free(self.tap)
        if self.buffer:
            self.ggml.ggml_backend_buffer_free(self.buffer)
        self.ggml.ggml_free(self.context)

    def leaf(self, name, *shape, kind=F32):
        make = {1: self.ggml.ggml_new_tensor_1d, 2: self.ggml.ggml_new_tensor_2d, 3: self.ggml.ggml_new_tensor_3d}[len(shape)]
        return self.ggml.ggml_set_name(make(self.context, kind, *shape), name.encode())

    def node(self, name, tensor):
        tensor.flags |= COMPUTE
        return self.ggml.ggml_set_name(tensor, name.encode())

    def add(self, name, a, b):
        return self.node(name, self.ggml.ggml_add(self.context, a, b))

    def allocate(self):
        self.buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, self.ggml.ggml_backend_cpu_buffer_type())
        assert self.buffer

    def values(self, tensor, kind=np.float32):
        """The tensor's memory as an array that can be written."""
        n = int(np.prod([tensor.ne[i] for i in range(4)]))
        return np.frombuffer(self.ffi.buffer(self.ffi.cast("char *", tensor.data), 4 * n), kind)

    def call(self, tensor, ask):
        return lib.se_tap_callback(ffi.cast("struct ggml_tensor *", int(self.ffi.cast("uintptr_t", tensor))), ask, self.tap)

    def run(self, splits):
        """Names of the nodes that a backend would compute. A split is a list of nodes, or a callable: a copy between backends."""
        computed = []
        for split in splits:
            if callable(split):
                split()
                continue
            batch = []
            for node in split:
                batch.append(node)
                if self.call(node, True):
                    computed += [t for t in batch if t.flags & COMPUTE]
                    batch = []
                    if not self.call(node, False):
                        break
            computed += [t for t in batch if t.flags & COMPUTE]
        return [self.ffi.string(t.name).decode() for t in computed]

    def arm(self, **fields):
        plan = ffi.new("se_plan *")
        for name, value in fields.items():
            setattr(plan, name, value)
        return lib.se_tap_arm(self.tap, plan)

    def finish(self):
        result = ffi.new("se_result *")
        assert lib.se_tap_finish(self.tap, result) == result.error
        return result


@pytest.fixture
def graph():
    g = Graph()
    yield g
    g.close()


@pytest.mark.parametrize("embedding", ["inp_embd", "inp_tokens", "embd", "CUDA1#inp_embd#3"])
def test_dependents_are_skipped_across_backends(graph, embedding):
    """a and b depend on the embeddings, b only through a copy of a on another backend; side does not depend on them."""
    g = graph
    x, weight = g.leaf(embedding, 8, 4), g.leaf("blk.0.weight", 8, 4)
    copy, copied_weight = g.leaf("CUDA0#a#0", 8, 4), g.leaf("CUDA0#blk.1.weight#0", 8, 4)
    a, side = g.add("a", x, weight), g.add("side", weight, weight)
    near = g.leaf("CUDA0#ab#0", 8, 4)  # no node has this name
    b, other = g.add("b", copy, copied_weight), g.add("other", copied_weight, near)
    out = g.add("l_out-0", b, side)
    after = g.add("after", out, side)
    g.allocate()
    inject = np.arange(32, dtype=np.float32)
    assert g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data)) == lib.SE_OK
    assert g.run([[a, side], [b, other, out, after]]) == ["side", "other", "after"]
    assert np.array_equal(g.values(out), inject)
    skipped = [a, b, out]
    assert not any(t.flags & COMPUTE for t in skipped)
    result = g.finish()
    assert (result.error, result.n_skipped, result.n_graphs) == (lib.SE_OK, 3, 1)
    assert all(t.flags & COMPUTE for t in (a, side, b, other, out, after))
    assert g.run([[a, side], [b, other, out, after]]) == ["a", "side", "b", "other", "l_out-0", "after"]  # idle again


def test_nodes_that_were_off_stay_off(graph):
    """A node without the flag (the unused branch of a select) is not given one by the restoring."""
    g = graph
    x = g.leaf("inp_embd", 8, 4)
    unused, used = g.add("unused", x, x), g.add("used", x, x)
    unused.flags = 0
    out = g.add("l_out-0", used, x)
    g.allocate()
    inject = np.ones(32, np.float32)
    assert g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data)) == lib.SE_OK
    assert g.run([[unused, used, out]]) == []
    assert g.finish().n_skipped == 2
    assert unused.flags == 0 and used.flags == out.flags == COMPUTE


def test_a_stop_ends_every_later_split(graph):
    """The graph ends at the second attention; a later split computes its first node only, since it must answer something."""
    g = graph
    x = g.leaf("inp_embd", 8, 4, 2)
    nodes = [g.add("k", x, x)]
    for i in range(3):
        nodes.append(g.node(f"attention {i}", g.ggml.ggml_soft_max_ext(g.context, nodes[-1], g.ffi.NULL, 1.0, 0.0)))
        nodes.append(g.add(f"l_out-{i}", nodes[-1], x))
    tail = [g.add("far", x, x), g.add("farther", x, x)]
    g.allocate()
    assert g.arm(n_layer=3, first=0, last=1, n_rows=4) == lib.SE_OK
    assert g.run([nodes, tail]) == ["k", "attention 0", "l_out-0", "attention 1", "far"]
    result = g.finish()
    assert (result.error, result.stopped, result.n_attention, result.flash, result.last_unmasked) == (lib.SE_OK, 1, 2, 0, 1)


def test_a_second_graph_is_noticed(graph):
    g = graph
    x = g.leaf("inp_embd", 8, 4)
    nodes = [g.add("a", x, x), g.add("l_out-0", x, x)]
    nodes.append(g.add("b", nodes[-1], nodes[-1]))
    g.allocate()
    inject = np.ones(32, np.float32)
    assert g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data)) == lib.SE_OK
    g.run([nodes])
    g.run([nodes])
    result = g.finish()
    assert (result.error, result.n_graphs) == (lib.SE_ERR_SEVERAL_GRAPHS, 2)
    assert all(t.flags & COMPUTE for t in nodes)


def test_only_whole_layer_names_count(graph):
    """l_out-0 (view), l_out--1 and l_out-x are no layer outputs."""
    g = graph
    x = g.leaf("inp_embd", 8, 4)
    nodes = [g.add(name, x, x) for name in ("l_out-0 (view)", "l_out-x", "l_out-", "l_out--0x", "xl_out-0")]
    g.allocate()
    inject = np.ones(32, np.float32)
    assert g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data)) == lib.SE_OK
    g.run([nodes])
    assert g.finish().error == lib.SE_ERR_NO_LAYER_OUT
    assert all(t.flags & COMPUTE for t in nodes)


@pytest.mark.parametrize("name", ["positions", "CUDA0#positions#0", "Vulkan0#positions#7"])
def test_inputs_are_written_on_the_backend_that_reads_them(graph, name):
    g = graph
    leaf, near = g.leaf(name, 8, 4), g.leaf("CUDA0#positions_2#0", 8, 4)
    node = g.add("a", leaf, near)
    g.allocate()
    g.values(near)[:] = 7
    new = np.arange(32, dtype=np.float32)
    assert lib.se_tap_set_input(g.tap, b"positions", ffi.cast("void *", new.ctypes.data), new.nbytes) == lib.SE_OK
    g.run([[node]])
    assert np.array_equal(g.values(leaf), new)
    assert (g.values(near) == 7).all()


def test_a_tensor_without_memory_is_an_error(graph):
    g = graph
    leaf = g.leaf("positions", 8, 4)
    node = g.add("a", leaf, leaf)
    new = np.zeros(32, np.float32)
    assert lib.se_tap_set_input(g.tap, b"positions", ffi.cast("void *", new.ctypes.data), new.nbytes) == lib.SE_OK
    assert g.arm() == lib.SE_OK
    g.run([[node]])
    assert g.finish().error == lib.SE_ERR_SHAPE
