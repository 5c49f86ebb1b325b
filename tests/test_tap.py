"""The tap's life cycle: what a plan may be, and layer windows in running graphs."""

import numpy as np
import pytest
from helpers import bounds
from helpers.reference import Decoder
from helpers.tap_helpers import D, L, Rows, decode, good_plan, kinds, n_reused, rows_of, stock_decode, window_pair
from helpers.tap_helpers import fresh as fresh  # a fixture
from helpers.tap_helpers import models as models  # a fixture
from helpers.tap_helpers import raw as raw  # a fixture
from helpers.tap_helpers import rounding as rounding  # a fixture
from helpers.tap_helpers import tapped as tapped  # a fixture

from star_edge.errors import EngineError
from star_edge.llamacpp.native import ffi, lib
from star_edge.llamacpp.tap import AttentionRead, Plan

# ---- what a plan may be ----

BAD_PLANS = [
    dict(n_layer=-1),
    dict(n_rows=-1),
    dict(n_attn_layers=-1),
    dict(n_rows=0),
    dict(first=-1),
    dict(first=5),
    dict(first=6, last=6),
    dict(last=7),
    dict(last=1),
    dict(n_embd=0),
    dict(n_embd=-8),
    dict(inject=ffi.NULL),
    dict(last=6),
    dict(n_pos_per_row=0),
    dict(n_pos_per_row=2),
    dict(n_pos_per_row=3),
    dict(attn_layers=ffi.NULL),
    dict(attn=ffi.NULL),
    dict(attn_block=0),
    dict(attn_block=-1),
    dict(row_step=0),
    dict(row_step=-1),
    dict(row_first=-1),
    dict(reduce=-1),
    dict(reduce=4),
    dict(n_layer=0, n_rows=0),
]


@pytest.mark.parametrize("fields", BAD_PLANS, ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()))
def test_invalid_plans_do_not_arm(raw, fields):
    plan, _keep = good_plan()
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
    plan, _keep = good_plan()
    result = ffi.new("se_result *")
    assert lib.se_tap_finish(raw, result) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_arm(raw, plan) == lib.SE_OK
    assert lib.se_tap_arm(raw, plan) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_finish(raw, result) == lib.SE_OK  # no graph ran: nothing to complain about
    assert (result.n_attention, result.n_graphs, result.n_skipped, result.stopped, result.last_unmasked) == (
        0,
        0,
        0,
        0,
        -1,
    )
    assert lib.se_tap_finish(raw, result) == lib.SE_ERR_ARGUMENT
    assert lib.se_tap_arm(raw, plan) == lib.SE_OK
    assert lib.se_tap_finish(raw, ffi.NULL) == lib.SE_OK


def test_nulls(raw):
    plan, _keep = good_plan()
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
    """Eight names fit; a name can be set again, and removing any of them makes room for one."""
    data = ffi.new("char[8]")
    add = lambda name, size=8: lib.se_tap_set_input(raw, name, data, size)
    drop = lambda name: lib.se_tap_set_input(raw, name, ffi.NULL, 0)
    assert [add(name) for name in (b"a", b"b", b"c", b"d", b"1", b"2", b"3", b"4")] == [lib.SE_OK] * 8
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
    for plan in (
        dict(hidden=np.empty((5, D), np.float32), window=(0, 2, L)),
        dict(inject=np.empty((6, D), np.float64), window=(2, L, L)),
        dict(inject=np.empty((D, 6), np.float32).T, window=(2, L, L)),
    ):
        with pytest.raises(EngineError, match="test"):
            decode(context, rows, **plan)
    for window in ((0, 0, L), (L, L, L), (4, 3, L)):
        with pytest.raises(EngineError, match="out of range"):
            decode(context, rows, window=window, inject=np.zeros((6, D), np.float32))
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
    assert (plain.n_attention, plain.n_skipped, plain.stopped, plain.flash, plain.last_unmasked, plain.error) == (
        L,
        0,
        False,
        flash,
        -1,
        0,
    )
    context.clear()
    probe, resume, _ = window_pair(context, rows, 2)
    assert (probe.n_attention, probe.stopped, probe.flash) == (3, True, flash)
    assert probe.n_skipped == (
        1 if flash else 0
    )  # the attention that the graph ends at is not computed with flash attention
    assert (resume.n_attention, resume.stopped, resume.flash) == (L, False, flash)
    assert resume.n_skipped > 2 * 10  # two layers
    skipped = [resume.n_skipped]
    for layer in (3, 4):
        context.clear()
        skipped.append(window_pair(context, rows, layer)[1].n_skipped)
    assert skipped[1] - skipped[0] == skipped[2] - skipped[1] > 10  # every layer has the same nodes


@kinds
def test_middle_window_and_hidden_states(arch, flash, tapped, models, rounding):
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
        right, other = (model.hidden(rows.embeddings, rows.positions, n) for n in (layer, layer - 1))
        assert bounds.are_close(hidden, right, rounding(arch, flash)) and not bounds.are_close(
            other, right, rounding(arch, flash)
        )
        assert not bounds.are_close(np.roll(right, 1, axis=0), right, rounding(arch, flash))


@kinds
def test_plans_beyond_the_model(arch, flash, tapped, fresh):
    """A window or a read that names layers the model lacks is an error with a clear text; the next decode is an
    ordinary one.
    """
    context = tapped(arch, flash)
    rows = rows_of(arch, 24)
    want = stock_decode(fresh(arch, flash), rows)
    inject = np.zeros((24, D), np.float32)
    cases = [
        (dict(window=(0, L + 2, L + 4)), "a layer that was named has no attention"),
        (dict(window=(0, L + 2, L + 4), hidden=np.empty((24, D), np.float32)), "names no layer output"),
        (dict(window=(L + 2, L + 4, L + 4), inject=inject), "names no layer output"),
        (dict(attention=AttentionRead([1, L], 512)), "a layer that was named has no attention"),
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
    with pytest.raises(ZeroDivisionError), context.tap.armed(Plan(n_rows=4, window=(0, 2, L)), "test"):
        raise ZeroDivisionError
    rows = rows_of("llama", 9)
    assert np.array_equal(decode(context, rows)[1], stock_decode(fresh("llama", True), rows))


@pytest.mark.parametrize("layers", [[0], [0, 3], [1, 6]], ids=str)
def test_attention_outside_the_window_is_refused(raw, layers):
    """It is not computed there: what would be read is old memory."""
    plan, keep = good_plan()
    keep[3][: len(layers)] = layers
    plan.n_attn_layers = len(layers)
    assert lib.se_tap_arm(raw, plan) == lib.SE_ERR_ARGUMENT
