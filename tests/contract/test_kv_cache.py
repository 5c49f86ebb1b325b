"""What is taken for granted of llama.cpp's KV cache: which cells rows get, sequences, and sizes."""

import ctypes
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
from helpers import stock
from helpers.decoders import write_sliding
from helpers.models import LLAMA
from llama_cpp import Llama, _internals

from star_edge.llamacpp.context import MAIN, N_SEQUENCES, PARKED, DecoderContext, attach_tap
from star_edge.llamacpp.tap import Plan, Tap
from star_edge.rows import Rows


@pytest.fixture(scope="module", params=["llama", "qwen2vl"])
def tapped(request, families):
    llama, tap = stock.load(families[request.param].text, True, n_ctx=512, n_threads=1), Tap()
    attach_tap(llama, tap)
    yield DecoderContext(llama, tap)
    llama.close()
    tap.close()


def add(context, n, first):
    """n rows of text at dense positions from `first` on; their cells."""
    rows = Rows(np.arange(first, first + n, dtype=np.int32), np.arange(n, dtype=np.int32) + 260)
    return context.decode(rows, first, Plan(want_cells=True), "test").cells.tolist()


def test_rows_go_to_the_first_cells_of_an_empty_cache_in_order(tapped):
    tapped.clear()
    assert add(tapped, 7, 0) + add(tapped, 5, 7) == list(range(12))


def test_rows_go_to_the_freed_cells_from_the_first_on_in_order(tapped):
    tapped.clear()
    add(tapped, 20, 0)
    tapped.park(0, PARKED)
    for first, last in ((3, 5), (9, 10), (15, 17)):
        tapped.remove(PARKED, first, last)
    assert add(tapped, 5, 0) == [3, 4, 9, 15, 16]


def test_a_cell_that_belongs_to_any_sequence_is_not_given_out(tapped):
    tapped.clear()
    add(tapped, 20, 0)
    tapped.park(5, PARKED)
    assert add(tapped, 6, 5) == list(range(20, 26))


def test_a_cell_may_belong_to_several_sequences_and_is_free_when_it_belongs_to_none(tapped):
    tapped.clear()
    add(tapped, 8, 0)
    tapped.copy(MAIN, PARKED, 0)
    tapped.remove(MAIN, 0)
    tapped.copy(PARKED, MAIN, 0, 4)
    tapped.remove(PARKED, 0)
    assert add(tapped, 4, 4) == [4, 5, 6, 7]


def test_a_unified_cache_has_sequences_0_to_6_whatever_n_seq_max_says(tapped):
    assert tapped.llama.context_params.n_seq_max == 2
    tapped.clear()
    add(tapped, 4, 0)
    for sequence in range(1, N_SEQUENCES):
        tapped.copy(MAIN, sequence, 0)
    memory, last = tapped.memory, llama_cpp.llama_memory_seq_pos_max
    assert [last(memory, s) for s in range(N_SEQUENCES)] == [3] * N_SEQUENCES


def test_positions_of_a_sequence_that_has_none_are_minus_1(tapped):
    tapped.clear()
    assert llama_cpp.llama_memory_seq_pos_max(tapped.memory, PARKED) == -1
    assert llama_cpp.llama_memory_seq_pos_min(tapped.memory, PARKED) == -1


def test_clearing_without_data_leaves_the_cache_empty(tapped):
    add(tapped, 4, 0) if llama_cpp.llama_memory_seq_pos_max(tapped.memory, MAIN) < 0 else None
    llama_cpp.llama_memory_clear(tapped.memory, False)
    assert llama_cpp.llama_memory_seq_pos_max(tapped.memory, MAIN) == -1


@pytest.mark.parametrize(("n_ctx", "swa_full"), [(512, False), (512, True), (192, False)])
def test_a_small_cache_of_a_sliding_window_gives_cells_to_later_rows(tmp_path, n_ctx, swa_full):
    """The first layer of this model has the window: its cells are those that a plan brings back."""
    write_sliding(tmp_path / "text.gguf", replace(LLAMA, n_layers=4), 64)
    options = {"n_ctx": n_ctx, "n_batch": 64, "n_threads": 1, "swa_full": swa_full, "verbose": False}
    llama, tap = Llama(str(tmp_path / "text.gguf"), **options), Tap()
    attach_tap(llama, tap)
    context, n = DecoderContext(llama, tap), min(n_ctx, 320)
    cells = [cell for first in range(0, n, 64) for cell in add(context, 64, first)]
    assert (cells != list(range(n))) == context.cells_move_on == (n_ctx == 512 and not swa_full)
    llama.close()
    tap.close()


def test_llama_decode_returns_1_when_there_are_no_free_cells(families):
    llama = stock.load(families["llama"].text, True, n_ctx=256, n_threads=1)
    batch = _internals.LlamaBatch(n_tokens=256, embd=0, n_seq_max=1, verbose=False)
    batch.set_batch(batch=[260] * 250, n_past=0, logits_all=False)
    assert llama_cpp.llama_decode(llama.ctx, batch.batch) == 0
    batch.set_batch(batch=[260] * 100, n_past=250, logits_all=False)
    status = llama_cpp.llama_decode(llama.ctx, batch.batch)
    batch.close()
    llama.close()
    assert status == 1


def test_n_ctx_is_padded_to_a_multiple_of_256_and_the_buffers_of_llama_are_not(families):
    llama = Llama(str(families["llama"].text), n_ctx=300, verbose=False)
    padded, own = llama.n_ctx(), len(llama.input_ids)
    llama.close()
    assert (padded, own) == (512, 300)


def test_attention_sees_fewer_than_1024_columns_more_than_n_ctx(tapped):
    """What is reserved for the scores of one window (decoder/prefill.py)."""
    assert llama_cpp.llama_n_ctx(tapped.llama.ctx) <= tapped.n_ctx + 1024


def test_the_last_row_of_a_batch_has_its_logits_at_index_minus_1(tapped):
    tapped.clear()
    rows = Rows(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32) + 260)
    tapped.decode(rows, 0, Plan(), "test", logits=True)
    last = llama_cpp.llama_get_logits_ith(tapped.llama.ctx, -1)
    fourth = llama_cpp.llama_get_logits_ith(tapped.llama.ctx, 3)
    n = tapped.n_vocab
    assert np.array_equal(np.ctypeslib.as_array(last, (n,)), np.ctypeslib.as_array(fourth, (n,)))


def test_an_embedding_row_of_an_m_rope_model_has_four_positions_and_a_token_row_one(families):
    """(t, y, x, unused), section by section: text at (p, p, p, 0) is text at p."""
    llama = stock.load(families["qwen2vl"].text, False, n_threads=1)
    other = stock.load(families["qwen2vl"].text, False, n_threads=1)
    tokens, p = np.arange(6) + 260, np.arange(6)
    table = token_embeddings(families["qwen2vl"].text)[tokens]
    by_token = stock.decode(llama, tokens=tokens, positions=p)
    by_embedding = stock.decode(other, embeddings=table, positions=np.stack([p, p, p, 0 * p]))
    llama.close()
    other.close()
    assert np.array_equal(by_token, by_embedding)


def token_embeddings(path):
    from gguf import GGUFReader

    tensor = next(t for t in GGUFReader(str(path)).tensors if t.name == "token_embd.weight")
    return np.ascontiguousarray(tensor.data, np.float32)


def test_the_context_takes_its_callback_at_creation(families):
    """llama.cpp has no function that sets cb_eval later, so the context of a Llama is made anew."""
    assert not hasattr(llama_cpp, "llama_set_cb_eval") and not hasattr(llama_cpp, "llama_set_eval_callback")
    called = []
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(
        lambda *a: bool(called.append(1))
    )
    llama = stock.load(families["llama"].text, True, n_threads=1)
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.cb_eval = ctypes.cast(callback, llama_cpp.ggml_backend_sched_eval_callback)
    context = _internals.LlamaContext(model=llama._model, params=params, verbose=False)
    batch = _internals.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1, verbose=False)
    batch.set_batch(batch=[260], n_past=0, logits_all=False)
    context.decode(batch)
    batch.close()
    context.close()
    llama.close()
    assert called
