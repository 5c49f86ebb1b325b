"""What is taken for granted of the memory of hybrid decoders: KV cells beside recurrent states."""

import llama_cpp
import numpy as np
import pytest
from helpers import stock
from llama_cpp import Llama

from star_edge.llamacpp.context import MAIN, DecoderContext, attach_tap
from star_edge.llamacpp.saved_rows import restore_state, save_state
from star_edge.llamacpp.tap import Plan, Tap
from star_edge.rows import Rows


@pytest.fixture(scope="module", params=["qwen35", "lfm2"])
def tapped(request, families):
    llama, tap = stock.load(families[request.param].text, True, n_ctx=512, n_threads=1), Tap()
    attach_tap(llama, tap)
    yield DecoderContext(llama, tap)
    llama.close()
    tap.close()


def add(context, n, first, **options):
    rows = Rows(np.arange(first, first + n, dtype=np.int32), np.arange(n, dtype=np.int32) + 260)
    return context.decode(rows, first, Plan(want_cells=True), "test", **options).cells.tolist()


def remove(context, start, stop):
    return llama_cpp.llama_memory_seq_rm(context.memory, MAIN, start, stop)


def test_rows_before_the_state_s_position_can_be_cut_out_and_later_ones_cannot(tapped):
    tapped.clear()
    add(tapped, 20, 0)
    assert remove(tapped, 3, 5) and remove(tapped, 10, 19) and remove(tapped, 0, 2)
    assert not remove(tapped, 15, 20) and not remove(tapped, 19, -1)
    assert remove(tapped, 20, -1)


def test_rows_go_to_the_cells_that_were_cut_out_in_order_at_new_positions(tapped):
    tapped.clear()
    add(tapped, 20, 0)
    remove(tapped, 3, 5)
    remove(tapped, 9, 10)
    assert add(tapped, 3, 20) == [3, 4, 9]
    assert remove(tapped, 19, 20)  # the last row's, once another one is decoded
    assert add(tapped, 1, 23) == [19]


def test_a_part_of_nothing_is_removed_by_sequence_minus_1(tapped):
    tapped.clear()
    add(tapped, 6, 0)
    llama_cpp.llama_memory_seq_rm(tapped.memory, -1, 2, -1)
    assert tapped.span(MAIN)[1] == 5


def test_the_last_position_is_the_smaller_of_the_two_memories(tapped):
    tapped.clear()
    add(tapped, 8, 0)
    state = save_state(tapped.llama)
    restore_state(tapped.llama, state, 4)
    assert tapped.span(MAIN)[1] == 4


@pytest.mark.parametrize("at", [3, -1], ids=["some rows", "no row"])
def test_a_state_goes_back_to_another_position_with_all_that_it_was(tapped, at):
    """The rows after it are decoded as if those before were at other positions: the states alone are compared."""
    tapped.clear()
    add(tapped, 8, 0)
    state = save_state(tapped.llama)
    add(tapped, 5, 8)
    assert not np.array_equal(save_state(tapped.llama), state)
    restore_state(tapped.llama, state, at)
    tapped.remove(MAIN, at + 1)
    again = save_state(tapped.llama)
    assert np.flatnonzero(again != state).tolist() == [12, *([13, 14, 15] if at < 0 else [])]  # the position alone
    assert add(tapped, 4, at + 1) == list(range(at + 1, at + 5))


def test_states_of_a_sequence_start_at_zero_after_a_clear_without_data(tapped):
    tapped.clear()
    add(tapped, 6, 0, logits=True)
    first = tapped.logits()
    add(tapped, 9, 6)
    tapped.clear()
    add(tapped, 6, 0, logits=True)
    assert np.array_equal(tapped.logits(), first)


def test_llama_clears_such_a_memory_on_reset_only_if_it_is_told_that_it_is_hybrid(families):
    llama = Llama(str(families["lfm2"].text), n_ctx=256, verbose=False)
    last = lambda: llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llama.ctx), 0)
    seen = []
    for is_hybrid in (True, False):
        llama._is_hybrid = is_hybrid
        llama.eval([260, 261, 262])
        llama.reset()
        seen.append(last())
    llama.close()
    assert seen == [-1, 2]
