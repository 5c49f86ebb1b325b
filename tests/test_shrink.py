"""Shapes of a graph that rows have left, against those that ggml itself gives to a graph with as many rows.

Each graph is built twice by libggml: with all rows and with fewer. The tap goes over the first, as the scheduler does;
what it makes of each shape must be what ggml gave the second. Nothing is computed here.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p

import numpy as np
import pytest
from helpers.ggml_tensors import Tensor, op_name

from star_edge.llamacpp.native import GGML, ffi, lib

F32, F16, I32 = 0, 1, 26
INPUT, COMPUTE = 1, 16
T = POINTER(Tensor)


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def function(name, result, *arguments):
    f = getattr(ctypes.CDLL(GGML._name), name)  # a handle of its own: others may have declared the function otherwise
    f.restype, f.argtypes = result, list(arguments)
    return f


L, V = c_int64, c_void_p
FUNCTIONS = {
    "new": ("ggml_new_tensor_4d", T, V, c_int, L, L, L, L),
    "norm": ("ggml_norm", T, V, T, c_float),
    "add": ("ggml_add", T, V, T, T),
    "mul": ("ggml_mul", T, V, T, T),
    "gelu": ("ggml_gelu", T, V, T),
    "scale": ("ggml_scale", T, V, T, c_float),
    "matmul": ("ggml_mul_mat", T, V, T, T),
    "reshape": ("ggml_reshape_4d", T, V, T, L, L, L, L),
    "cont": ("ggml_cont", T, V, T),
    "cont_as": ("ggml_cont_4d", T, V, T, L, L, L, L),
    "cast": ("ggml_cast", T, V, T, c_int),
    "permute": ("ggml_permute", T, V, T, c_int, c_int, c_int, c_int),
    "transpose": ("ggml_transpose", T, V, T),
    "view": ("ggml_view_4d", T, V, T, L, L, L, L, c_size_t, c_size_t, c_size_t, c_size_t),
    "softmax": ("ggml_soft_max_ext", T, V, T, T, c_float, c_float),
    "flash": ("ggml_flash_attn_ext", T, V, T, T, T, T, c_float, c_float, c_float),
    "get_rows": ("ggml_get_rows", T, V, T, T),
    "concat": ("ggml_concat", T, V, T, T, c_int),
    "pool": ("ggml_pool_2d", T, V, T, c_int, c_int, c_int, c_int, c_int, c_float, c_float),
    "rope": ("ggml_rope", T, V, T, T, c_int, c_int),
    "glu": ("ggml_geglu_split", T, V, T, T),
    "halves": ("ggml_geglu", T, V, T),
    "repeat": ("ggml_repeat", T, V, T, T),
    "pad": ("ggml_pad", T, V, T, c_int, c_int, c_int, c_int),
}
FUNCTIONS = {name: function(*signature) for name, signature in FUNCTIONS.items()}
init = function("ggml_init", c_void_p, InitParams)
free = function("ggml_free", None, c_void_p)
set_name = function("ggml_set_name", T, T, c_char_p)
cpu = function("ggml_backend_cpu_buffer_type", c_void_p)
allocate = function("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
free_buffer = function("ggml_backend_buffer_free", None, c_void_p)


class Graph:
    """Nodes by ggml's functions, in the order of their making: g.norm(x, 1e-6), g.add(x, y), ..."""

    def __init__(self):
        self.context = init(InitParams(1 << 18, None, True))
        self.nodes, self.buffer = [], None

    def __getattr__(self, name):
        def make(*arguments, name_=None):
            node = FUNCTIONS[name](self.context, *arguments)
            if not node.contents.src[0]:
                return node
            node.contents.flags |= COMPUTE
            set_name(node, (name_ or f"node_{len(self.nodes)}").encode())
            self.nodes.append(node)
            return node

        return make

    def leaf(self, name, *shape, kind=F32, flags=0):
        leaf = FUNCTIONS["new"](self.context, kind, *shape, *[1] * (4 - len(shape)))
        leaf.contents.flags |= flags
        return set_name(leaf, name.encode())

    def allocate(self):
        self.buffer = allocate(self.context, cpu())
        assert self.buffer

    def close(self):
        if self.buffer:
            free_buffer(self.buffer)
        free(self.context)


@pytest.fixture
def graph():
    made = []

    def get():
        made.append(Graph())
        return made[-1]

    yield get
    for g in made:
        g.close()


@pytest.fixture
def tap():
    tap = lib.se_tap_new()
    yield tap
    lib.se_tap_free(tap)


def call(tap, node, asking):
    return lib.se_tap_callback(ffi.cast("struct ggml_tensor *", ctypes.cast(node, c_void_p).value), asking, tap)


def go(tap, g, keep, rehearsal=None):
    """One encode as the scheduler runs it, or its rehearsal; (se_result, shapes of all nodes when it is over)."""
    rows = np.asarray(keep, np.int32)
    p = ffi.new("se_plan *")
    p.keep, p.n_keep, p.keep_layer = ffi.cast("int32_t *", rows.ctypes.data), len(rows), 1
    p.count_only = rehearsal is None
    if rehearsal is not None:
        p.keep_node, p.n_nodes = rehearsal.keep_node, rehearsal.n_nodes
    assert lib.se_tap_arm(tap, p) == lib.SE_OK
    seen = {}
    for i, node in enumerate(g.nodes):
        wants = call(tap, node, True)
        seen[i] = shape(node)  # what a backend would compute
        if wants and not call(tap, node, False):
            break
    shapes = [shape(node) for node in g.nodes]
    result = ffi.new("se_result *")
    lib.se_tap_finish(tap, result)
    return result, seen, shapes


def shape(node):
    t = node.contents
    return tuple(t.ne), tuple(t.nb)


def strides_that_count(shape):
    ne, nb = shape
    return ne, tuple(b for n, b in zip(ne, nb) if n > 1)


def check_like_fewer(graph, tap, build, n, keep):
    """build(g, n) makes a graph of n rows, which may leave at its node layer_out-0."""
    full, fewer = graph(), graph()
    build(full, n)
    build(fewer, len(keep))
    full.allocate()
    built = [shape(node) for node in full.nodes]
    rehearsal, seen, after = go(tap, full, keep)
    assert rehearsal.error == lib.SE_OK and after == built  # nothing is set
    assert (rehearsal.n_nodes, rehearsal.n_rows) == (len(full.nodes), n)
    assert rehearsal.n_out == fewer.nodes[-1].contents.ne[1]
    result, seen, after = go(tap, full, keep, rehearsal)
    assert result.error == lib.SE_OK and not result.stopped
    start = rehearsal.keep_node  # nodes before it are as they were, and so is it when it is asked about
    for i in range(start, len(full.nodes)):
        want = shape(fewer.nodes[i])
        assert strides_that_count(seen[i]) == strides_that_count(want), op_name(full.nodes[i].contents.op)
    assert after[-1] == built[-1]  # clip_encode compares it
    return full


# ---- graphs that can have fewer rows ----


def rows(g, n):
    """The node at which rows leave: (8, n)."""
    x = g.leaf("x", 8, n)
    return g.add(x, x, name_="layer_out-0")


def attend(g, x, n, flash, fused):
    """Attention of 2 heads of 4, as clip_graph::build_vit and build_attn write it down."""
    if fused:
        w = g.leaf("qkv", 8, 24)
        y = g.matmul(w, x)
        q, k, v = (g.view(y, 4, 2, n, 1, 16, 96, 96 * n, 32 * i) for i in range(3))
    else:
        q, k, v = (g.reshape(g.matmul(g.leaf(f"w{i}", 8, 8), x), 4, 2, n, 1) for i in "qkv")
    q, k = g.permute(q, 0, 2, 1, 3), g.permute(k, 0, 2, 1, 3)
    if flash:
        v = g.cast(g.permute(v, 0, 2, 1, 3), F16)
        y = g.flash(q, g.cast(k, F16), v, None, 0.5, 0.0, 0.0)
        return g.reshape(y, 8, n, 1, 1)
    v = g.cont(g.permute(v, 1, 2, 0, 3))
    weights = g.softmax(g.matmul(k, q), None, 0.5, 0.0)
    return g.cont_as(g.permute(g.matmul(v, weights), 0, 2, 1, 3), 8, n, 1, 1)


def layer(flash, fused):
    def build(g, n):
        x = rows(g, n)
        h = g.add(g.mul(g.norm(x, 1e-6), g.leaf("w", 8)), g.leaf("b", 8))
        x = g.add(attend(g, h, n, flash, fused), x)
        up, gate = (g.matmul(g.leaf(name, 8, 16), x) for name in ("up", "gate"))
        g.add(g.matmul(g.leaf("down", 16, 8), g.glu(gate, up)), x)

    return build


def shuffle(g, n):
    """Squares of 2 x 2 in a raster 4 wide (clip_graph::build_patch_merge_permute)."""
    high = n // 4
    x = g.reshape(g.reshape(rows(g, n), 8, 4, high, 1), 16, 2, high, 1)
    x = g.cont_as(g.permute(x, 0, 2, 1, 3), 32, high // 2, 2, 1)
    g.matmul(g.leaf("w", 32, 5), g.cont_as(g.permute(x, 0, 2, 1, 3), 32, n // 4, 1, 1))


def average(g, n):
    """Squares of 2 x 2 in a raster 4 wide (clip_graph_siglip::build, gemma3)."""
    x = g.cont_as(g.transpose(rows(g, n)), 4, n // 4, 8, 1)
    x = g.pool(x, 1, 2, 2, 2, 2, 0.0, 0.0)
    x = g.cont(g.transpose(g.reshape(x, n // 4, 8, 1, 1)))
    g.mul(g.norm(x, 1e-6), g.leaf("w", 8))


def without_last(g, n):
    """CLS goes at the end (clip_graph_internvl::build)."""
    g.gelu(g.cont(g.view(rows(g, n), 8, n - 1, 1, 1, 32, 32 * n, 32 * n, 0)))


def without_first(g, n):
    g.gelu(g.cont(g.view(rows(g, n), 8, n - 1, 1, 1, 32, 32 * n, 32 * n, 32)))


def part_of_each_head(g, n):
    """A window into (4, n, 2), whose heads are as far apart as there are rows."""
    x = g.cont(g.permute(g.reshape(rows(g, n), 4, 2, n, 1), 0, 2, 1, 3))
    g.gelu(g.cont(g.view(x, 2, n, 2, 1, 16, 16 * n, 32 * n, 8)))


def viewed_whole(g, n):
    """Four rows as one, each normalized for itself, and as one again (clip_graph_kimik25::build)."""
    x = g.cont_as(rows(g, n), 32, n // 4, 1, 1)
    x = g.norm(g.view(x, 8, n, 1, 1, 32, 32 * n, 32 * n, 0), 1e-5)
    g.gelu(g.view(x, 32, n // 4, 1, 1, 128, 32 * n, 32 * n, 0))


def parts_of_parts(g, n):
    """Halves of queries and keys, which are parts of a row, each for itself and joined (clip_graph::build_rope_2d)."""
    y = g.matmul(g.leaf("qkv", 8, 24), rows(g, n))
    for start in (0, 32):
        part = g.view(y, 4, 2, n, 1, 16, 96, 96 * n, start)
        first, second = (g.norm(g.view(part, 2, 2, n, 1, 16, 96, 96 * n, half), 1e-6) for half in (0, 8))
        g.concat(first, second, 0)


def stacked(g, n):
    x = rows(g, n)
    g.concat(x, g.scale(x, 2.0), 0)


def halves(g, n):
    g.halves(rows(g, n))


BUILDS = {
    **{f"{'flash' if f else 'softmax'}{' fused' * u}": layer(f, u) for f in (False, True) for u in (False, True)},
    **{
        b.__name__: b
        for b in (
            shuffle,
            average,
            without_last,
            without_first,
            part_of_each_head,
            viewed_whole,
            parts_of_parts,
            stacked,
            halves,
        )
    },
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("n_keep", [4, 8, 12, 20])
def test_shapes_are_those_of_a_graph_with_fewer_rows(graph, tap, name, n_keep):
    if name in ("shuffle", "average"):
        n_keep = max(8, n_keep // 8 * 8)  # two rows of the raster
    keep = np.random.default_rng(n_keep).permutation(24)[:n_keep]
    check_like_fewer(graph, tap, BUILDS[name], 24, keep)


# ---- what rows and index inputs hold ----


def memory(tensor, n, kind=np.float32):
    address = tensor.contents.data
    return np.frombuffer((ctypes.c_char * (4 * n)).from_address(address), kind)


def test_rows_that_stay_come_first_in_their_new_order(graph, tap):
    keep = [5, 0, 3]
    g = graph()
    x = rows(g, 6)
    g.gelu(x)
    g.allocate()
    values = memory(x, 48)
    values[:] = np.arange(48)
    before = values.reshape(6, 8).copy()
    rehearsal, _, _ = go(tap, g, keep)
    assert np.array_equal(values.reshape(6, 8), before)
    go(tap, g, keep, rehearsal)
    assert np.array_equal(values.reshape(6, 8)[:3], before[keep])


def test_row_numbers_become_those_of_the_same_rows(graph, tap):
    """LLaVA's input `patches`; here row 2 is asked for twice, and row 1, which goes."""
    g = graph()
    index = g.leaf("patches", 6, kind=I32, flags=INPUT)
    x = rows(g, 6)
    g.gelu(g.get_rows(x, index))
    g.allocate()
    memory(index, 6, np.int32)[:] = [0, 2, 1, 5, 2, 4]
    rehearsal, _, _ = go(tap, g, [5, 2, 4])
    assert (rehearsal.error, rehearsal.n_out) == (lib.SE_OK, 4)
    result, seen, _ = go(tap, g, [5, 2, 4], rehearsal)
    assert result.error == lib.SE_OK and seen[1][0][:2] == (8, 4) and index.contents.ne[0] == 4
    assert memory(index, 4, np.int32).tolist() == [1, 0, 1, 2]


def test_positions_become_those_of_the_rows_that_stay(graph, tap):
    """Gemma 4's inputs `pos_x` and `pos_y`, which layers before have read whole."""
    g = graph()
    position = g.leaf("pos_x", 6, kind=I32, flags=INPUT)
    before = g.rope(g.leaf("q", 4, 2, 6), position, 4, 0)
    x = rows(g, 6)
    q = g.reshape(x, 4, 2, 6, 1)
    g.cont_as(g.rope(g.rope(q, position, 4, 0), position, 4, 0), 8, 6, 1, 1)
    g.allocate()
    memory(position, 6, np.int32)[:] = [10, 11, 12, 13, 14, 15]
    rehearsal, _, _ = go(tap, g, [5, 2, 4])
    assert rehearsal.error == lib.SE_OK and memory(position, 6, np.int32).tolist() == [10, 11, 12, 13, 14, 15]
    _, seen, _ = go(tap, g, [5, 2, 4], rehearsal)
    assert memory(position, 3, np.int32).tolist() == [15, 12, 14] and position.contents.ne[0] == 3
    assert shape(before)[0] == (4, 2, 6, 1) and seen[len(g.nodes) - 2][0] == (4, 2, 3, 1)


def test_a_weight_is_never_written(graph, tap):
    """Numbers in a tensor that is no input of the graph would be wrong in the next one."""
    g = graph()
    index = g.leaf("indices.weight", 6, kind=I32)
    x = rows(g, 6)
    g.get_rows(x, index)
    g.allocate()
    memory(index, 6, np.int32)[:] = np.arange(6)
    result, _, _ = go(tap, g, [5, 2, 4])
    assert result.error == lib.SE_ERR_ROWS and memory(index, 6, np.int32).tolist() == list(range(6))


# ---- graphs that cannot ----


def add_positions(g, n):
    g.add(rows(g, n), g.leaf("positions", 8, n))  # one for each of all rows


def mix_rows(g, n):
    g.matmul(g.leaf("w", n, 3), g.cont(g.transpose(rows(g, n))))


def periodic(g, n):
    g.add(rows(g, n), g.leaf("positions", 8, n // 4))  # every fourth row has the same


def masked(g, n):
    x = rows(g, n)
    g.softmax(g.matmul(x, x), g.leaf("mask", n, n), 1.0, 0.0)


def masked_flash(g, n):
    x = g.reshape(rows(g, n), 8, n, 1, 1)
    k = g.cast(x, F16)
    g.flash(x, k, k, g.leaf("mask", n, n, kind=F16), 1.0, 0.0, 0.0)


def unknown(g, n):
    g.pad(rows(g, n), 0, 1, 0, 0)


def repeated(g, n):
    g.repeat(rows(g, n), g.leaf("shape", 8, 2 * n))


def joined_to_cls(g, n):
    g.concat(rows(g, n), g.leaf("v.class_embd", 8, 1), 1)


def norm_over_rows(g, n):
    g.norm(g.cont(g.transpose(rows(g, n))), 1e-6)


def overlapping(g, n):
    g.pool(g.cont_as(g.transpose(rows(g, n)), 4, n // 4, 8, 1), 1, 2, 2, 2, 1, 0.0, 0.0)


def padded(g, n):
    g.pool(g.cont_as(g.transpose(rows(g, n)), 4, n // 4, 8, 1), 1, 2, 2, 2, 2, 1.0, 1.0)


def padded_alike(g, n):
    """As many windows as without padding, which begin elsewhere."""
    g.pool(g.cont_as(g.transpose(rows(g, n)), 4, n // 4, 8, 1), 1, 4, 4, 4, 4, 1.0, 1.0)


def viewed_across(g, n):
    """Elements of a row, in columns of which each has some of every row."""
    x = g.cont(g.transpose(rows(g, n)))
    g.norm(g.view(x, 8, n, 1, 1, 32, 32 * n, 32 * n, 0), 1e-6)


def past_its_part(g, n):
    """A window into the queries that goes on into the keys."""
    y = g.matmul(g.leaf("qkv", 8, 24), rows(g, n))
    part = g.view(y, 4, 2, n, 1, 16, 96, 96 * n, 0)
    g.norm(g.view(part, 12, n, 1, 1, 96, 96 * n, 96 * n, 0), 1e-6)


def crossing(g, n):
    rows(g, n)
    g.norm(g.leaf("CUDA0#layer_out-0#0", 8, n), 1e-6)


def crossing_later(g, n):
    g.norm(rows(g, n), 1e-6, name_="a name that is long enough to be cut, as names are at sixty-three")
    g.gelu(g.leaf("CUDA0#a name that is long enough to be cut, as names are at sixty-three", 8, n))


def second_graph(g, n):
    x = rows(g, n)
    g.gelu(x)
    rows(g, n)


REFUSED = (
    add_positions,
    periodic,
    mix_rows,
    masked,
    masked_flash,
    unknown,
    repeated,
    joined_to_cls,
    norm_over_rows,
    overlapping,
    padded,
    padded_alike,
    viewed_across,
    past_its_part,
    crossing,
    crossing_later,
    second_graph,
)


@pytest.mark.parametrize("build", REFUSED, ids=lambda b: b.__name__)
def test_refused_before_anything_runs(graph, tap, build):
    """And where it was not rehearsed, before the node runs: all shapes are then as they were."""
    g = graph()
    build(g, 32)
    g.allocate()
    built = [shape(node) for node in g.nodes]
    result, _, after = go(tap, g, np.arange(16))
    assert result.error in (lib.SE_ERR_ROWS, lib.SE_ERR_SEVERAL_GRAPHS) and after == built
    claimed = ffi.new("se_result *", {"keep_node": 1, "n_nodes": len(g.nodes)})
    result, _, after = go(tap, g, np.arange(16), claimed)
    assert result.error in (lib.SE_ERR_ROWS, lib.SE_ERR_SEVERAL_GRAPHS) and result.stopped and after == built
    assert all(node.contents.flags == COMPUTE for node in g.nodes)


@pytest.mark.parametrize("n_keep", [1, 2, 3, 5, 7, 9])
def test_a_part_of_a_row_of_squares_is_refused(graph, tap, n_keep):
    for build in (shuffle, average):
        g = graph()
        build(g, 24)
        g.allocate()
        assert go(tap, g, np.arange(n_keep))[0].error == lib.SE_ERR_ROWS


def test_the_rehearsed_graph_is_known_by_where_rows_leave(graph, tap):
    g = graph()
    x = g.leaf("inp", 8, 16)
    g.gelu(x)
    g.gelu(rows(g, 16))
    g.allocate()
    rehearsal, _, _ = go(tap, g, np.arange(8))
    assert (rehearsal.error, rehearsal.keep_node, rehearsal.n_nodes) == (lib.SE_OK, 2, 3)
    for wrong in ({"keep_node": 1, "n_nodes": 3}, {"keep_node": 3, "n_nodes": 3}):
        built = [shape(node) for node in g.nodes]
        result, _, after = go(tap, g, np.arange(8), ffi.new("se_result *", wrong))
        assert result.error == lib.SE_ERR_ROWS and after == built


def test_plans_that_cannot_be_armed(tap):
    rows = np.arange(4, dtype=np.int32)
    good = {"keep": ffi.cast("int32_t *", rows.ctypes.data), "n_keep": 4, "keep_layer": 1, "count_only": 1}
    assert lib.se_tap_arm(tap, ffi.new("se_plan *", good)) == lib.SE_OK
    lib.se_tap_finish(tap, ffi.NULL)
    bad = (
        {"n_keep": 0},
        {"keep_layer": -1},
        {"count_only": 0},
        {"count_only": 0, "keep_node": 3, "n_nodes": 2},
        {"n_layer": 4, "first": 0, "last": 4, "n_rows": 4},  # a window that begins elsewhere
    )
    for changes in bad:
        assert lib.se_tap_arm(tap, ffi.new("se_plan *", {**good, **changes})) == lib.SE_ERR_ARGUMENT, changes
