"""The tap over graphs that run in several splits, on several backends: tensors made by hand in libggml, driven as the
scheduler does.
"""

import itertools

import cffi
import gguf
import numpy as np
import pytest

from star_edge.llamacpp.native import GGML, ffi, lib

TENSOR = """
typedef struct tensor {
    int type; void * buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t op_params[16]; int32_t flags;
    struct tensor * src[10]; struct tensor * view_src; size_t view_offs; void * data;
    char name[64]; void * extra; char padding[8];
} tensor;
typedef struct { size_t mem_size; void * mem_buffer; bool no_alloc; } init_params;
void * ggml_init(init_params);
void ggml_free(void *);
size_t ggml_tensor_overhead(void);
tensor * ggml_new_tensor_2d(void *, int, int64_t, int64_t);
tensor * ggml_set_name(tensor *, const char *);
tensor * ggml_add(void *, tensor *, tensor *);
tensor * ggml_scale(void *, tensor *, float);
tensor * ggml_concat(void *, tensor *, tensor *, int);
tensor * ggml_rope(void *, tensor *, tensor *, int, int);
tensor * ggml_set_rows(void *, tensor *, tensor *, tensor *);
tensor * ggml_mul_mat(void *, tensor *, tensor *);
tensor * ggml_view_3d(void *, tensor *, int64_t, int64_t, int64_t, size_t, size_t, size_t);
tensor * ggml_soft_max_ext(void *, tensor *, tensor *, float, float);
tensor * ggml_new_tensor_3d(void *, int, int64_t, int64_t, int64_t);
tensor * ggml_new_tensor_1d(void *, int, int64_t);
void * ggml_backend_cpu_buffer_type(void);
void * ggml_backend_alloc_ctx_tensors_from_buft(void *, void *);
void ggml_backend_buffer_free(void *);
"""
F32, I32, I64 = (
    int(kind) for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.I64)
)
COMPUTE, INPUT = 16, 1  # enum ggml_tensor_flag
OBJECT_SIZE = 32


class Graph:
    """Tensors made by libggml-base, and the scheduler's loop over them with a tap for its callback. Nothing is
    computed.
    """

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
        make = {1: self.ggml.ggml_new_tensor_1d, 2: self.ggml.ggml_new_tensor_2d, 3: self.ggml.ggml_new_tensor_3d}[
            len(shape)
        ]
        return self.ggml.ggml_set_name(make(self.context, kind, *shape), name.encode())

    def input(self, name, *shape):
        tensor = self.leaf(name, *shape)
        tensor.flags |= INPUT
        return tensor

    def node(self, name, tensor):
        tensor.flags |= COMPUTE
        return self.ggml.ggml_set_name(tensor, name.encode())

    def add(self, name, a, b):
        return self.node(name, self.ggml.ggml_add(self.context, a, b))

    def allocate(self):
        self.buffer = self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(
            self.context, self.ggml.ggml_backend_cpu_buffer_type()
        )
        assert self.buffer

    def values(self, tensor, kind=np.float32):
        """The tensor's memory as an array that can be written."""
        n = int(np.prod([tensor.ne[i] for i in range(4)]))
        return np.frombuffer(self.ffi.buffer(self.ffi.cast("char *", tensor.data), 4 * n), kind)

    def call(self, tensor, ask):
        return lib.se_tap_callback(
            ffi.cast("struct ggml_tensor *", int(self.ffi.cast("uintptr_t", tensor))), ask, self.tap
        )

    def run(self, splits):
        """Names of the nodes that a backend would compute. A split is a list of nodes, or a callable: a copy between
        backends.
        """
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


@pytest.mark.parametrize("embedding", ["inp_embd", "inp_tokens", "any.name", "CUDA1#any.name#3"])
def test_dependents_are_skipped_across_backends(graph, embedding):
    """scaled is made of the embeddings before any layer, and runs. Layer 0 makes a of it and b of a copy of a on
    another backend: they are skipped. side does not depend on them."""
    g = graph
    x, weight = g.leaf(embedding, 8, 4) if "#" in embedding else g.input(embedding, 8, 4), g.leaf("blk.0.weight", 8, 4)
    copy, copied_weight = g.leaf("CUDA0#a-0#0", 8, 4), g.leaf("CUDA0#blk.1.weight#0", 8, 4)
    scaled = g.add("scaled", x, weight)
    a, side = g.add("a-0", scaled, weight), g.add("side", weight, weight)
    near = g.leaf("CUDA0#a-00#0", 8, 4)  # no node has this name
    b, other = g.add("node_7", copy, copied_weight), g.add("other", copied_weight, near)
    out = g.add("l_out-0", b, side)
    after = g.add("after", out, side)
    g.allocate()
    inject = np.arange(32, dtype=np.float32)
    assert (
        g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
        == lib.SE_OK
    )
    assert g.run([[scaled, a, side], [b, other, out, after]]) == ["scaled", "side", "other", "after"]
    assert np.array_equal(g.values(out), inject)
    skipped = [a, b, out]
    assert not any(t.flags & COMPUTE for t in skipped)
    result = g.finish()
    assert (result.error, result.n_skipped, result.n_graphs) == (lib.SE_OK, 3, 1)
    assert all(t.flags & COMPUTE for t in (scaled, a, side, b, other, out, after))
    idle = ["scaled", "a-0", "side", "node_7", "other", "l_out-0", "after"]
    assert g.run([[scaled, a, side], [b, other, out, after]]) == idle


def test_nodes_that_were_off_stay_off(graph):
    """A node without the flag (the unused branch of a select) is not given one by the restoring."""
    g = graph
    x = g.input("inp_embd", 8, 4)
    unused, used = g.add("unused-0", x, x), g.add("used-0", x, x)
    unused.flags = 0
    out = g.add("l_out-0", used, x)
    g.allocate()
    inject = np.ones(32, np.float32)
    assert (
        g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
        == lib.SE_OK
    )
    assert g.run([[unused, used, out]]) == []
    assert g.finish().n_skipped == 2
    assert unused.flags == 0 and used.flags == out.flags == COMPUTE


def test_a_stop_ends_every_later_split(graph):
    """The graph ends at the second attention. The first node of a later split is skipped too: in a hybrid decoder it
    may write the recurrent state of a layer that has not been reached, from memory that nobody has filled.
    """
    g = graph
    x = g.input("inp_embd", 8, 4, 2)
    nodes = [g.add("k", x, x)]
    for i in range(3):
        nodes.append(g.node(f"attention {i}", g.ggml.ggml_soft_max_ext(g.context, nodes[-1], g.ffi.NULL, 1.0, 0.0)))
        nodes.append(g.add(f"l_out-{i}", nodes[-1], x))
    tails = [[g.add(f"far {i}", x, x), g.add(f"farther {i}", x, x)] for i in range(2)]
    g.allocate()
    assert g.arm(n_layer=3, first=0, last=1, n_rows=4) == lib.SE_OK
    assert g.run([nodes, *tails]) == ["k", "attention 0", "l_out-0", "attention 1"]
    result = g.finish()
    assert (result.error, result.stopped, result.n_attention, result.flash, result.last_unmasked) == (
        lib.SE_OK,
        1,
        2,
        0,
        1,
    )
    assert all(t.flags & COMPUTE for t in itertools.chain(nodes, *tails))


def test_a_second_graph_is_noticed(graph):
    g = graph
    x = g.input("inp_embd", 8, 4)
    nodes = [g.add("a", x, x), g.add("l_out-0", x, x)]
    nodes.append(g.add("b", nodes[-1], nodes[-1]))
    g.allocate()
    inject = np.ones(32, np.float32)
    assert (
        g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
        == lib.SE_OK
    )
    g.run([nodes])
    g.run([nodes])
    result = g.finish()
    assert (result.error, result.n_graphs) == (lib.SE_ERR_SEVERAL_GRAPHS, 2)
    assert all(t.flags & COMPUTE for t in nodes)


def test_only_whole_layer_names_count(graph):
    """l_out-0 (view), l_out--1 and l_out-x are no layer outputs."""
    g = graph
    x = g.input("inp_embd", 8, 4)
    nodes = [g.add(name, x, x) for name in ("l_out-0 (view)", "l_out-x", "l_out-", "l_out--0x", "xl_out-0")]
    g.allocate()
    inject = np.ones(32, np.float32)
    assert (
        g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
        == lib.SE_OK
    )
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


@pytest.mark.parametrize("cls", ["v.class_embd", "CUDA0#v.class_embd#0"])
@pytest.mark.parametrize("place", ["first", "last", "nowhere"])
@pytest.mark.parametrize("order", ["joined first", "input first"])
def test_where_a_leaf_is_joined(graph, order, place, cls):
    """Vulkan, Metal and CUDA order nodes by themselves: what reads `positions` may come before the CONCAT, and gets the
    new ones all the same.
    """
    g = graph
    patches, other = g.leaf("patches", 8, 4), g.leaf("other" if place == "nowhere" else cls, 8, 1)
    joined = g.node(
        "joined", g.ggml.ggml_concat(g.context, *((other, patches) if place == "first" else (patches, other)), 1)
    )
    positions, table = g.leaf("positions", 8, 5), g.leaf("table", 8, 5)
    gathered = g.add("gathered", table, positions)
    use = g.add("use", joined, gathered)
    g.allocate()
    new = np.arange(40, dtype=np.float32)
    assert lib.se_tap_find_concat(g.tap, b"v.class_embd") == lib.SE_OK
    nodes = [joined, gathered, use] if order == "joined first" else [gathered, joined, use]
    want = {"nowhere": lib.SE_CONCAT_NONE, "first": lib.SE_CONCAT_FIRST, "last": lib.SE_CONCAT_LAST}[place]
    assert g.arm(count_only=1) == lib.SE_OK
    assert g.run([nodes[:1], nodes[1:]]) == []
    result = g.finish()
    assert (result.error, result.concat, result.n_skipped) == (lib.SE_OK, want, 3)
    assert lib.se_tap_set_input(g.tap, b"positions", ffi.cast("void *", new.ctypes.data), new.nbytes) == lib.SE_OK
    for _ in range(2):
        g.values(positions)[:] = 7
        assert g.arm() == lib.SE_OK
        assert len(g.run([nodes[:1], nodes[1:]])) == 3
        assert g.finish().concat == want
        assert np.array_equal(g.values(positions), new)
    assert lib.se_tap_find_concat(g.tap, ffi.NULL) == lib.SE_OK
    assert g.arm() == lib.SE_OK
    g.run([nodes])
    assert g.finish().concat == lib.SE_CONCAT_NONE
    assert lib.se_tap_find_concat(g.tap, b"x" * 64) == lib.SE_ERR_ARGUMENT


@pytest.mark.parametrize("order", ["as built", "v last", "v after other work"])
def test_the_graph_does_not_end_before_v_is_in_the_cache(graph, order):
    """Without flash attention nothing but the product with the probabilities needs V: a backend may write it after the
    SOFT_MAX that ends the window, and later decodes read it."""
    g, n = graph, 4
    x, rows = g.input("inp_embd", 8, n), g.leaf("rows", n, kind=I64)
    write = lambda name, cache, value: g.node(name, g.ggml.ggml_set_rows(g.context, cache, value, rows))
    layers = []
    for i in range(3):
        k_cache, v_cache = (g.leaf(f"cache_{name}_l{i}", 8, 16) for name in "kv")
        k, v, q = (g.add(f"{name}cur-{i}", x, x) for name in "kvq")
        wrote_k, wrote_v = write(f"wrote k {i}", k_cache, k), write(f"wrote v {i}", v_cache, v)
        seen = g.ggml.ggml_view_3d(g.context, k_cache, 8, 16, 1, k_cache.nb[1], k_cache.nb[2], 0)
        kq = g.node(f"kq-{i}", g.ggml.ggml_mul_mat(g.context, seen, q))
        soft_max = g.node(
            f"soft max {i}", g.ggml.ggml_soft_max_ext(g.context, kq, g.leaf(f"mask {i}", 16, n), 1.0, 0.0)
        )
        out = g.add(f"l_out-{i}", x, x)
        nodes = {
            "as built": [q, v, k, wrote_k, wrote_v, kq, soft_max, out],
            "v last": [q, k, wrote_k, kq, soft_max, v, wrote_v, out],
            "v after other work": [q, k, wrote_k, kq, soft_max, g.add(f"other-{i}", x, x), v, wrote_v, out],
        }[order]
        layers.append(nodes)
        x = out
    g.allocate()
    assert g.arm(n_layer=3, first=0, last=1, n_rows=n) == lib.SE_OK
    computed = g.run([list(itertools.chain.from_iterable(layers))])
    result = g.finish()
    assert (result.error, result.stopped) == (lib.SE_OK, 1)
    assert {"wrote k 1", "wrote v 1", "soft max 1"} <= set(computed)
    assert not {"l_out-1", "wrote k 2", "soft max 2"} & set(computed)


@pytest.mark.parametrize("where", ["after", "before"])
def test_what_a_later_layer_makes_of_the_embeddings_runs_wherever_it_comes(graph, where):
    """Gemma 4's layers take a slice of what was made of the embeddings at the start: it depends on no layer, and may be
    moved to the front.
    """
    g = graph
    x, w = g.input("inp_embd", 8, 4), g.leaf("w", 8, 4)
    prelude = g.add("inp_per_layer", x, w)
    early, inner = g.add("slice-0", prelude, w), g.add("inner-0", x, w)
    out, late = g.add("l_out-0", inner, early), g.add("slice-1", prelude, w)
    use = g.add("use-1", out, late)
    g.allocate()
    inject = np.ones(32, np.float32)
    assert (
        g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
        == lib.SE_OK
    )
    nodes = [prelude, early, late, inner, out, use] if where == "before" else [prelude, early, inner, out, late, use]
    assert g.run([nodes]) == ["inp_per_layer", "slice-1", "use-1"]
    assert g.finish().error == lib.SE_OK


@pytest.mark.parametrize("order", ["original first", "copy first", "two copies"])
def test_position_shift_acts_once_across_backends(graph, order):
    """The scheduler copies an input when a split begins: after the original's first RoPE, the copy carries the shift
    already.
    """
    g = graph
    original, copies = g.leaf("inp_pos", 3, kind=I32), [g.leaf(f"CUDA{i}#inp_pos#0", 3, kind=I32) for i in range(2)]
    x = g.leaf("x", 8, 1, 3)
    rope = lambda name, positions: g.node(name, g.ggml.ggml_rope(g.context, x, positions, 8, 0))
    here, again, there, far = rope("q", original), rope("q2", original), rope("q3", copies[0]), rope("q4", copies[1])
    there_again = rope("q5", copies[0])
    g.allocate()
    numbers = lambda t: g.values(t, np.int32)

    def copy(i):
        def act():
            numbers(copies[i])[:] = numbers(original)

        return act

    splits = {
        "original first": [[here], copy(0), [there], [again], copy(1), [far]],
        "copy first": [copy(0), [there], [here], copy(1), [far], [again]],
        "two copies": [copy(0), [there], copy(1), [far], [here], [there_again]],
    }[order]
    lib.se_tap_set_position_shift(g.tap, 10, 5)
    for _ in range(2):
        numbers(original)[:] = [9, 10, 11]
        lib.se_tap_begin(g.tap)
        g.run(splits)
        for t in (original, *copies):
            assert numbers(t).tolist() == [9, 15, 16]


@pytest.mark.parametrize("order", ["original first", "copy first"])
def test_cell_bias_acts_once_across_backends(graph, order):
    g = graph
    mask, copy, kq = g.leaf("attn_inp_kq_mask", 4, 2), g.leaf("CUDA0#attn_inp_kq_mask#0", 4, 2), g.leaf("kq", 4, 2, 2)
    attend = lambda name, m: g.node(name, g.ggml.ggml_soft_max_ext(g.context, kq, m, 1.0, 0.0))
    here, there, again = attend("a", mask), attend("b", copy), attend("c", mask)
    g.allocate()

    def to_device():
        g.values(copy)[:] = g.values(mask)

    bias = np.array([0, 2, 3], np.float32)
    lib.se_tap_set_cell_bias(g.tap, ffi.cast("float *", bias.ctypes.data), 3)
    g.values(mask)[:] = [0, 0, -np.inf, 0, 0, 0, 0, -np.inf]
    g.run([[here], to_device, [there], [again]] if order == "original first" else [to_device, [there], [here], [again]])
    for t in (mask, copy):
        assert g.values(t).tolist() == [0, 2, -np.inf, 0, 0, 2, 3, -np.inf]


def test_later_layers_may_read_the_input_again(graph):
    """Gemma 3n and 4 give every layer a slice of a tensor made from the embeddings at the start, Qwen3-VL adds slices
    of the rows: those run. What reads something else of a skipped layer than its hidden state is noticed."""
    g = graph
    x, w = g.input("inp_embd", 8, 4), g.leaf("w", 8, 4)
    per_layer = g.add("inp_per_layer", x, w)
    inner = g.add("inner-0", x, w)
    out = g.add("l_out-0", inner, per_layer)
    copy, copied_inner = g.leaf("CUDA0#inp_per_layer#0", 8, 4), g.leaf("CUDA0#inner-0#0", 8, 4)
    good = [g.add("plane-0", out, x), g.add("slice-1", out, per_layer), g.add("elsewhere-1", out, copy)]
    bad = [g.add("skip-1", out, inner), g.add("skip-2", out, copied_inner)]
    g.allocate()
    inject = np.ones(32, np.float32)
    arm = lambda: g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
    assert arm() == lib.SE_OK
    assert g.run([[per_layer, inner, out, *good]]) == ["inp_per_layer", "plane-0", "slice-1", "elsewhere-1"]
    assert g.finish().error == lib.SE_OK
    for node in bad:
        assert arm() == lib.SE_OK
        g.run([[per_layer, inner, out, *good, node]])
        assert g.finish().error == lib.SE_ERR_LATE_INPUT


def test_a_copy_is_of_the_last_node_of_its_name(graph):
    """A view of an unnamed tensor is called " (view)" in every layer (LFM2's state). In the window a copy of that name
    is of the window's own; before there was one it is of a skipped layer's.
    """
    g = graph
    x, w = g.input("inp_embd", 8, 4), g.leaf("w", 8, 4)
    inner = g.add("inner-0", x, w)
    early = g.add(" (view)", inner, w)
    out = g.add("l_out-0", inner, w)
    own = g.add(" (view)", out, w)
    copy, copied_inner = g.leaf("CPU# (view)#0", 8, 4), g.leaf("CPU#inner-0#0", 8, 4)
    state, bad = g.add("state-1", copy, w), g.add("bad-1", copied_inner, w)
    g.allocate()
    inject = np.ones(32, np.float32)
    for window, computed, error in (
        ([own, state], [" (view)", "state-1"], lib.SE_OK),
        ([state, own], ["state-1", " (view)"], lib.SE_ERR_LATE_INPUT),
        ([own, state, bad], [" (view)", "state-1", "bad-1"], lib.SE_ERR_LATE_INPUT),
    ):
        armed = g.arm(n_layer=2, first=1, last=2, n_rows=4, n_embd=8, inject=ffi.cast("float *", inject.ctypes.data))
        assert armed == lib.SE_OK
        assert g.run([[inner, early, out], window[:1], window[1:]]) == computed
        assert g.finish().error == error


def test_memory_that_is_cleared_by_multiplication(graph):
    """0 times a NaN is a NaN: a leaf that is scaled by 0 is cleared, one that is scaled by anything else and a node's
    result are left alone.
    """
    g = graph
    unwritten, used, x = g.leaf("leaf_1", 8, 4), g.leaf("leaf_2", 8, 4), g.leaf("x", 8, 4)
    made = g.add("made", x, x)
    cleared = g.node("cleared", g.ggml.ggml_scale(g.context, unwritten, 0.0))
    scaled = g.node("scaled", g.ggml.ggml_scale(g.context, used, 0.5))
    of_node = g.node("of_node", g.ggml.ggml_scale(g.context, made, 0.0))
    g.allocate()
    for tensor in (unwritten, used, made):
        g.values(tensor)[:] = np.nan
    graph_of = [[made, cleared, scaled, of_node]]
    assert g.arm() == lib.SE_OK
    assert g.run(graph_of) == ["made", "cleared", "scaled", "of_node"]
    assert g.finish().error == lib.SE_OK
    assert not g.values(unwritten).any()
    assert np.isnan(g.values(used)).all() and np.isnan(g.values(made)).all()
