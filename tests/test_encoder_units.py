"""Parts of pictures in the encoders of any picture size: some units alone, and units that leave at layer M.

The reference is float64 NumPy (helpers/reference_units.py), which is checked here against what transformers says of
whole pictures. Bounds are what stock llama.cpp rounds on the whole picture in the same mode (bounds.py).
"""

import contextlib
import json

import numpy as np
import PIL.Image
import pytest
from helpers import bounds
from helpers.families import IS_0_3_35, load_fixtures, tokenized
from helpers.reference_units import UnitEncoder

from star_edge import MEDIA_MARKER, PruneConfig, StarVLM, Video
from star_edge.errors import ConfigError, EngineError
from star_edge.llamacpp.tap import MEAN_ALL, AttentionRead, Plan
from star_edge.server.schema import parse_prune
from star_edge.vision.chunks import ImageChunk
from star_edge.vision.composed import GEOMETRIES, Composer
from star_edge.vision.encode import ImageEncoding
from star_edge.vision.encoder import VisionEncoder
from star_edge.vision.window import find_window

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "pixtral", "mistral3", "glm4.1v", "paddleocr-vl")
FAMILIES += () if IS_0_3_35 else ("glm-ocr",)  # which it computes wrongly
FIXTURES = load_fixtures()


@pytest.fixture(scope="module", params=FAMILIES)
def fixture(request):
    return FIXTURES[request.param]


@pytest.fixture(scope="module")
def reference(fixture):
    return UnitEncoder(fixture.mmproj)


@pytest.fixture(scope="module", params=["f32", "fa"])
def vlm(fixture, request):
    with fixture.engine(request.param) as engine:
        yield engine


class Images:
    """The first image of a prompt on one engine: its chunk, and what stock makes of it."""

    def __init__(self, vlm, reference, pixels, chunk):
        self.vlm, self.reference, self.pixels, self.chunk = vlm, reference, pixels, chunk
        self.window = find_window(vlm.encoder)
        self.composer = self.window.composer
        self.n = chunk.grid[0] * chunk.grid[1]
        self.stock = self.whole()
        special = np.zeros(chunk.n_tokens, bool) if chunk.special is None else chunk.special
        self.of_unit = np.flatnonzero(~special)  # token of each unit

    def whole(self):
        encoded = self.vlm.encoder.encode(self.chunk, "received")
        encoded.embeddings = encoded.embeddings.copy()
        return encoded

    def units_of(self, features):
        """Features of the units alone, without row ends."""
        return features.embeddings[np.isin(features.tokens, self.of_unit)]

    @property
    def rounding(self):
        right = self.reference.encode(self.pixels, np.arange(self.n))
        return bounds.rounding([(self.stock.embeddings[self.of_unit], right)])


@pytest.fixture(scope="module")
def image(fixture, reference, vlm):
    prompt = fixture.prompts[0]
    with tokenized(vlm, prompt) as chunks:
        chunk = next(c for c in chunks if isinstance(c, ImageChunk))
        yield Images(vlm, reference, prompt.pictures[0], chunk)


def subsets(image, seed=7):
    """Ascending units of several sizes, scattered, in a block, and all of a row or a column."""
    rng, (rows, columns) = np.random.default_rng(seed), image.chunk.grid
    wanted = [8, 11, image.n // 2, image.n - 2]
    sets = [np.sort(rng.permutation(image.n)[: image.composer.fitting(k, image.chunk)]) for k in wanted]
    everything = np.arange(image.n).reshape(rows, columns)
    fits = lambda units: image.composer.fitting(len(units), image.chunk) == len(units)
    lines = [everything[-k:].ravel() for k in range(2, rows)], [everything[:, :k].ravel() for k in range(2, columns)]
    return [*sets, *(next(filter(fits, several)) for several in lines)]


# ---- the reference ----


def test_the_reference_is_transformers(fixture, reference):
    """Features of whole pictures, and the attention that the vision stage ranks by."""
    prompt = fixture.prompts[0]
    picture, features, scores = prompt.pictures[0], prompt.features[0], prompt.encoder_scores[0]
    ordinary = ~prompt.cases[0].special[0]
    everything = np.arange(ordinary.sum())
    ours = reference.encode(picture, everything)
    assert bounds.are_features(ours, features[ordinary]) and bounds.distance(ours, features[ordinary]) < 1e-3
    last = max(il for il in range(reference.n_layer) if (il + 1) % reference.full_every == 0)
    assert bounds.distance(reference.received(picture, everything, last), scores[ordinary]) < 1e-6


# ---- some units alone ----


def test_all_units_composed_are_the_picture(image):
    """A picture that is composed of all units, in the encoder's order, is the picture: features and scores."""
    got = image.composer.encode(image.composer.look(image.chunk), np.arange(image.n), "received")
    assert np.array_equal(got.tokens, np.arange(image.chunk.n_tokens))
    assert np.array_equal(got.embeddings, image.stock.embeddings)
    assert np.array_equal(got.scores, image.stock.scores)


def test_some_units_are_the_encoder_of_those_units(image):
    """As if there were no others, at their true places."""
    picture, rounding = image.composer.look(image.chunk), image.rounding
    for keep in subsets(image):
        got = image.composer.encode(picture, keep, "received")
        right = image.reference.encode(image.pixels, keep)
        assert bounds.are_close(image.units_of(got), right, rounding)
        assert not bounds.are_close(image.stock.embeddings[image.of_unit[keep]], right, rounding)
        elsewhere = (keep + 1) % image.n  # the same pixels one place further
        assert not bounds.are_close(image.units_of(got), image.reference.encode(image.pixels, elsewhere), rounding)
        assert len(got.scores) == len(got.tokens) and (got.scores[np.isin(got.tokens, image.of_unit)] > 0).all()
    assert np.array_equal(image.whole().embeddings, image.stock.embeddings)  # nothing of it stays


def test_scores_of_some_units_are_their_attention(image):
    picture = image.composer.look(image.chunk)
    limit = bounds.share(
        bounds.relative(
            [(image.stock.embeddings[image.of_unit], image.reference.encode(image.pixels, np.arange(image.n)))]
        )
    )
    last = max(il for il in range(image.reference.n_layer) if (il + 1) % image.reference.full_every == 0)
    for keep in subsets(image)[:3]:
        got = image.composer.encode(picture, keep, "received")
        right = image.reference.received(image.pixels, keep, last)
        ours = got.scores[np.isin(got.tokens, image.of_unit)]
        assert bounds.distance(ours, right) <= limit * right.max() < bounds.distance(np.roll(right, 1), right)


def test_row_ends_stay(image):
    """Those of the whole picture, each where it was."""
    if image.chunk.special is None or not image.chunk.special.any():
        return  # this family has none
    keep = subsets(image)[0]
    got = image.composer.encode(image.composer.look(image.chunk), keep, None)
    ends = np.flatnonzero(image.chunk.special)
    assert np.isin(ends, got.tokens).all() and len(got.tokens) == len(keep) + len(ends)
    assert np.array_equal(got.embeddings[np.isin(got.tokens, ends)], image.stock.embeddings[ends])


def test_pixels_are_those_of_the_encoder(image):
    """Looked at without a layer computed: what the float64 reference makes of the picture, in float32."""
    got = image.composer.look(image.chunk).pixels
    side, patch = image.reference.side, image.reference.patch
    right = image.reference.pixels(image.pixels).reshape(image.n, side, side, 3, patch, patch)
    right = right.transpose(0, 3, 1, 4, 2, 5).reshape(got.shape)
    assert bounds.distance(got, right) <= 2.0**-20 * np.abs(right).max()


# ---- units that leave at layer M ----


def test_everything_kept_is_the_picture_for_every_layer(image):
    for layer in range(1, image.window.n_layers):
        first = image.window.first(image.chunk, layer, True)
        got = image.window.rest(first, np.arange(image.n), "received")
        assert np.array_equal(got.embeddings, image.stock.embeddings)
        assert np.array_equal(got.scores, image.stock.scores)
        assert image.vlm.encoder.last_outcome.n_skipped > 10 * layer


def test_units_that_leave_at_a_layer(image):
    rounding, layers = image.rounding, range(image.window.n_layers)
    for layer in layers[1:]:
        first = image.window.first(image.chunk, layer, True)
        for keep in subsets(image, seed=layer)[:4]:
            got = image.units_of(image.window.rest(first, keep, None))
            assert bounds.are_close(got, image.reference.encode(image.pixels, keep, layer), rounding)
            for other in {layer - 1, min(layer + 1, layers[-1])} - {layer}:
                assert not bounds.are_close(got, image.reference.encode(image.pixels, keep, other), rounding)


def test_redundant_units_leave_before_and_others_at_a_layer(image):
    """The first pass over some units is a window on what `encode` of these units does."""
    picture = image.composer.look(image.chunk)
    enter = subsets(image)[3]
    alone = image.composer.encode(picture, enter, "received")
    for layer in range(1, image.window.n_layers):
        first = image.window.first(image.chunk, layer, True, picture, enter)
        got = image.window.rest(first, np.arange(len(enter)), "received")
        assert np.array_equal(first.units, enter) and np.array_equal(got.tokens, alone.tokens)
        assert np.array_equal(got.embeddings, alone.embeddings) and np.array_equal(got.scores, alone.scores)


def test_attention_of_the_first_pass_is_that_of_a_full_run(image):
    """Bit for bit, of the last layer below M that sees the whole picture."""
    g, n_rows = image.composer.geometry, image.n * image.composer.geometry.patches
    rows = g.rows(image.chunk.grid)[np.argsort(g.ordered(np.arange(image.n), image.chunk.grid))]
    for layer in range(1, image.window.n_layers):
        first = image.window.first(image.chunk, layer, True)
        seen = [il for il in range(layer) if (il + 1) % image.reference.full_every == 0]
        assert (first.attention is None) == (not seen)
        if seen:
            read = AttentionRead([seen[-1]], n_rows, (0, -1, 1), MEAN_ALL)
            full = image.vlm.encoder.encode(image.chunk, None, read=read).attention[0]
            assert np.array_equal(first.attention, full[rows].mean(axis=1))


# ---- whole requests ----


def ask(vlm, fixture, config, pictures=None, number=-1):
    prompt = fixture.prompts[number]
    return vlm.read_prompt(prompt.text, prompt.pictures if pictures is None else pictures, config, chat=False)


def paper(picture):
    """The picture with its upper half blank, and a blank column."""
    picture = picture.copy()
    picture[: len(picture) // 2] = 255
    picture[:, -1:] = picture[:, -2:-1]
    return picture


def test_a_request_with_everything_kept_is_stock(fixture, vlm):
    """Two images, for every M, and redundancy where no unit equals its neighbour; afterwards and from the cache."""
    stock, _ = ask(vlm, fixture, None)
    n_layers = find_window(vlm.encoder).n_layers
    for turn in range(2):
        for config in (
            *(PruneConfig(encoder_layer=layer) for layer in range(1, n_layers)),
            PruneConfig(redundancy="exact"),
            PruneConfig(redundancy="exact", encoder_layer=1, decoder_layer=1),
        ):
            state, report = ask(vlm, fixture, config)
            assert np.array_equal(state.logits, stock.logits)
            assert report.n_decoder_kept == report.n_encoder_kept == report.n_image_tokens and not report.notes
            assert report.encoder_layer == config.encoder_layer and report.n_redundant == 0
            if turn:
                assert all(image.cached for image in report.images)


def test_redundant_units_of_a_request(fixture, vlm):
    """They are left out, counted for by those that stay, and found again in the cache."""
    pictures = [paper(picture) for picture in fixture.prompts[-1].pictures]
    stock, _ = ask(vlm, fixture, None, pictures)
    state, report = ask(vlm, fixture, PruneConfig(redundancy="exact"), pictures)
    for image in report.images:
        assert len(image.redundant) >= image.grid[0] // 2 * image.grid[1] - image.grid[1]
        assert (
            image.n_encoder_kept == image.n_tokens - len(image.redundant) and image.vision_mass.sum() == image.n_tokens
        )
        assert np.array_equal(image.vision_kept, image.encoder_kept)
        assert not np.isin(image.redundant, image.encoder_kept).any()
        blank = image.kept_on_grid(image.vision_kept)[: image.grid[0] // 2 - 1]
        assert blank.sum() < blank.size / 2
    assert not np.array_equal(state.logits, stock.logits)
    assert report.n_kv_cells == report.n_text_tokens + report.n_encoder_kept
    again, found = ask(vlm, fixture, PruneConfig(redundancy="exact"), pictures)
    assert all(image.cached for image in found.images) and np.array_equal(again.logits, state.logits)
    assert found.to_dict()["images"][0]["redundant"] == report.to_dict()["images"][0]["redundant"]
    gone, report = ask(vlm, fixture, PruneConfig(redundancy="exact", representatives="none"), pictures)
    assert all(image.vision_mass is None for image in report.images) and not np.array_equal(gone.logits, state.logits)
    after, _ = ask(vlm, fixture, None, pictures)
    assert np.array_equal(after.logits, stock.logits)


def test_stages_follow_each_other(fixture, vlm):
    pictures = [paper(picture) for picture in fixture.prompts[-1].pictures]
    config = PruneConfig(0.4, 0.2, 1, redundancy="exact", encoder_keep=0.6, vision_share=0.5)
    state, report = ask(vlm, fixture, config, pictures)
    for image in report.images:
        n = image.n_tokens - image.n_special
        assert len(image.redundant) > 0 and image.n_encoder_kept - image.n_special <= 0.6 * n + 2
        assert np.isin(image.vision_kept, image.encoder_kept).all()
        assert np.isin(image.decoder_kept, image.vision_kept).all()
        assert image.vision_mass.sum() == image.decoder_mass.sum() == image.n_tokens
        assert len(image.vision_kept) == round(0.4 * n) + image.n_special
    titles = report.picture(pictures[0]).size
    plain = ask(vlm, fixture, PruneConfig(0.4, 0.2, 1), pictures)[1].picture(pictures[0]).size
    assert titles[0] * titles[1] > plain[0] * plain[1]  # more panels
    summary = report.figures()
    assert (summary["n_redundant"], summary["n_encoder_kept"]) == (report.n_redundant, report.n_encoder_kept)
    fresh_state, _ = ask(vlm, fixture, config, pictures)
    assert np.array_equal(fresh_state.logits, state.logits)


@pytest.mark.parametrize("budget", ["image", "prompt"])
def test_frames_share_the_encoder_stage(fixture, vlm, budget):
    """Four frames, of which one repeats: as many tokens in all, and with a shared budget fewer of the repetition."""
    first = fixture.prompts[0].pictures[0]
    frames = [first, first, np.ascontiguousarray(first[::-1]), np.ascontiguousarray(first[:, ::-1])]
    text = "".join(f"{i}: {MEDIA_MARKER} " for i in range(4)) + "what?"
    stock, _ = vlm.read_prompt(text, frames, None, chat=False)
    state, report = vlm.read_prompt(text, frames, PruneConfig(encoder_layer=1, budget=budget), chat=False)
    assert np.array_equal(state.logits, stock.logits) and report.n_encoder_kept == report.n_image_tokens
    _, report = vlm.read_prompt(text, frames, PruneConfig(encoder_keep=0.5, budget=budget), chat=False)
    kept = [image.n_encoder_kept - image.n_special for image in report.images]
    if budget == "image":
        assert len(set(kept)) == 1
    else:
        assert kept[1] < min(kept[0], kept[2], kept[3])
    _, report = vlm.read_prompt(text, frames, PruneConfig(encoder_keep=0.5, budget=budget), chat=False)
    assert all(image.cached for image in report.images)


def test_blank_and_narrow_pictures(fixture, vlm):
    """The fewest units that libmtmd encodes stay, and no shape is too odd."""
    side = find_window(vlm.encoder).composer.geometry.pixels
    for rows, columns in ((7, 9), (1, 23), (31, 1), (5, 5)):
        blank = np.full((rows * side, columns * side, 3), 200, np.uint8)
        state, report = ask(vlm, fixture, PruneConfig(redundancy="exact"), [blank], number=0)
        assert np.isfinite(state.logits).all() and not report.notes
        image = report.images[0]
        assert 8 <= image.n_encoder_kept - image.n_special <= 14 and image.vision_mass.sum() == image.n_tokens
        state, report = ask(vlm, fixture, PruneConfig(encoder_keep=1 / 3, redundancy=0.1), [blank], number=0)
        assert np.isfinite(state.logits).all() and not report.notes


def test_image_min_tokens_is_the_least(fixture):
    picture = paper(fixture.prompts[0].pictures[0])
    with StarVLM(fixture.text, fixture.mmproj, n_ctx=1024, n_threads=1, image_min_tokens=28, flash_attn=True) as engine:
        _, report = engine.read_prompt("what?", picture, PruneConfig(redundancy=0.9, encoder_keep=1))
    assert 28 <= report.n_encoder_kept - report.images[0].n_special <= 32 and len(report.notes) == 1
    assert "encoder_keep=1 keeps one token" in report.notes[0]


# ---- what cannot be done ----


def test_a_node_that_is_not_there_is_an_error(image):
    out = np.empty(10, np.float32)
    with pytest.raises(EngineError, match="no node that the plan names"):
        image.vlm.encoder.run(image.chunk, Plan(source=("no such node", 1), source_out=out))
    assert np.array_equal(image.whole().embeddings, image.stock.embeddings)


@pytest.mark.parametrize("name", list(FIXTURES))
def test_windows_end_no_process(name):
    """Both windows on every family, with rows that may be wrong: an error at most, and the encoder is as it was."""
    fixture = FIXTURES[name]
    with fixture.engine("fa") as engine, tokenized(engine, fixture.prompts[0]) as chunks:
        chunk, encoder = next(c for c in chunks if isinstance(c, ImageChunk)), engine.encoder
        before = encoder.encode(chunk, None, want_cells=False).embeddings.copy()
        n_layers, n_embd = (
            encoder.profile.n_layers(encoder.metadata),
            int(encoder.metadata["clip.vision.embedding_length"]),
        )
        for n_rows in {encoder.max_rows(chunk), chunk.n_tokens, 4 * chunk.n_tokens}:
            hidden = np.zeros((n_rows, n_embd), np.float32)
            for plan in (
                Plan(n_rows=n_rows, window=(0, 1, n_layers), hidden=hidden, encoder=True),
                Plan(n_rows=n_rows, window=(1, n_layers, n_layers), inject=hidden, encoder=True),
            ):
                with contextlib.suppress(EngineError):
                    encoder.run(chunk, plan)
        assert np.array_equal(encoder.encode(chunk, None, want_cells=False).embeddings, before)


@pytest.mark.parametrize("name", [name for name, f in FIXTURES.items() if f.projector not in GEOMETRIES])
def test_other_families_answer_without_it(name):
    """And the report says so."""
    fixture = FIXTURES[name]
    with fixture.engine("fa") as engine:
        stock, _ = ask(engine, fixture, None)
        state, report = ask(engine, fixture, PruneConfig(redundancy="exact"))
        assert np.array_equal(state.logits, stock.logits) and report.n_redundant == 0
        assert sum("left out before the encoder" in note for note in report.notes) == 1


# ---- equal tiles ----


def in_crops(fixture):
    """A picture that the model cuts into crops."""
    return max((picture for prompt in fixture.prompts for picture in prompt.pictures), key=lambda picture: picture.size)


@pytest.mark.parametrize("name", ["llava-next", "smolvlm", "idefics3"])
def test_equal_tiles_are_encoded_once(name, monkeypatch):
    """A blank picture in crops: the encoder runs for the first, and the prompt is what it is with a run for each."""
    fixture, runs, encode = FIXTURES[name], [], VisionEncoder.encode

    def recorded(*args, **options):
        encoded = encode(*args, **options)
        runs.append(encoded.embeddings.tobytes())
        return encoded

    monkeypatch.setattr(VisionEncoder, "encode", recorded)
    picture = in_crops(fixture)
    half_blank = picture.copy()
    half_blank[: len(picture) // 2] = 128
    for pixels in (np.full_like(picture, 128), half_blank, picture):
        for config in (None, "balanced"):
            with fixture.engine("fa") as engine:
                runs.clear()
                state, report = ask(engine, fixture, config, [pixels], number=0)
                once = list(runs)
                assert len(once) == sum(image.same_as is None for image in report.images)
                runs.clear()
                again, found = ask(engine, fixture, config, [pixels], number=0)
                assert not runs and all(image.cached for image in found.images)
                assert np.array_equal(again.logits, state.logits)
            with fixture.engine("fa") as engine, monkeypatch.context() as patch:
                patch.setattr(ImageEncoding, "_fingerprint", lambda self, image: None)
                runs.clear()
                each, every = ask(engine, fixture, config, [pixels], number=0)
                assert np.array_equal(each.logits, state.logits)
                assert len(runs) == len(every.images) and not any(image.same_as is not None for image in every.images)
                assert sorted(once) == sorted(set(runs))  # of equal tiles one, and of no others
            assert len(once) == 1 or pixels.std() > 0


@pytest.mark.parametrize("name", ["llava-next", "smolvlm"])  # of idefics3's fixture the one tile is the overview
def test_a_photo_is_not_looked_at_twice(name, monkeypatch):
    """Each crop is one run of the encoder. Only crops that look alike get a run that counts: a page's blank ones, and
    those whose samples agree while some other pixel differs.
    """
    fixture, runs, run = FIXTURES[name], [], VisionEncoder.run

    def recorded(self, chunk, plan):
        try:
            return run(self, chunk, plan)
        finally:
            kind = "look" if plan.count_only else "begun" if self.last_outcome.known is not None else "whole"
            runs.append((kind, self.tap.take_traffic().n_reads))

    shape = in_crops(fixture).shape
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    page = np.full(shape, 255, np.uint8)
    with fixture.engine("fa") as engine, monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "run", recorded)
        for pixels in (noise, page):
            engine.encoder.tap.take_traffic()
            runs.clear()
            _, report = ask(engine, fixture, None, [pixels], number=0)
            n_same = sum(image.same_as is not None for image in report.images)
            kinds = [kind for kind, _ in runs]
            assert kinds.count("whole") == len(report.images) - n_same and len(report.images) > 1
            if pixels is noise:
                assert kinds == ["whole"] * len(report.images) and len({n for _, n in runs}) == 1
            else:
                assert (
                    n_same
                    and kinds.count("begun") >= n_same
                    and n_same < kinds.count("look") <= 2 * kinds.count("begun")
                )


def test_crops_that_differ_where_no_sample_is_are_told_apart(monkeypatch):
    """The sample of a crop is the only thing that is equal: each is encoded."""
    fixture, runs = FIXTURES["llava-next"], []
    pixels = np.full(in_crops(fixture).shape, 255, np.uint8)
    looks = ImageEncoding._fingerprint

    def alike(self, image):
        runs.append(image)
        return looks(self, image) + bytes([len(runs)])  # as if a pixel differed

    with fixture.engine("fa") as engine, monkeypatch.context() as patch:
        patch.setattr(ImageEncoding, "_fingerprint", alike)
        _, report = ask(engine, fixture, None, [pixels], number=0)
        assert all(image.same_as is None for image in report.images)
        assert len(runs) == len(report.images)  # each once, whoever it is compared with
    assert len({id(image) for image in runs}) == len(runs)


def test_equal_frames_in_parts_are_encoded_once(monkeypatch):
    """Frames of a video: the prompt is what it is when each is encoded, whoever shares a budget."""
    fixture, runs, encode = FIXTURES["qwen2-vl"], [], Composer.encode

    def recorded(self, picture, *args):
        runs.append(picture)
        return encode(self, picture, *args)

    monkeypatch.setattr(Composer, "encode", recorded)
    one = paper(fixture.prompts[0].pictures[0])
    other = one[:, ::-1].copy()
    for budget in ("image", "crop"):
        asked = ("a <__media__> d", Video([one, other, one]))
        config = PruneConfig(redundancy="exact", vision_keep=0.5, budget=budget)
        with fixture.engine("fa") as engine:
            state, report = engine.read_prompt(*asked, config, chat=False)
            assert len(runs) == 2 and report.n_cached == 0
            assert len(report.images[2].redundant) and report.images[2].n_encoder_kept < report.images[2].n_tokens
            assert [image.same_as for image in report.images] == [None, None, 0]
            runs.clear()
        with fixture.engine("fa") as engine, monkeypatch.context() as patch:
            patch.setattr("star_edge.vision.encode._twins", lambda *_: {})
            each, _ = engine.read_prompt(*asked, config, chat=False)
            assert np.array_equal(each.logits, state.logits) and len(runs) == (3 if budget == "image" else 2)
            runs.clear()


# ---- the fronts ----


def test_every_front_takes_the_fields(star_edge, tmp_path):
    """The command line, lines of a batch, and requests to the server."""
    fixture = FIXTURES["qwen2-vl"]
    PIL.Image.fromarray(paper(fixture.prompts[0].pictures[0])).save(tmp_path / "page.png")
    model = ["-m", str(fixture.text), "--mmproj", str(fixture.mmproj), "--ctx-size", "1024", "-n", "2"]
    ask = "what is <__media__>?"
    options = ["--redundancy", "exact", "--encoder-keep", "0.5", "--encoder-layer", "2", "--raw"]
    done = star_edge("run", ask, "--image", "page.png", "--preset", "off", "--json", "--kept", *model, *options)
    report = json.loads(done.stdout)["report"]
    assert report["encoder_layer"] == 2 and 0 < report["n_redundant"] <= 42 - report["n_encoder_kept"] == 21
    assert report["config"]["redundancy"] == "exact" and report["images"][0]["encoder_kept"]
    text = star_edge("run", ask, "--image", "page.png", "--preset", "off", *model, *options).stderr
    assert "into the encoder -> 21 from its layer 2" in text
    task = {"image": "page.png", "prompt": ask, "preset": "off", "raw": True}
    task |= {"redundancy": 0.03, "encoder_keep": 0.5}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task))
    line = json.loads(star_edge("run", "--tasks", "tasks.jsonl", *model).stdout)
    assert line["image_tokens"] == 42 and line["average_tokens"] < 42
    for wrong in (["--redundancy", "some"], ["--redundancy", "2"], ["--encoder-layer", "3"], ["--encoder-keep", "0"]):
        assert wrong[0] in star_edge("run", ask, "--image", "page.png", *model, *wrong, "--raw", status=2).stderr
    config = parse_prune({"redundancy": 0.03, "encoder_keep": 0.5, "encoder_layer": 1})
    assert config == PruneConfig(redundancy=0.03, encoder_keep=0.5, encoder_layer=1)
    with pytest.raises(ConfigError, match="encoder_keep=1"):
        parse_prune({"encoder_keep": 1})
