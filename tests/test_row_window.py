"""Rows that leave a running encoder: equal to stock with all of them, and to a float64 reference with some.

Equal means bit for bit: what goes through the same kernels in the same shapes. With fewer rows, bounds are what stock
rounds on the whole image (helpers/bounds.py).
"""

from contextlib import contextmanager

import numpy as np
import pytest
from helpers import bounds
from helpers.families import FOLDER, MODES, N_THREADS, Fixture
from helpers.reference_vit import FixedEncoder

from star_edge import PruneConfig, StarVLM
from star_edge.errors import EngineError
from star_edge.llamacpp.mtmd import MEDIA_MARKER
from star_edge.llamacpp.names import PIXELS
from star_edge.llamacpp.tap import NO_ROWS_LEAVE, AttentionRead, KeepRows, Plan
from star_edge.vision.chunks import ImageChunk
from star_edge.vision.encode import fitted
from star_edge.vision.profiles import Layout
from star_edge.vision.row_window import RowLayout, RowWindow, find_row_window

WITH_REFERENCE = (
    "smolvlm",
    "idefics3",
    "gemma3",
    "llava",
    "llava-next",
    "bakllava",
    "internvl",
    "kimi-k2.5",
    "nemotron-vl",
)
WITHOUT = (  # all kept is compared with stock
    "gemma4",
    "gemma4-e2b",
    "gemma4-moe",
    "granite-docling",
    "internvl3.5",
    "lfm2-vl",
    "llava-vicuna",
)
FROM_LAYER_1 = ("kimi-k2.5", "nemotron-vl")  # whose graphs name no node before their first layer
NO_LAYERS = ("gemma4-unified",)
REFUSED = ("minicpmv", "minicpmv4.5", "granite-vision", "mobilevlm", "mobilevlm-v2")
OTHERS = tuple(
    name
    for name in sorted(p.parent.name for p in FOLDER.glob("*/expected.json"))
    if name not in WITH_REFERENCE + WITHOUT + REFUSED + NO_LAYERS
)
modes = pytest.mark.parametrize("mode", ["f32", "fa"])


class Opened:
    """A fixture's encoder, the first image of its first prompt, and the window."""

    def __init__(self, name, mode):
        self.fixture = Fixture(FOLDER / name)
        self.vlm = self.fixture.engine(mode)
        self.encoder = self.vlm.encoder
        self.prompt = self.encoder.tokenize(MEDIA_MARKER, [self.fixture.prompts[0].pictures[0]])
        self.chunk = next(c for c in self.prompt.chunks if isinstance(c, ImageChunk))
        self.window = find_row_window(self.encoder)
        self.n = self.chunk.n_tokens

    def whole(self):
        encoded = self.encoder.encode(self.chunk)
        return encoded.embeddings.copy(), encoded.scores

    def pixels(self):
        """(3, h, w) float32 as the graph gets them."""
        out = np.empty(3 * 512 * 512, np.float32)
        with self.encoder.tap.watching(PIXELS, out):
            self.encoder.run(self.chunk, Plan(count_only=True))
        out = out[: self.encoder.tap.watched() // 4]
        return out.reshape(3, *self.chunk.size)

    def some(self, seed, share=0.4):
        """Tokens that can stay, ascending."""
        n = self.window.fitting(int(share * self.n), self.chunk)
        return np.sort(np.random.default_rng(seed).permutation(self.n)[:n])

    def close(self):
        self.prompt.close()
        self.vlm.close()


@contextmanager
def opened(name, mode="f32"):
    made = Opened(name, mode)
    try:
        yield made
    finally:
        made.close()


def one_pass(o, layer, tokens):
    """(n, n_embd_inp) of tokens whose rows alone go through layers from `layer` on, in a single encode."""
    rows = o.window.layout(o.chunk).keep(tokens)
    rehearsal = o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(layer, rows)))
    assert rehearsal.n_out == len(tokens)
    o.encoder.run(o.chunk, Plan(keep=KeepRows(layer, rows, rehearsal)))
    return o.encoder.output(len(tokens)).copy()


@modes
@pytest.mark.parametrize("name", WITH_REFERENCE + WITHOUT)
def test_all_rows_that_stay_give_what_stock_gives(name, mode):
    """For every layer, in one pass and in two; and whatever ran before."""
    with opened(name, mode) as o:
        stock, scores = o.whole()
        assert o.window.problem(o.chunk) == ""
        every = np.arange(o.n)
        for layer in range(int(name in FROM_LAYER_1), o.window.n_layers + 1):
            assert np.array_equal(one_pass(o, layer, every), stock)
            few = one_pass(o, layer, o.some(layer))
            assert np.array_equal(o.whole()[0], stock)
            if 1 <= layer < o.window.n_layers:
                first = o.window.first(o.chunk, layer, True)
                assert first.attention.shape == (o.n,) and first.vectors.shape == (o.n, first.hidden.shape[1])
                both = o.window.rest(first, every, "received")
                assert np.array_equal(both.embeddings, stock) and np.array_equal(both.scores, scores)
                assert np.array_equal(o.window.rest(first, o.some(layer), None).embeddings, few)  # the same rows
        assert np.array_equal(o.whole()[0], stock)


@modes
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_some_rows_give_what_the_reference_gives(name, mode):
    with opened(name, mode) as o:
        reference, pixels = FixedEncoder(o.fixture.mmproj), o.pixels()
        stock, stock_scores = o.whole()
        right, right_scores = reference.encode(pixels)
        assert bounds.are_features(right, o.fixture.prompts[0].features[0])  # of transformers
        rounding = bounds.relative([(stock, right)])
        for layer in range(1, o.window.n_layers):
            for share in (0.2, 0.5):
                tokens = o.some([layer, int(10 * share)], share)
                right, right_scores = reference.encode(pixels, tokens, layer)
                got = o.window.rest(o.window.first(o.chunk, layer, False), tokens, "received")
                assert np.array_equal(got.tokens, tokens)
                limit = bounds.FACTOR * rounding * np.sqrt(np.mean(np.square(right)))
                assert bounds.distance(got.embeddings, right) <= limit
                assert bounds.distance(stock[tokens], right) > limit  # nothing dropped
                later = reference.encode(pixels, tokens, layer + 1)[0]
                assert bounds.distance(later, right) > limit  # dropped after the wrong layer
                share_of = bounds.share(max(rounding, bounds.relative([(stock_scores, reference.encode(pixels)[1])])))
                assert bounds.distance(got.scores, right_scores) <= share_of * right_scores.max()


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_attention_of_the_first_pass_is_that_of_a_full_run(name):
    with opened(name) as o:
        layout = o.window.layout(o.chunk)
        n_rows = layout.n_patches + layout.n_beside
        layer = o.window.n_layers - 1
        read = AttentionRead([layer - 1], n_rows)
        full = o.encoder.encode(o.chunk, read=read).attention[0]
        first = o.window.first(o.chunk, layer, True)
        want = o.encoder.profile.to_tokens(full, Layout(o.n, layout.grid, layout.of_tokens().ravel()))
        assert np.array_equal(first.attention, want) and first.attention.std() > 0


def test_dropping_after_the_last_layer_keeps_the_same_features():
    """Rows do not meet after the last layer: the projector alone makes tokens of fewer rows, in their places."""
    for name in WITH_REFERENCE + WITHOUT:
        with opened(name) as o:
            stock, _ = o.whole()
            tokens = o.some(3)
            got = one_pass(o, o.window.n_layers, tokens)
            assert bounds.are_features(got, stock[tokens])
            assert not bounds.are_features(np.roll(got, 1, axis=0), stock[tokens])


# ---- graphs that need all of their rows ----


@modes
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_is_told_from_before_anything_runs(name, mode):
    with opened(name, mode) as o:
        stock, _ = o.whole()
        n_rows = rows_of(o)
        for layer in range(1, o.encoder.profile.n_layers(o.encoder.metadata) + 1):
            refused_or_exact(o, layer, np.arange(n_rows, dtype=np.int32), stock)
        assert np.array_equal(o.whole()[0], stock)
        assert o.window is None or o.window.problem(o.chunk) != ""


def rows_of(o):
    """Rows of the encoder's sequence."""
    with pytest.raises(EngineError):
        o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(1, np.full(2, 0, np.int32))))  # a row twice
    assert o.encoder.last_outcome.n_rows > 0
    return o.encoder.last_outcome.n_rows


def refused_or_exact(o, layer, rows, stock):
    """Whether a rehearsal allows it. If it does, the encode runs; with all rows it gives what stock gives."""
    try:
        rehearsal = o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(layer, rows)))
    except EngineError:
        assert o.encoder.last_outcome.error != 0
        return False
    o.encoder.run(o.chunk, Plan(keep=KeepRows(layer, rows, rehearsal)))
    got = o.encoder.output(rehearsal.n_out)
    if len(rows) == o.encoder.last_outcome.n_rows and np.array_equal(rows, np.arange(len(rows))):
        assert np.array_equal(got, stock)
    return True


@pytest.mark.parametrize("name", WITH_REFERENCE + WITHOUT + REFUSED + OTHERS)
def test_any_rows_at_any_layer_are_refused_or_run(name):
    """No choice of rows ends the process or changes a later encode."""
    rng = np.random.default_rng(7)
    with opened(name, "fa") as o:
        stock, _ = o.whole()
        n_rows, ran = rows_of(o), 0
        for _ in range(25):
            n = int(rng.integers(1, n_rows + 1))
            rows = rng.permutation(n_rows)[:n].astype(np.int32)
            ran += refused_or_exact(o, int(rng.integers(0, 6)), rows, stock)
        for rows in ([-1], [n_rows], [0, 0], range(n_rows + 1), []):
            with pytest.raises(EngineError):
                o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(1, np.asarray(rows, np.int32))))
        with pytest.raises(EngineError):
            o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(99, np.arange(n_rows, dtype=np.int32))))
        assert np.array_equal(o.whole()[0], stock)
        assert ran or name not in ("llava", "llava-next")  # whose tokens are single rows: any number can stay


def test_a_part_of_a_row_of_squares_is_refused():
    with opened("gemma3") as o:
        layout = o.window.layout(o.chunk)
        assert o.window.fitting(1, o.chunk) == 6 and o.window.fitting(7, o.chunk) == 12
        rows = layout.of_tokens()[:5].ravel().astype(np.int32)
        with pytest.raises(EngineError, match="needs all of them, or another number"):
            o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(1, rows)))
        assert o.encoder.last_outcome.error == NO_ROWS_LEAVE


def test_a_graph_that_was_not_rehearsed_is_not_touched():
    """A rehearsal of another layer, of another encoder or of none."""
    with opened("llava") as o, opened("gemma3") as other:
        stock, _ = o.whole()
        rows = o.window.layout(o.chunk).keep(np.arange(20))
        theirs = other.window.layout(other.chunk).keep(np.arange(12))
        rehearsal = other.encoder.run(other.chunk, Plan(count_only=True, keep=KeepRows(1, theirs)))
        with pytest.raises(EngineError):
            o.encoder.run(o.chunk, Plan(keep=KeepRows(1, rows)))  # arms nothing, so the encode is not tapped
        for wrong in (rehearsal, o.encoder.run(o.chunk, Plan(count_only=True, keep=KeepRows(2, rows)))):
            with pytest.raises(EngineError):
                o.encoder.run(o.chunk, Plan(keep=KeepRows(1, rows, wrong)))
            assert np.array_equal(o.whole()[0], stock)


def test_a_stock_llava_makes_a_token_of_cls_and_is_refused():
    fixture = Fixture(FOLDER / "llava")
    flash, cache = MODES["f32"]
    options = {"n_ctx": 512, "flash_attn": flash, "type_k": cache, "type_v": cache, "n_threads": N_THREADS}
    with StarVLM(fixture.text, fixture.mmproj, encoder="stock", **options) as vlm:
        prompt = vlm.encoder.tokenize(MEDIA_MARKER, [fixture.prompts[0].pictures[0]])
        chunk = next(c for c in prompt.chunks if isinstance(c, ImageChunk))
        problem = find_row_window(vlm.encoder).problem(chunk)
        prompt.close()
    assert problem == "the encoder makes tokens of other rows than its patches"


def test_which_encoders_have_a_row_window():
    for name in WITH_REFERENCE + WITHOUT:
        with opened(name) as o:
            assert isinstance(o.window, RowWindow) and 1 <= o.window.default_layer() < o.window.n_layers
    for name in ("qwen2-vl", "pixtral", "minicpmv", "mobilevlm"):
        with opened(name) as o:
            assert o.window is None


@pytest.mark.parametrize("counts", [[16], [7], [10, 11, 12], [1, 1, 1], [64, 3, 5], [24, 24, 24, 24]])
def test_shared_tokens_are_whole_rows_and_not_much_more(counts):
    fit = lambda i, n: min(64, -(-n // 8) * 8)
    got = fitted(counts, fit)
    assert all(n % 8 == 0 and n > 0 for n in got)
    least = sum(max(8, n // 8 * 8) for n in counts)  # a row of each image stays
    assert sum(counts) <= sum(got) < max(sum(counts), least) + 8
    assert all(abs(n - m) < 8 for n, m in zip(got, counts))
    assert fitted(counts, lambda i, n: n) == counts


# ---- requests ----


@pytest.mark.parametrize("name", ["smolvlm", "gemma3", "llava", "internvl", "llava-next"])
def test_stages_follow_each_other(name):
    """Fewer tokens leave the encoder, then fewer the later stages; masses count all of them; the cache has the same."""
    fixture = Fixture(FOLDER / name)
    prompt = fixture.prompts[-1]
    config = PruneConfig(0.4, 0.2, 1, encoder_keep=0.6, vision_share=0.5)
    with fixture.engine("fa") as vlm:
        ask = lambda config: vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
        stock, _ = ask(None)
        state, report = ask(config)
        assert not report.notes and report.encoder_layer == 1
        assert report.n_encoder_kept < 0.75 * report.n_image_tokens and report.n_vision_kept < report.n_encoder_kept
        for image in report.images:
            assert len(image.redundant) == 0 and image.n_encoder_kept < image.n_tokens
            assert np.isin(image.vision_kept, image.encoder_kept).all()
            assert np.isin(image.decoder_kept, image.vision_kept).all()
            assert np.isclose(image.vision_mass.sum(), image.n_tokens) and image.decoder_mass.sum() == image.n_tokens
        again, found = ask(config)
        assert all(image.cached for image in found.images) and np.array_equal(again.logits, state.logits)
        assert np.array_equal(ask(None)[0].logits, stock.logits)
        other, _ = ask(PruneConfig(0.4, 0.2, 1, vision_share=0.5))
        assert not np.array_equal(other.logits, state.logits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_answers_without_it_and_says_so(name):
    fixture = Fixture(FOLDER / name)
    prompt = fixture.prompts[-1]
    with fixture.engine("fa") as vlm:
        ask = lambda config: vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
        stock, _ = ask(None)
        state, report = ask(PruneConfig(encoder_keep=0.5))
        assert np.array_equal(state.logits, stock.logits) and report.n_encoder_kept == report.n_image_tokens
        assert [note.startswith("no encoder stage: the encoder") for note in report.notes] == [True]


# ---- rows and tokens ----


@pytest.mark.parametrize(("cls", "n_cls"), [("", 1), ("first", 1), ("last", 1), ("first", 10), ("last", 3)])
@pytest.mark.parametrize(("grid", "side"), [((3, 4), 1), ((3, 4), 2), ((2, 5), 3), ((1, 1), 4)])
def test_layouts(grid, side, cls, n_cls):
    """Rows of a token are the squares that it shows, written down one by one."""
    layout, n_beside = RowLayout(grid, side, cls, n_cls), n_cls if cls else 0
    rows = layout.of_tokens()
    for token in range(grid[0] * grid[1]):
        y, x = divmod(token, grid[1])
        square = [(y * side + a) * grid[1] * side + x * side + b for a in range(side) for b in range(side)]
        assert (rows[token] - n_beside * (cls == "first")).tolist() == square
    n = layout.fitting(2 if grid != (1, 1) else 1)
    tokens = np.sort(np.random.default_rng(1).permutation(grid[0] * grid[1])[:n])
    keep, after = layout.keep(tokens), layout.kept(n)
    assert len(keep) == n * side**2 + n_beside and len(set(keep.tolist())) == len(keep)
    assert np.array_equal(keep[after.of_tokens()], rows[tokens])
    beside = np.arange(n_beside)
    assert np.array_equal(keep[after.cls_row + beside], layout.cls_row + beside)
    assert layout.cls_row == {"": -1, "first": 0, "last": grid[0] * grid[1] * side**2}[cls]
