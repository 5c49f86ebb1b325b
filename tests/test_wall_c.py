"""The walls of the C core, and the plain C11 that a compiler without vector types gets.

Only llama_graph.h and .c know llama.cpp's graphs. Only platform.* and simd.h know systems and compilers.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cffi
import numpy as np
import pytest

from star_edge.llamacpp import native
from star_edge.pruning import core

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = sorted([*CSRC.glob("*.c"), *CSRC.glob("*.h")])
GRAPH = ("llama_graph.c", "llama_graph.h")
LITERAL = r'"(?:[^"\\\n]|\\.)*"'
COMPARE = "strn?(?:case)?cmp|strstr|memcmp|se_is_input|se_has_name"
SYSTEM_HEADERS = r"pthread|unistd|windows|process|dlfcn|time|stdatomic|threads|sys/\w+|\w*intrin"

KNOWLEDGE = {
    "an operation": r"\bGGML_OP_\w+",
    "the operation of a tensor": r"(?:->|\.)op\b",
    "parameters of an operation": r"\bop_params\b",
    "an operand by its number": r"\bsrc\[\s*\d+\s*\]|\bview_src->name\b",
    "a flag": r"\bGGML_TENSOR_FLAG_\w+|(?:->|\.)flags\b",
    "a name of a tensor compared with a literal": rf"\b(?:{COMPARE})\s*\([^;]*?{LITERAL}",
    "the name of a tensor": r"\b(?:node|t|tensor|src|leaf|mask|part|root)->name\b",
}
NOT_PORTABLE = {
    "an attribute": r"__attribute__|__declspec|__forceinline",
    "a statement expression": r"\(\s*\{",
    "a builtin": r"\b__builtin_\w+|\btypeof\b|\b__typeof__\b|\b__int128\b",
    "a header of one system": rf"#\s*include\s*<(?:{SYSTEM_HEADERS})\.h>",
    "a system's or compiler's macro": r"#\s*(?:el)?if.*\b(?:_WIN32|__linux__|__APPLE__|__GNUC__|__clang__|_MSC_VER)\b",
}


def code(text):
    """C source without comments; literals stay."""
    return re.sub(rf"({LITERAL})|/\*.*?\*/|//[^\n]*", lambda m: m[1] or " ", text, flags=re.DOTALL)


def breaches(text, rules):
    """(rule, the text that breaks it) for each place in a C source."""
    return [(rule, m[0]) for rule, pattern in rules.items() for m in re.finditer(pattern, code(text))]


def literals(text):
    includes_gone = re.sub(r"^\s*#\s*include.*$", "", code(text), flags=re.MULTILINE)
    return {m[0][1:-1] for m in re.finditer(LITERAL, includes_gone)}


def known_names():
    """What llama_graph.c compares names with: l_out-, inp_pos, ..."""
    return {
        name
        for name in literals((CSRC / "llama_graph.c").read_text(encoding="utf-8"))
        if len(name) > 1 and not name.isdigit()
    }


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name not in GRAPH], ids=lambda p: p.name)
def test_only_llama_graph_knows_the_graphs(path):
    text = path.read_text(encoding="utf-8")
    assert breaches(text, KNOWLEDGE) == []
    assert not literals(text) & known_names()


def test_llama_graph_names_what_the_core_knows():
    assert known_names() >= {"l_out", "inp_tokens", "inp_pos", "attn_inp_kq_mask", "result_norm"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem not in ("platform", "simd")], ids=lambda p: p.name)
def test_only_platform_and_simd_differ_between_systems(path):
    assert breaches(path.read_text(encoding="utf-8"), NOT_PORTABLE) == []


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("if (node->op == 72) skip(node);", "the operation of a tensor"),
        ("switch (x) { case GGML_OP_ROPE: break; }", "an operation"),
        ("mask = node->src[ 3 ];", "an operand by its number"),
        ("node->flags &= ~16;", "a flag"),
        ('if (!strncmp(name, "l_out-", 6)) return;', "a name of a tensor compared with a literal"),
        ('found = se_is_input(t,\n "inp_pos");', "a name of a tensor compared with a literal"),
        ("return node->name[0] == 'l';", "the name of a tensor"),
        ("memcpy(&scale, node->op_params, 4);", "parameters of an operation"),
        ("typedef float v __attribute__((vector_size(32)));", "an attribute"),
        ("int x = ({ 3; });", "a statement expression"),
        ("#  include <pthread.h>", "a header of one system"),
        ("#elif defined(_WIN32)", "a system's or compiler's macro"),
    ],
)
def test_the_rules_find_breaches(line, rule):
    rules = KNOWLEDGE | NOT_PORTABLE
    assert rule in [found for found, _ in breaches(f"int f(void) {{\n{line}\n}}", rules)]
    assert breaches(f'/* {line} */ // {line.splitlines()[0]}\nconst char * text = "node";', rules) == []


def test_no_circle_between_sources():
    """Each source calls functions of sources below it only."""
    texts = {p.name: code(p.read_text(encoding="utf-8")) for p in CSRC.glob("*.c")}
    where = {}
    for name, text in texts.items():
        for m in re.finditer(r"^(?!static|typedef)[\w ]+[ *](se_\w+)\([^;{]*\)\s*\{", text, re.MULTILINE):
            where[m[1]] = name
    assert len(where) > 30
    calls = {
        name: {where[f] for f in re.findall(r"\bse_\w+\b", text) if f in where} - {name} for name, text in texts.items()
    }
    while calls:
        leaves = [name for name, below in calls.items() if not below & calls.keys()]
        assert leaves, f"a circle among {sorted(calls)}"
        for name in leaves:
            del calls[name]


# ---- the code for compilers without vector types ----

ABSOLUTE, RELATIVE = (
    2e-6,
    2e-5,
)  # of tests/test_scores.py: float32 sums over at most 128 products, an exponential good to 2 ulp


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """(ffi, lib) of the score kernel, compiled strictly as ISO C11 without vector types."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        pytest.skip("no C compiler with the options of GCC")
    output = tmp_path_factory.mktemp("portable") / "core.so"
    include = Path(native.llama_cpp.__file__).parent.parent / "include"
    names = ("scores.c", "cosines.c", "cluster.c", "parallel.c", "platform.c", "ggml_api.c")
    options = [
        "-std=c11",
        "-pedantic-errors",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O2",
        "-fPIC",
        "-shared",
        "-DSE_PORTABLE",
    ]
    defines = ['-DSTAR_EDGE_LLAMA_CPP_PYTHON="test"', '-DSTAR_EDGE_LLAMA="test"']
    subprocess.run(
        [
            compiler,
            *options,
            *defines,
            f"-I{CSRC}",
            "-isystem",
            str(include),
            *(CSRC / n for n in names),
            "-o",
            output,
            "-lm",
            "-lpthread",
        ],
        check=True,
    )
    ffi = cffi.FFI()
    ffi.cdef(
        "\n".join(
            line for line in (CSRC / "star_edge.h").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
        )
    )
    lib = ffi.dlopen(str(output))
    for name in native.BOUND_FUNCTIONS:
        assert lib.se_bind(name.encode(), ctypes.cast(getattr(native.GGML, name), ctypes.c_void_p).value) == lib.SE_OK
    return ffi, lib


def scores(portable, q, k, mask, n_threads):
    """(n_head, n_rows, n_kv) from q (n_rows, n_head, d), k (n_kv, n_head_kv, d) and mask (n_rows, n_kv), all
    float32.
    """
    ffi, lib = portable
    at = lambda array: ffi.cast("void *", array.ctypes.data)
    a = ffi.new("se_attention *")
    a.q, a.q_row_stride, a.q_head_stride = at(q), q.strides[0], q.strides[1]
    a.n_rows, a.n_head, a.head_dim = q.shape
    a.k, a.k_row_stride, a.k_head_stride = at(k), k.strides[0], k.strides[1]
    a.n_kv, a.n_head_kv = k.shape[:2]
    a.scale = q.shape[2] ** -0.5
    a.mask, a.mask_row_stride = at(mask), mask.strides[0]
    out = np.full((a.n_head, a.n_rows, a.n_kv), 7.0, np.float32)
    assert (
        lib.se_attention_scores(a, lib.SE_KEEP, n_threads, ffi.cast("float *", out.ctypes.data), out.size) == lib.SE_OK
    )
    return out


@pytest.mark.parametrize("n_kv", [1, 7, 16, 33, 257])
@pytest.mark.parametrize("spread", [1.0, 40.0])  # 40: logits far below the largest one, whose exponential is 0
def test_scores_without_vector_types(portable, n_kv, spread):
    rng = np.random.default_rng([n_kv, int(spread)])
    q = np.ascontiguousarray(2 * rng.standard_normal((5, 6, 40)), np.float32)
    k = np.ascontiguousarray(rng.standard_normal((n_kv, 3, 40)), np.float32)
    mask = np.where(rng.random((5, n_kv)) < 0.3, -np.inf, spread * rng.standard_normal((5, n_kv))).astype(np.float32)
    mask[:, 0] = 0
    mask[3] = -np.inf  # sees nothing
    x = (
        np.einsum("rhd,nhd->hrn", q.astype(np.float64), np.repeat(k, 2, axis=1)) * np.float64(np.float32(40**-0.5))
        + mask
    )
    with np.errstate(invalid="ignore"):
        e = np.nan_to_num(np.exp(x - x.max(-1, keepdims=True)))
    want = e / np.where(e.sum(-1, keepdims=True) > 0, e.sum(-1, keepdims=True), 1)
    got = scores(portable, q, k, mask, 1)
    scale = spread if spread > 1 else 1  # a sum as large as the mask is rounded at the mask's size
    np.testing.assert_allclose(got, want, rtol=0, atol=scale * ABSOLUTE)
    big = want > 1e-6
    np.testing.assert_allclose(got[big], want[big], rtol=scale * RELATIVE, atol=0)
    assert (got[:, 3] == 0).all()
    np.testing.assert_array_equal(scores(portable, q, k, mask, 3), got)  # threads change nothing


def test_a_nan_stays_one_without_vector_types(portable):
    q, k = np.ones((1, 1, 8), np.float32), np.ones((4, 1, 8), np.float32)
    k[2] = np.nan
    assert np.isnan(scores(portable, q, k, np.zeros((1, 4), np.float32), 1)).all()


@pytest.mark.parametrize("n", [3, 40, 97])
def test_choices_without_vector_types(portable, n, monkeypatch):
    """Where float32 rounds nothing, they are the same as with them."""
    ffi, lib = portable
    rng = np.random.default_rng(n)
    unit = rng.choice([-0.25, 0.25], (n, 16)).astype(np.float32)
    near, mass = (np.arange(n) // 5, np.arange(n) % 5, 2), rng.integers(1, 5, n).astype(float)
    found = []
    for library in (None, portable):
        if library is not None:
            monkeypatch.setattr(core, "ffi", ffi)
            monkeypatch.setattr(core, "lib", lib)
        points = core.Points(unit, None, 0.0, 2)
        parts = [core.cosines(unit), points.farthest(n), core.group_means(unit, np.arange(n) % 3, 3)]
        parts += points.edges(0.75, *near[:2])
        for bound, places, medoids in ((np.inf, None, True), (0.75, None, True), (0.75, near, False)):
            parts += points.cluster(np.empty(0, np.int64), mass, max(1, n // 4), n, bound, 1e-5, places, medoids)
        found.append(parts)
    assert all(np.array_equal(got, want) for got, want in zip(*found, strict=True))
