"""Names, order, operands and flags in the graphs of decoders: what csrc/llama_graph.h says of them."""

import ctypes
import itertools

import llama_cpp
import numpy as np
import pytest
from helpers import ggml_tensors as ggml
from helpers import stock
from helpers.graphs import N, Recorder, recorded

FLASH, SOFTMAX = "FLASH_ATTN_EXT", "SOFT_MAX"
COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE
kinds = pytest.mark.parametrize("flash", [False, True], ids=["softmax", "flash"])
archs = pytest.mark.parametrize("family", ["llama", "qwen2vl"])


def names(nodes):
    return [node.name for node in nodes]


def inputs(nodes):
    """Names of the leaves that nodes read."""
    return {s.name for node in nodes for s in node.sources if s is not None and s.op == "NONE"}


def index_of(nodes, name):
    assert name in names(nodes), f"no node is named {name}"
    return names(nodes).index(name)


@kinds
@archs
def test_layer_n_hands_its_state_on_as_l_out_n(decoder_graph, families, family, flash):
    nodes, shape = decoder_graph(family, flash), families[family].shape
    found = [node for node in nodes if node.name.startswith("l_out-")]
    assert names(found) == [f"l_out-{n}" for n in range(shape.n_layers)]
    assert all(node.ne == (shape.n_embd, N, 1, 1) and node.kind == 0 for node in found[:-1])  # 0: float32


@archs
def test_the_last_layer_keeps_only_rows_with_logits(decoder_graph, families, family):
    shape = families[family].shape
    nodes = decoder_graph(family)
    assert nodes[index_of(nodes, f"l_out-{shape.n_layers - 1}")].ne[:2] == (shape.n_embd, 1)


@archs
def test_nodes_that_layer_n_computes_are_named_with_n_at_the_end(decoder_graph, families, family):
    nodes = decoder_graph(family)
    ends = [index_of(nodes, f"l_out-{n}") for n in range(families[family].shape.n_layers)]
    for n, (first, last) in enumerate(itertools.pairwise(ends)):
        numbers = {name.rpartition("-")[2] for name in names(nodes[first + 1 : last + 1]) if "-" in name}
        assert str(n + 1) in numbers and str(n + 2) not in numbers


@archs
def test_the_batch_enters_as_inp_tokens_or_inp_embd_and_goes_on_as_embd(decoder_graph, family):
    for tokens in (True, False):
        nodes = decoder_graph(family, tokens=tokens)
        assert {"inp_tokens", "inp_embd"} & (inputs(nodes) | set(names(nodes)))
        assert "embd" in names(nodes) or "embd" in inputs(nodes), "what is chosen of the batch is not named embd"


@kinds
@archs
def test_positions_are_operand_1_of_every_rope_the_input_inp_pos_or_one_without_a_name(
    decoder_graph, families, family, flash
):
    ropes = [node for node in decoder_graph(family, flash) if node.op == "ROPE"]
    assert len(ropes) == 2 * families[family].shape.n_layers
    (name,) = {node.sources[1].name for node in ropes}
    assert name == "inp_pos" or name.startswith("leaf_")


@kinds
def test_the_graph_that_shifts_k_turns_views_of_the_cache_by_positions_without_a_name(plain, families, flash):
    recorder = Recorder()
    context = recorded(plain(flash=flash), recorder)
    memory = llama_cpp.llama_get_memory(context.ctx)
    stock.decode(context, tokens=np.arange(N) + 260, positions=np.arange(N))
    llama_cpp.llama_memory_seq_add(memory, 0, 4, -1, 2)
    recorder.nodes.clear()
    stock.decode(context, tokens=[260], positions=[N + 2])
    context.close()
    n_layers = families["llama"].shape.n_layers
    shifts = [node for node in recorder.nodes if node.op == "ROPE" and node.sources[0].name.startswith("cache_k_l")]
    assert len(shifts) == n_layers and not any(node.sources[1].name == "inp_pos" for node in shifts)
    ropes = [node for node in recorder.nodes if node.op == "ROPE" and node not in shifts]
    assert len(ropes) == 2 * n_layers


@kinds
def test_the_mask_is_the_input_attn_inp_kq_mask(decoder_graph, flash):
    nodes = decoder_graph(flash=flash)
    for node in nodes:
        if node.op in (FLASH, SOFTMAX):
            mask = node.sources[3 if node.op == FLASH else 1]
            assert mask is not None and mask.name.startswith("attn_inp_kq_mask"), "attention has another mask"
    assert "attn_inp_kq_mask" in inputs(nodes)


@kinds
@archs
def test_each_layer_has_one_attention_operation_in_the_order_of_layers(decoder_graph, families, family, flash):
    nodes, n_layers = decoder_graph(family, flash), families[family].shape.n_layers
    places = [i for i, node in enumerate(nodes) if node.op == (FLASH if flash else SOFTMAX)]
    outs = [index_of(nodes, f"l_out-{n}") for n in range(n_layers)]
    assert len(places) == n_layers
    assert np.less(places, outs).all() and np.less(outs[:-1], places[1:]).all()


@kinds
def test_the_k_cache_and_the_v_cache_of_layer_n_are_named_cache_k_ln_and_cache_v_ln(decoder_graph, families, flash):
    written = [node.view for node in decoder_graph(flash=flash) if node.op == "SET_ROWS"]
    n_layers = families["llama"].shape.n_layers
    bare = [name.partition(" ")[0] for name in written]
    assert bare == [f"cache_{which}_l{n}" for n in range(n_layers) for which in "kv"]


@kinds
def test_k_is_written_by_set_rows_from_one_int64_index_for_each_row(plain, flash):
    """And the index is the KV cell: the first rows of an empty cache go to its first cells."""
    found, recorder = [], Recorder()

    def look(tensor):
        if not tensor.src[1]:  # the view that attention reads has the same name
            return
        indices = tensor.src[1].contents
        values = (ctypes.c_int64 * indices.ne[0])()
        assert indices.ne[0] == N and ggml.nbytes(tensor.src[1]) == 8 * N
        ggml.get_bytes(tensor.src[1], values, 0, 8 * N)
        found.append(list(values))

    context = recorded(plain(flash=flash), recorder)
    stock.decode(context, tokens=np.arange(N) + 260, positions=np.arange(N))
    first_k = next(node for node in recorder.nodes if node.op == "SET_ROWS")
    recorder.on_ask[first_k.name] = look
    stock.clear(context)
    stock.decode(context, tokens=np.arange(N) + 260, positions=np.arange(N))
    context.close()
    assert not recorder.errors, recorder.errors
    assert found and found[0] == list(range(N))


@archs
def test_result_norm_comes_after_all_rope_and_attention(decoder_graph, family):
    nodes = decoder_graph(family)
    end = index_of(nodes, "result_norm")
    assert not [node for node in nodes[end:] if node.op in ("ROPE", FLASH, SOFTMAX, "SET_ROWS")]


def test_the_output_is_the_last_node(decoder_graph):
    assert decoder_graph()[-1].name == "result_output"


@kinds
def test_flash_attention_has_scale_bias_and_soft_cap_as_its_first_parameters(plain, flash):
    found, recorder = [], Recorder()
    context = recorded(plain(flash=flash), recorder)
    stock.decode(context, tokens=[260], positions=[0])
    name = recorder.of(FLASH, SOFTMAX)[0].name
    recorder.on_ask[name] = lambda t: found.append(np.frombuffer(bytes(t.op_params), np.float32)[:3])
    stock.decode(context, tokens=[260], positions=[1])
    context.close()
    n = 32  # head_dim of tests/helpers/models.py LLAMA
    expected = [1 / np.sqrt(np.float32(n)), 0, 0] if flash else [1 / np.sqrt(np.float32(n)), 0]
    assert found[0][: len(expected)] == pytest.approx(expected)


def test_nodes_that_are_computed_have_the_compute_flag(decoder_graph):
    assert all(node.flags & COMPUTE for node in decoder_graph() if node.name.startswith(("l_out-", "result_")))


FILL = np.full(256, 0.5, np.float32)


def state_of(tensor):
    got = np.empty(tensor.ne[0], np.float32)
    ggml.get_bytes(ctypes.byref(tensor), got.ctypes.data, 0, got.nbytes)
    return got


def skip(tensor):
    tensor.flags &= ~COMPUTE
    ggml.set_bytes(ctypes.byref(tensor), FILL.ctypes.data, 0, FILL.nbytes)


def put_back(tensor):
    tensor.flags |= COMPUTE


def test_a_node_without_the_compute_flag_is_not_computed_and_keeps_its_data(plain):
    recorder, states = Recorder(), []
    context = recorded(plain(), recorder)
    recorder.on_ask["l_out-1"], recorder.on_done["l_out-1"] = skip, lambda t: states.append(state_of(t))
    stock.decode(context, tokens=[260], positions=[0])
    recorder.on_ask["l_out-1"] = put_back
    stock.decode(context, tokens=[260], positions=[1])
    context.close()
    assert not recorder.errors and len(states) == 2, recorder.errors
    assert np.array_equal(states[0], FILL) and not np.array_equal(states[1], FILL)


def test_a_graph_is_used_again_for_a_batch_of_the_same_shape_with_its_flags_as_they_were_left(plain):
    """So whoever clears a flag has to set it again."""
    recorder, flags = Recorder(), []
    context = recorded(plain(), recorder)
    for i in range(6):
        recorder.nodes.clear()
        recorder.on_ask = {3: {"l_out-1": skip}, 5: {"l_out-1": put_back}}.get(i, {})
        stock.decode(context, tokens=[260], positions=[i])
        flags.append(next(node.flags & COMPUTE for node in recorder.nodes if node.name == "l_out-1"))
    n_reused = llama_cpp.llama_perf_context(context.ctx).n_reused
    context.close()
    assert n_reused >= 3, "llama.cpp builds a new graph for every decode"
    assert flags == [COMPUTE, COMPUTE, COMPUTE, COMPUTE, 0, 0]  # as they are asked about, before the hook changes them


def test_the_callback_is_asked_about_the_nodes_in_order_so_that_sources_come_first(decoder_graph):
    seen = set()
    for node in decoder_graph():
        assert all(s is None or s.op == "NONE" or s.name in seen for s in node.sources), node.name
        seen.add(node.name)
