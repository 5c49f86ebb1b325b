"""What the tap writes into a running graph and reads out of it: positions, cell bias, encoder inputs, attention."""

import llama_cpp
import numpy as np
import pytest
from helpers import bounds, gpu, stock_attention
from helpers.decoders import write_alibi
from helpers.families import load_fixtures
from helpers.reference import Decoder
from helpers.tap_helpers import (
    ARCHS,
    HEADS,
    SHAPE,
    D,
    L,
    decode,
    embeddings,
    kinds,
    load,
    rows_of,
    stock_decode,
    text_positions,
    token_step,
)
from helpers.tap_helpers import fresh as fresh  # a fixture
from helpers.tap_helpers import models as models  # a fixture
from helpers.tap_helpers import rounding as rounding  # a fixture
from helpers.tap_helpers import tapped as tapped  # a fixture

from star_edge.errors import EngineError
from star_edge.llamacpp.context import PARKED, DecoderContext, attach_tap
from star_edge.llamacpp.names import PIXELS
from star_edge.llamacpp.tap import (
    MEAN_ALL,
    MEAN_HEADS,
    MEAN_ROWS,
    SAMPLE_BYTES,
    AttentionRead,
    Compare,
    Plan,
    Tap,
)
from star_edge.rows import Rows
from star_edge.synthetic import EncoderShape, write_encoder
from star_edge.vision.chunks import ImageChunk, LooksKnownError
from star_edge.vision.encoder import MEDIA_MARKER, VisionEncoder

# ---- positions ----


@kinds
def test_positions_given_are_positions_of_a_stock_decode(arch, flash, tapped, fresh, rounding):
    """The cache counts from 0 and RoPE sees the positions of the plan; llama.cpp takes them as they are from a fresh
    sequence.
    """
    context = tapped(arch, flash)
    rows = rows_of(arch, 24, start=70)
    _, got = decode(context, rows)
    assert np.array_equal(got, stock_decode(fresh(arch, flash), rows))
    at_zero = Rows(text_positions(arch, 0, 24), embeddings=rows.embeddings)
    context.clear()
    zero = decode(context, at_zero)[1]
    assert np.array_equal(zero, stock_decode(fresh(arch, flash), at_zero))
    if not gpu.ON:  # both are stock's bits, and a device may round them apart
        assert bounds.are_close(zero, got, rounding(arch, flash))  # RoPE is relative
    apart = Rows(text_positions(arch, 0, 24) * 3, embeddings=rows.embeddings)
    context.clear()
    assert not bounds.are_close(decode(context, apart)[1], got, rounding(arch, flash))  # RoPE is not blind


@pytest.mark.parametrize("flash", [False, True])
def test_image_positions_with_sections(flash, tapped, fresh, models, rounding):
    """(t, y, x) of a 4 x 6 image, which llama.cpp takes from an embedding batch by itself."""
    i = np.arange(24)
    positions = np.stack([0 * i + 3, 3 + i // 6, 3 + i % 6, 0 * i]).astype(np.int32)
    rows = Rows(positions, embeddings=embeddings(24))
    _, got = decode(tapped("qwen2vl", flash), rows)
    assert np.array_equal(got, stock_decode(fresh("qwen2vl", flash), rows))
    model, in_a_row = Decoder(models["qwen2vl"], np.float16), text_positions("qwen2vl", 3, 24)
    right, wrong = (model.forward(rows.embeddings, p)[-1] for p in (positions, in_a_row))
    assert bounds.are_close(got, right, rounding("qwen2vl", flash)) and not bounds.are_close(
        wrong, right, rounding("qwen2vl", flash)
    )


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
def test_position_shift_over_a_gap(arch, flash, tapped, models, rounding):
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
        assert bounds.are_close(token_step(context.llama, token), want[step], rounding(arch, flash))
    context.tap.set_position_shift(20, 0)
    context.remove(0, 20)
    context.llama.n_tokens = 20
    assert bounds.are_close(token_step(context.llama, tokens[0]), wrong[0], rounding(arch, flash))
    assert not bounds.are_close(wrong[0], want[0], rounding(arch, flash))
    context.llama.n_tokens = 0


@pytest.mark.parametrize(("arch", "want"), [("llama", [29]), ("qwen2vl", [29, 29, 29, 0])])
def test_position_shift_spares_the_fourth_section(arch, want, tapped):
    """What RoPE reads for one token at 24 with shift 5: the fourth section of M-RoPE is no position."""
    context = tapped(arch, True)
    decode(context, rows_of(arch, 24))
    context.tap.set_position_shift(0, 5)
    context.llama.n_tokens = 24
    seen = np.full(8, -1, np.int32)
    with context.tap.watching("inp_pos", seen):
        token_step(context.llama, 7)
    context.llama.n_tokens = 0
    assert context.tap.watched() == 4 * len(want)
    assert seen[: len(want)].tolist() == want


def test_shift_leaves_smaller_positions_alone(tapped, fresh):
    """Only positions from `start` on are moved."""
    context, llama = tapped("llama", False), fresh("llama", False)
    rows = rows_of("llama", 24)
    context.tap.set_position_shift(24, 500)
    _, got = decode(context, rows)
    assert np.array_equal(got, stock_decode(llama, rows))


# ---- cell bias ----


@pytest.mark.parametrize("flash", [False, True])
def test_a_bias_in_a_mask_of_distances_is_refused(flash, tmp_path):
    """With ALiBi each head takes a part of what the mask has: no bias makes a cell count the same in all of them."""
    write_alibi(tmp_path / "text.gguf", SHAPE)
    llama, tap = load(str(tmp_path / "text.gguf"), flash), Tap()
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)
    rows = rows_of("llama", 24)
    assert np.isfinite(decode(context, rows)[1]).all()
    context.clear()
    tap.set_cell_bias(np.where(np.arange(24) == 5, np.log(3), 0).astype(np.float32))
    with pytest.raises(EngineError, match="content"):
        decode(context, rows)
    llama.close()
    tap.close()


@kinds
def test_cell_bias_makes_a_cell_count_three_times(arch, flash, tapped, models, rounding):
    """log 3 on the cell of one row, at prefill and for a generated token; the column bias of the reference is the
    oracle.
    """
    context, model = tapped(arch, flash), Decoder(models[arch], np.float16)
    rows = rows_of(arch, 24, seed=4)
    row, token = 5, 77
    decode(context, rows_of(arch, 3, seed=9))
    context.park(0, PARKED + 1)  # three cells of a sequence that plain decodes leave alone: row i is not in cell i
    outcome, _ = decode(context, rows, want_cells=True)
    assert outcome.cells[row] == row + 3
    bias = np.zeros(row + 4, np.float32)  # shorter than the cache: the other cells have no bias
    bias[outcome.cells[row]] = np.log(3)
    context.llama.n_tokens = 24
    base = token_step(context.llama, token)
    context.remove(0, 0)
    decode(context, rows_of(arch, 3, seed=9))
    context.park(0, PARKED + 1)  # again: a step of the Llama's own frees what is parked
    context.tap.set_cell_bias(bias)
    outcome, prefill = decode(context, rows, want_cells=True)
    assert outcome.cells[row] == row + 3
    step = token_step(context.llama, token)
    column = np.zeros(25)
    column[row] = np.log(3)
    inputs = np.concatenate([rows.embeddings, model.embed([token])])
    want = model.forward(inputs, text_positions(arch, 0, 25), column)
    assert bounds.are_close(prefill, want[23], rounding(arch, flash)) and bounds.are_close(
        step, want[24], rounding(arch, flash)
    )
    assert not bounds.are_close(base, want[24], rounding(arch, flash))
    context.tap.set_cell_bias(None)
    context.remove(0, 0)
    decode(context, rows_of(arch, 3, seed=9))
    context.park(0, PARKED + 1)
    decode(context, rows)
    assert np.array_equal(token_step(context.llama, token), base)
    context.llama.n_tokens = 0


@kinds
def test_cell_bias_is_three_copies_of_a_row(arch, flash, tapped, rounding):
    """Three equal cells at one position weigh as one with bias log 3: the copies are made by RoPE positions alone."""
    context = tapped(arch, flash)
    rows = embeddings(12, 8)
    copies = [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    layer = 1  # only the first block: there, equal rows at equal positions have equal keys and values
    tripled, single = np.empty((14, D), np.float32), np.empty((12, D), np.float32)
    positions = text_positions(arch, 0, 12)
    decode(
        context,
        Rows(np.ascontiguousarray(positions[..., copies]), embeddings=rows[copies]),
        window=(0, layer, L),
        hidden=tripled,
    )
    context.clear()
    bias = np.zeros(12, np.float32)
    bias[2] = np.log(3)
    context.tap.set_cell_bias(bias)
    decode(context, Rows(positions, embeddings=rows), window=(0, layer, L), hidden=single)
    assert bounds.are_close(single[3:], tripled[5:], rounding(arch, flash))
    context.tap.set_cell_bias(None)
    context.clear()
    plain = np.empty((12, D), np.float32)
    decode(context, Rows(positions, embeddings=rows), window=(0, layer, L), hidden=plain)
    assert not bounds.are_close(plain[3:], tripled[5:], rounding(arch, flash))


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
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_attention_of_several_layers(arch, flash, cache, tapped, models, rounding):
    """That of stock, read by another callback, and within stock's rounding the reference's."""
    kind = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
    options = {"type_k": kind, **({"type_v": kind} if flash else {})}
    context, plain = tapped(arch, flash, **options), load(models[arch], flash, **options)
    reader, limit = stock_attention.Reader(plain), bounds.share(rounding(arch, flash, **options))
    rows = rows_of(arch, 24)
    outcome, _ = decode(context, rows, attention=all_heads([0, 2, L - 1], 24), want_cells=True)
    assert len(outcome.attention) == 3 and outcome.score_seconds > 0
    model = Decoder(models[arch], np.float16)
    for layer, got in zip((0, 2, L - 1), outcome.attention):
        want, other = (model.attention(rows.embeddings, rows.positions, n) for n in (layer, (layer + 1) % L))
        assert got.shape[:2] == want.shape[:2]
        assert bounds.distance(got[..., outcome.cells], want) <= limit < bounds.distance(other, want)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(plain.ctx), True)
        with reader.layer(layer):
            stock_decode(plain, rows)
        assert bounds.distance(got[..., outcome.cells], reader.last[..., :24]) <= bounds.FLOAT32
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-4)
        rest = np.ones(got.shape[-1], bool)
        rest[outcome.cells] = False
        assert (got[..., rest] == 0).all()
    plain.close()


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
            read = AttentionRead(
                [1, 3], 512, (first, count, step), reduce, max_rows=len(picked), max_heads=HEADS, n_threads=2
            )
            got, _ = decode(context, rows, attention=read)
            for a, b in zip(got.attention, full):
                np.testing.assert_allclose(a, b[:, picked].mean(axis=axes) if axes else b[:, picked], atol=1e-6)


@kinds
def test_attention_where_the_graph_ends(arch, flash, tapped, models, rounding):
    """The layer that a window stops at is read without being computed, in a second decode that sees the cells of the
    first.
    """
    context, model = tapped(arch, flash), Decoder(models[arch], np.float16)
    x = embeddings(30)
    positions = text_positions(arch, 0, 30)
    decode(context, Rows(np.ascontiguousarray(positions[..., :18]), embeddings=x[:18]), want_cells=True)
    tail = Rows(np.ascontiguousarray(positions[..., 18:]), embeddings=x[18:])
    outcome, _ = decode(context, tail, 18, window=(0, 2, L), attention=AttentionRead([2], 512, (4, -1, 1)))
    want, a_row_more = (model.attention(x, positions, 2)[:, n:].mean(axis=(0, 1)) for n in (22, 21))
    limit = bounds.share(rounding(arch, flash)) * want.max()
    assert bounds.distance(outcome.attention[0][:30], want) <= limit < bounds.distance(a_row_more, want)


def test_attention_with_cell_bias(tapped, models, rounding):
    """The bias is in the scores, as it is in the softmax that the graph computes."""
    rows = rows_of("llama", 24)
    bias = np.linspace(0, 2, 24).astype(np.float32)
    model = Decoder(models["llama"], np.float16)
    for flash in (False, True):
        context = tapped("llama", flash)
        context.tap.set_cell_bias(bias)
        outcome, _ = decode(context, rows, attention=all_heads([1], 24))
        want, without = (model.attention(rows.embeddings, rows.positions, 1, b) for b in (bias, None))
        limit = bounds.share(rounding("llama", flash))
        assert bounds.distance(outcome.attention[0][..., :24], want) <= limit < bounds.distance(without, want)


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
            encoder = VisionEncoder(path, llama, flash_attn=True, use_gpu=False, repaired=False)
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
    encode = lambda: encoder.encode(chunk, None, want_cells=False).embeddings.copy()
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


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_shift_and_bias_in_every_ubatch(arch, flash, models, fresh):
    """A plain decode of several ubatches: 24 tokens, 8 at a time, the graph reused."""
    tap = Tap()
    llama = load(models[arch], flash, n_ubatch=8)
    attach_tap(llama, tap)
    tokens = np.arange(40, 64).astype(np.int32)

    def logits(positions):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), False)
        tap.begin()
        return stock_decode(llama, Rows(positions, tokens=tokens))

    p = np.arange(24, dtype=np.int32)
    plain = logits(p)
    tap.set_position_shift(4, 60)
    shifted = logits(p)
    tap.set_position_shift(0, 0)
    c = DecoderContext(llama, tap)
    c.clear()
    at = 0
    true = np.where(p >= 4, p + 60, p).astype(np.int32)
    for at in (0, 8, 16):
        pos = true[at : at + 8] if arch == "llama" else np.stack([true[at : at + 8]] * 3 + [0 * true[at : at + 8]])
        c.decode(Rows(np.ascontiguousarray(pos), tokens=tokens[at : at + 8]), at, Plan(), "x", logits=at == 16)
    assert np.abs(shifted - plain).max() > 0.05
    np.testing.assert_array_equal(shifted, c.logits())
    llama.close()
    tap.close()


# ---- samples of encoder inputs ----


def test_a_sample_is_of_the_pixels():
    """Eight pieces, the middles of as many equal parts, after the size; only one that is equal to the byte is known."""
    fixture = load_fixtures()["llava-next"]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    with fixture.engine("fa") as engine:
        encoder = engine.encoder
        prompt = encoder.tokenize(MEDIA_MARKER, [pixels])
        chunk = next(c for c in prompt.chunks if isinstance(c, ImageChunk))
        seen = np.empty((3, *chunk.size), np.float32)
        nothing = np.empty((0, SAMPLE_BYTES), np.uint8)
        with encoder.tap.watching(PIXELS, seen):
            sample = encoder.run(chunk, Plan(compare=Compare(PIXELS, nothing))).sample
        n, piece = seen.size // 8, 1024  # floats
        parts = seen.reshape(8, n)[:, n // 2 - piece // 2 : n // 2 + piece // 2]
        assert sample.tobytes() == np.int64(seen.nbytes).tobytes() + np.ascontiguousarray(parts).tobytes()
        other = sample.copy()
        other[-1] ^= 1
        before = encoder.encode(chunk, None).embeddings.copy()
        encoder.run(chunk, Plan(compare=Compare(PIXELS, other[None])))
        with pytest.raises(LooksKnownError) as found:
            encoder.run(chunk, Plan(compare=Compare(PIXELS, np.stack([other, sample]))))
        assert found.value.known == 1
        assert np.array_equal(encoder.encode(chunk, None).embeddings, before)
        with pytest.raises(EngineError):
            encoder.run(chunk, Plan(count_only=True, compare=Compare(PIXELS, nothing)))
        assert encoder.run(chunk, Plan(compare=Compare("no such input", nothing))).sample is None
        prompt.close()
