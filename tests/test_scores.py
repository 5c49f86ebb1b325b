"""se_attention_scores against a float64 softmax in NumPy.

Tolerance: q k^T is a float32 sum over head_dim, so a logit z is off by at most about head_dim * 2^-24 * sum|q k|, and a
probability p by p times that. With |z| of a few units and head_dim <= 128 it stays below 2e-6 absolute; the exponential
itself is good to 2 ulp, so a probability is also within 2e-5 of its own size wherever it is not negligible. Both are
asserted.
"""

import gguf
import numpy as np
import pytest

from star_edge.llamacpp.native import ffi, lib

KEEP, MEAN_HEADS, MEAN_ROWS, MEAN_ALL = lib.SE_KEEP, lib.SE_MEAN_HEADS, lib.SE_MEAN_ROWS, lib.SE_MEAN_ALL
REDUCTIONS = (KEEP, MEAN_HEADS, MEAN_ROWS, MEAN_ALL)
Q = gguf.GGMLQuantizationType
ABSOLUTE, RELATIVE = 2e-6, 2e-5
N_TYPES_BEYOND = 10_000


class Case:
    """One call: arrays live as long as it does. q (n_rows, n_head, d), k (n_kv, n_head_kv, d) float32, mask (n_rows,
    n_kv).
    """

    def __init__(self, q, k, kind=Q.F32, mask=None, scale=None, softcap=0.0, max_bias=0.0, sinks=None):
        self.q, self.mask, self.sinks = q, mask, sinks
        self.n_rows, self.n_head, self.dim = q.shape
        self.n_kv, self.n_head_kv = k.shape[:2]
        self.scale = self.dim**-0.5 if scale is None else scale
        self.softcap, self.max_bias = softcap, max_bias
        self.raw = k if kind == Q.F32 else encode(np.ascontiguousarray(k), kind)
        self.k = k if kind == Q.F32 else decode(self.raw, kind)
        a = self.c = ffi.new("se_attention *")
        a.q, a.q_row_stride, a.q_head_stride = address(q), q.strides[0], q.strides[1]
        a.n_rows, a.n_head, a.head_dim = q.shape
        a.k, a.k_row_stride, a.k_head_stride = address(self.raw), self.raw.strides[0], self.raw.strides[1]
        a.k_type, a.n_kv, a.n_head_kv = int(kind), self.n_kv, self.n_head_kv
        a.scale, a.softcap, a.max_bias = self.scale, softcap, max_bias
        if mask is not None:
            a.mask, a.mask_is_f16, a.mask_row_stride = address(mask), mask.dtype == np.float16, mask.strides[0]
        if sinks is not None:
            a.sinks = ffi.cast("float *", address(sinks))

    def shape(self, reduce):
        heads = () if reduce & MEAN_HEADS else (self.n_head,)
        rows = () if reduce & MEAN_ROWS else (self.n_rows,)
        return (*heads, *rows, self.n_kv)

    def run(self, reduce=KEEP, n_threads=1):
        """The scores; a guard behind the output must stay as it was."""
        size = int(np.prod(self.shape(reduce)))
        out = np.full(size + 16, 123.0, np.float32)
        assert lib.se_attention_scores(self.c, reduce, n_threads, ffi.cast("float *", address(out)), size) == lib.SE_OK
        assert (out[size:] == 123.0).all()
        return out[:size].reshape(self.shape(reduce))

    def error(self, reduce=KEEP, size=None):
        out = np.full(int(np.prod(self.shape(KEEP))), 7.0, np.float32)
        size = out.size if size is None else size
        code = lib.se_attention_scores(self.c, reduce, 2, ffi.cast("float *", address(out)), size)
        assert (out == 7.0).all()  # an error writes nothing
        return code

    def expected(self):
        """(n_head, n_rows, n_kv) float64."""
        k = np.repeat(self.k.astype(np.float64), self.n_head // self.n_head_kv, axis=1)
        x = np.einsum("rhd,nhd->hrn", self.q.astype(np.float64), k) * np.float32(self.scale)
        if self.softcap:
            x = self.softcap * np.tanh(x / self.softcap)
        if self.mask is not None:
            slope = np.array([alibi_slope(h, self.n_head, self.max_bias) for h in range(self.n_head)])
            x = x + slope[:, None, None] * self.mask.astype(np.float64)
        sink = (
            np.full((self.n_head, 1, 1), -np.inf)
            if self.sinks is None
            else self.sinks.astype(np.float64)[:, None, None]
        )
        top = np.maximum(x.max(-1, keepdims=True), sink)
        e = np.exp(x - np.where(np.isfinite(top), top, 0.0))
        total = e.sum(-1, keepdims=True) + np.exp(sink - np.where(np.isfinite(top), top, 0.0))
        return np.divide(e, total, out=np.zeros_like(e), where=total > 0)


def address(array):
    return ffi.cast("void *", array.ctypes.data)


def encode(k, kind):
    """(n_kv, n_head_kv, d) float32 -> the same with rows of bytes or halves."""
    if kind == Q.F16:
        return k.astype(np.float16)
    if kind == Q.BF16:
        return (k.view(np.uint32) >> 16).astype(np.uint16)
    return gguf.quants.quantize(k, kind)


def decode(raw, kind):
    if kind == Q.F16:
        return raw.astype(np.float32)
    if kind == Q.BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return gguf.quants.dequantize(raw, kind)


def alibi_slope(head, n_head, max_bias):
    """Press et al.'s slopes as ggml has them: a geometric series over the largest power of two, then every other step
    between.
    """
    if max_bias == 0.0:
        return 1.0
    power = 2 ** int(np.floor(np.log2(n_head)))
    if head < power:
        return 2.0 ** (-max_bias * (head + 1) / power)
    return 2.0 ** (-max_bias / 2 * (2 * (head - power) + 1) / power)


def reduced(p, reduce):
    """Averages (n_head, n_rows, n_kv) as `reduce` says."""
    axes = tuple(axis for axis, bit in ((0, MEAN_HEADS), (1, MEAN_ROWS)) if reduce & bit)
    return p.mean(axis=axes) if axes else p


def random_case(dim, n_kv, n_rows, heads, kind=Q.F32, seed=0, **options):
    rng = np.random.default_rng([seed, dim, n_kv, n_rows, *heads])
    q = 2 * rng.standard_normal((n_rows, heads[0], dim), dtype=np.float32)
    k = rng.standard_normal((n_kv, heads[1], dim), dtype=np.float32)
    return Case(q, k, kind, **options)


def random_mask(n_rows, n_kv, dtype, seed=5):
    """Numbers and -inf; column 0 is open, so that no row is fully masked."""
    rng = np.random.default_rng(seed)
    mask = rng.standard_normal((n_rows, n_kv)).astype(dtype)
    mask[rng.random(mask.shape) < 0.4] = -np.inf
    mask[rng.random(mask.shape) < 0.3] = 0
    mask[:, 0] = 0.25
    return mask


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=ABSOLUTE)
    big = want > 1e-6
    np.testing.assert_allclose(got[big], want[big], rtol=RELATIVE, atol=0)


def assert_right(case):
    want = case.expected()
    for reduce in REDUCTIONS:
        assert_close(case.run(reduce), reduced(want, reduce))


# ---- shapes, types, strides ----


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (8, 2), (6, 3)], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 20, 64, 80, 96, 128])
def test_shapes(dim, heads):
    for n_kv in (1, 7, 17, 333):
        for n_rows in (1, 3, 5, 41):
            assert_right(random_case(dim, n_kv, n_rows, heads))


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_key_types(kind, dim):
    for n_kv, n_rows, heads in ((1, 1, (4, 4)), (17, 5, (4, 1)), (333, 3, (8, 2))):
        assert_right(random_case(dim, n_kv, n_rows, heads, kind))


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16], ids=lambda kind: kind.name)
def test_half_keys_of_odd_length(kind):
    assert_right(random_case(3, 17, 5, (6, 3), kind))
    assert_right(random_case(20, 33, 2, (6, 3), kind))


def test_permuted_and_padded_layouts():
    rng = np.random.default_rng(3)
    n_rows, n_head, n_kv, n_head_kv, dim = 5, 6, 37, 3, 20
    q_heads_first = rng.standard_normal((n_head, n_rows, dim), dtype=np.float32).transpose(1, 0, 2)
    q_padded = rng.standard_normal((n_rows + 2, n_head + 3, dim + 5), dtype=np.float32)[1:-1, 2:-1, 3:-2]
    k_heads_first = rng.standard_normal((n_head_kv, n_kv, dim), dtype=np.float32).transpose(1, 0, 2)
    k_padded = rng.standard_normal((n_kv + 4, n_head_kv + 1, dim + 9), dtype=np.float32)[4:, 1:, 9:]
    mask = random_mask(n_rows, n_kv + 11, np.float32)[:, :n_kv]
    for q in (q_heads_first, q_padded):
        for k in (k_heads_first, k_padded):
            assert_right(Case(q, k, mask=mask))
    every_second = rng.standard_normal((2 * n_rows, n_head, dim), dtype=np.float32)[::2]
    assert_right(Case(every_second, k_padded))


def test_quantized_keys_with_padded_rows():
    case = random_case(64, 19, 3, (4, 2), Q.Q8_0)
    wide = np.full((19, 2, case.raw.shape[2] + 6), 255, np.uint8)  # the padding is garbage
    wide[..., : case.raw.shape[2]] = case.raw
    want = case.run()
    case.c.k, case.c.k_row_stride, case.c.k_head_stride = address(wide), wide.strides[0], wide.strides[1]
    assert np.array_equal(case.run(), want)


# ---- mask, soft cap, ALiBi, sinks ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mask(dtype):
    for n_kv in (1, 7, 17, 333):
        case = random_case(20, n_kv, 5, (6, 3), mask=random_mask(5, n_kv, dtype))
        assert_right(case)
        assert (case.run()[:, case.mask == -np.inf] == 0).all()


def test_half_mask_takes_every_finite_half():
    """Subnormals, the smallest and largest normals and both zeros are read as IEEE 754 says."""
    bits = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x8400, 0x3C00, 0xBC00, 0x4A40, 0xCA40, 0x7BFF], np.uint16)
    mask = np.vstack([bits, bits[::-1]]).view(np.float16)
    mask[1, 0] = 3.0  # 65504 alone would leave nothing to compare
    mask = np.ascontiguousarray(mask[:, ::-1])
    mask[0, 0] = -np.inf
    assert_right(random_case(3, len(bits), 2, (2, 1), mask=mask))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_fully_masked_rows_receive_nothing(dtype):
    mask = random_mask(5, 17, dtype)
    mask[1] = mask[4] = -np.inf
    case = random_case(64, 17, 5, (4, 2), mask=mask)
    got = case.run()
    assert (got[:, [1, 4]] == 0).all()
    assert np.isfinite(got).all()
    assert_close(got[:, [0, 2, 3]].sum(-1), np.ones((4, 3)))
    assert_right(case)
    mask[:] = -np.inf
    for reduce in REDUCTIONS:
        assert (case.run(reduce) == 0).all()


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_cap_acts_before_the_mask(softcap):
    assert_right(random_case(64, 33, 3, (4, 4), softcap=softcap, scale=0.5, mask=random_mask(3, 33, np.float32)))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (12, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_alibi(heads, dtype):
    distance = -np.abs(np.arange(21)[None, :] - np.arange(16, 21)[:, None]).astype(dtype)
    distance[np.arange(21)[None, :] > np.arange(16, 21)[:, None]] = -np.inf
    assert_right(random_case(20, 21, 5, heads, mask=distance, max_bias=8.0))


def test_alibi_slopes_are_the_published_ones():
    """Zero queries leave only slope * mask, so the slopes can be read off the result."""
    heads = 12
    q, k = np.zeros((1, heads, 4), np.float32), np.zeros((2, heads, 4), np.float32)
    got = Case(q, k, mask=np.array([[0.0, 1.0]], np.float32), max_bias=8.0).run()[:, 0].astype(np.float64)
    published = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(0, 4)]
    np.testing.assert_allclose(np.log(got[:, 1] / got[:, 0]), published, atol=1e-6)


def test_alibi_without_mask_is_no_bias():
    with_bias, without = random_case(20, 9, 2, (6, 3), max_bias=8.0), random_case(20, 9, 2, (6, 3))
    assert np.array_equal(with_bias.run(), without.run())


def test_sinks_take_a_share():
    sinks = np.array([-3.0, 0.0, 2.5, 40.0], np.float32)
    case = random_case(64, 17, 3, (4, 2), sinks=sinks)
    assert_right(case)
    total = case.run().sum(-1)
    assert (total < 1).all() and (total[3] < 1e-6).all() and (total[0] > 0.5).all()
    masked = random_case(64, 17, 3, (4, 2), sinks=sinks, mask=np.full((3, 17), -np.inf, np.float32))
    assert (masked.run() == 0).all()


# ---- reductions, threads, extremes ----


def test_rows_sum_to_one():
    case = random_case(96, 333, 5, (8, 2))
    for reduce in REDUCTIONS:
        np.testing.assert_allclose(case.run(reduce).astype(np.float64).sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("heads", [(6, 6), (8, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_threads_do_not_change_a_bit(heads, reduce):
    case = random_case(80, 333, 5, heads, mask=random_mask(5, 333, np.float16))
    one = case.run(reduce, 1)
    for n_threads in (2, 5, 1000, 0, -3):
        assert np.array_equal(case.run(reduce, n_threads), one)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign):
    """Logits of +-1e4: the largest wins, the others vanish, nothing overflows."""
    q = np.array([[[sign * 100.0]]], np.float32)
    k = np.array([100.0, 99.99, -100.0, 0.0, 99.0, 100.0], np.float32).reshape(6, 1, 1)
    case = Case(q, k, scale=1.0)
    got = case.run()
    assert np.isfinite(got).all()
    if sign > 0:  # 1e4, 9999, ..., 1e4; 9999 = 100 * 99.99 is off by the float32 of 99.99 times 100
        np.testing.assert_allclose(got[0, 0], [0.42232, 0.15536, 0, 0, 0, 0.42232], atol=1e-4)
        np.testing.assert_allclose(got, case.expected(), atol=1e-4)
    else:
        np.testing.assert_allclose(got[0, 0], [0, 0, 1, 0, 0, 0], atol=1e-7)


def test_small_probabilities_are_relatively_right():
    """Down to e^-86; below e^-87 the result is 0."""
    depth = np.array([0.0, 1.0, 10.0, 40.0, 86.0, 88.0, 1e4, 3e38], np.float32)
    got = Case(np.ones((1, 1, 1), np.float32), -depth.reshape(-1, 1, 1), scale=1.0).run()[0, 0].astype(np.float64)
    want = np.exp(-depth.astype(np.float64)) / np.exp(-depth.astype(np.float64)).sum()
    np.testing.assert_allclose(got[:5], want[:5], rtol=1e-6)
    assert (got[5:] == 0).all()


def test_zero_and_negative_scale():
    np.testing.assert_allclose(random_case(64, 17, 3, (4, 2), scale=0.0).run(), 1 / 17, atol=1e-7)
    assert_right(random_case(64, 17, 3, (4, 2), scale=-0.2))


def test_scratch_is_not_shared_between_calls():
    """A large call leaves nothing behind for a small one."""
    small = random_case(3, 7, 1, (4, 1))
    before = small.run()
    random_case(128, 333, 41, (4, 4)).run(MEAN_ALL, 5)
    assert np.array_equal(small.run(), before)


# ---- bad arguments ----


def small_case(**options):
    return random_case(32, 9, 3, (4, 2), **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q", ffi.NULL),
        ("k", ffi.NULL),
        ("n_rows", 0),
        ("n_rows", -1),
        ("n_head", 0),
        ("n_head", -4),
        ("head_dim", 0),
        ("head_dim", -32),
        ("n_kv", 0),
        ("n_kv", -1),
        ("n_head_kv", 0),
        ("n_head_kv", -2),
        ("n_head_kv", 3),
        ("n_head", 5),
        ("k_type", -1),
        ("k_type", N_TYPES_BEYOND),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("softcap", -1.0),
        ("softcap", float("nan")),
        ("max_bias", -1.0),
        ("max_bias", float("nan")),
    ],
)
def test_bad_fields(field, value):
    case = small_case()
    setattr(case.c, field, value)
    assert case.error() == lib.SE_ERR_ARGUMENT


def test_null_arguments():
    out = ffi.new("float[]", 1000)
    assert lib.se_attention_scores(ffi.NULL, KEEP, 1, out, 1000) == lib.SE_ERR_ARGUMENT
    assert lib.se_attention_scores(small_case().c, KEEP, 1, ffi.NULL, 1000) == lib.SE_ERR_ARGUMENT


@pytest.mark.parametrize("reduce", [-1, 4, 1 << 20])
def test_bad_reduction(reduce):
    assert small_case().error(reduce) == lib.SE_ERR_ARGUMENT


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_capacity(reduce):
    case = small_case()
    size = int(np.prod(case.shape(reduce)))
    for too_small in (size - 1, 0, -1):
        assert case.error(reduce, too_small) == lib.SE_ERR_CAPACITY


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q5_1], ids=lambda kind: kind.name)
def test_head_dim_must_be_whole_blocks(kind):
    case = small_case(kind=kind)
    case.c.head_dim = 20
    assert case.error() == lib.SE_ERR_SHAPE


def test_types_without_floats():
    """Integer types, and numbers of removed types (4 and 5, the old Q4_2 and Q4_3), cannot be keys."""
    for kind in (int(Q.I8), int(Q.I32), int(Q.I64), int(Q.F64), 4, 5):
        case = small_case()
        case.c.k_type = kind
        assert case.error() == lib.SE_ERR_SHAPE


def test_every_error_has_a_text():
    texts = {ffi.string(lib.se_error_text(code)).decode() for code in range(10)}
    assert len(texts) == 10 and "unknown error" not in texts
    assert ffi.string(lib.se_error_text(77)) == b"unknown error"
