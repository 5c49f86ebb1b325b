"""PruneConfig.encoder_tolerance and redundancy="auto" in requests: as much of the encoder as a picture needs."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.families import load_fixtures

from star_edge import PRESETS, PruneConfig, StarVLM, Video, refvlm
from star_edge.errors import ConfigError, ContextLengthError, EngineClosedError, EngineError
from star_edge.pruning.presets import override
from star_edge.pruning.selection import REACH
from star_edge.server.schema import parse_prune
from star_edge.vision import row_window

FIXTURES = load_fixtures()
ANY_SIZE = ("qwen2-vl", "qwen2.5-vl", "pixtral")
FIXED_SIZE = ("llava", "gemma3", "smolvlm")
STRICT = PruneConfig(encoder_keep=0.1, encoder_layer=1, encoder_tolerance=1e-4)


def half_blank(picture):
    picture = picture.copy()
    picture[: len(picture) // 2] = 220
    return picture


def ask(engine, fixture, config, picture):
    prompt = fixture.prompts[0]
    text = prompt.text if len(prompt.pictures) == 1 else None
    if text is None:
        return engine.read_prompt("what?", picture, config)
    return engine.read_prompt(text, [picture], config, chat=False)


def check(engine, fixture, config, picture):
    """Units that stay. All stay: stock's bits. Otherwise each has one that stays within reach, and all are counted."""
    stock, _ = ask(engine, fixture, None, picture)
    state, report = ask(engine, fixture, config, picture)
    assert not report.notes and report.encoder_layer == 1
    n = report.n_encoder_kept
    assert np.array_equal(state.logits, stock.logits) == (n == report.n_image_tokens)
    for image in report.images:
        assert n == report.n_image_tokens or image.vision_mass.sum() == image.n_tokens
        places = np.argwhere(image.kept_on_grid(image.encoder_kept))
        everywhere = np.argwhere(np.ones(image.grid, bool))
        assert np.abs(everywhere[:, None] - places).max(axis=2).min(axis=1).max() <= REACH
    return n, report.n_image_tokens


@pytest.mark.parametrize("name", ANY_SIZE)
def test_each_picture_keeps_what_it_needs(name):
    fixture = FIXTURES[name]
    busy = fixture.prompts[0].pictures[0]
    with fixture.engine("fa") as engine:
        (plain, _), (half, _), (all_of_it, n) = (
            check(engine, fixture, STRICT, picture) for picture in (np.full_like(busy, 220), half_blank(busy), busy)
        )
    assert plain < n / 2 and plain < half <= all_of_it == n


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_a_looser_tolerance_keeps_less(name):
    """Position embeddings of these are added to what is seen: no two places of a plain picture are alike."""
    fixture = FIXTURES[name]
    busy = fixture.prompts[0].pictures[0]
    with fixture.engine("fa") as engine:
        counts = [check(engine, fixture, replace(STRICT, encoder_tolerance=t), busy) for t in (1e-4, 0.75, 1.25)]
    (strict, n), (middle, _), (loose, _) = counts
    assert n == strict > middle > loose


@pytest.fixture(scope="module")
def vlm():
    fixture = FIXTURES["qwen2-vl"]
    with fixture.engine("fa") as engine:
        yield engine


@pytest.fixture(scope="module")
def picture():
    return half_blank(FIXTURES["qwen2-vl"].prompts[0].pictures[0])


def test_the_cache_tells_tolerances_apart(vlm, picture):
    loose = replace(STRICT, encoder_tolerance=3.0)
    counts = {}
    for config in (STRICT, loose, replace(STRICT, encoder_tolerance=None)):
        state, report = vlm.read_prompt("what?", picture, config)
        again, found = vlm.read_prompt("what?", picture, config)
        assert not report.images[0].cached and found.images[0].cached
        assert np.array_equal(state.logits, again.logits) and found.n_encoder_kept == report.n_encoder_kept
        counts[config.encoder_tolerance] = report.n_encoder_kept
    assert counts[1e-4] > counts[3.0] >= counts[None]


def test_stages_after_it_keep_no_more_than_there_is(vlm, picture):
    _, report = vlm.read_prompt("what?", picture, replace(STRICT, vision_keep=0.1, decoder_keep=0.1))
    image = report.images[0]
    assert report.n_encoder_kept > report.n_vision_kept == round(0.1 * image.n_tokens) == report.n_decoder_kept
    _, report = vlm.read_prompt("what?", picture, replace(STRICT, decoder_keep=0.1, vision_tolerance=None))
    assert report.n_vision_kept == report.n_encoder_kept > report.n_decoder_kept
    _, report = vlm.read_prompt("what?", picture, "fast")
    assert not report.notes and report.encoder_layer and report.n_redundant > 0


def test_the_context_holds_it_down():
    """Without a vision stage what stays must fit: as much as leaves room for an answer, and the report says so."""
    fixture = FIXTURES["qwen2-vl"]
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
    with StarVLM(fixture.text, fixture.mmproj, n_ctx=256, n_threads=1) as engine:
        _, report = engine.read_prompt("what?", noise, STRICT)
        n = report.n_encoder_kept
        assert 26 < n < 256 and report.notes == [
            f"there is room for {n} of 256 image tokens, which is less than encoder_tolerance asks for"
        ]
        _, report = engine.read_prompt("what?", noise, replace(STRICT, vision_keep=0.1))
        assert report.n_encoder_kept == 256 and not report.notes
        with pytest.raises(ContextLengthError):
            engine.read_prompt("what?", noise, replace(STRICT, encoder_keep=0.99))


def test_an_encoder_that_cannot_answers_without_it():
    """A tolerance asks for what model and picture allow, so there is no note; a share that is asked for has one."""
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1) as engine:
        stock, _ = engine.read_prompt("what?", refvlm.DEMO_IMAGE, None)
        for config, notes in (
            (PruneConfig(redundancy="auto"), 0),
            (replace(STRICT, redundancy="auto"), 0),
            (PruneConfig(encoder_keep=0.5), 1),
            (PruneConfig(redundancy="exact"), 1),
        ):
            state, report = engine.read_prompt("what?", refvlm.DEMO_IMAGE, config)
            assert np.array_equal(state.logits, stock.logits) and len(report.notes) == notes
            assert report.encoder_layer is None and report.n_redundant == 0


@pytest.mark.parametrize("name", ["qwen2-vl", "llava", "gemma3", "granite-vision", "mobilevlm", "minicpmv"])
def test_an_engine_says_which_stages_it_has(name):
    """As its requests have them."""
    fixture = FIXTURES[name]
    with fixture.engine("fa") as engine:
        says = engine.stages
        picture = fixture.prompts[0].pictures[0]
        _, report = engine.read_prompt("what?", picture, PruneConfig(encoder_keep=0.5, redundancy="exact"))
    no_stage = [note for note in report.notes if note.startswith("no encoder stage: ")]
    assert says["encoder_stage"] == ("yes" if report.encoder_layer else no_stage[0].replace("no encoder stage", "no"))
    assert (says["redundancy"] == "yes") == (not any("left out before the encoder" in note for note in report.notes))
    with pytest.raises(EngineClosedError):
        _ = engine.stages


@pytest.mark.parametrize("name", ["qwen2-vl", "gemma3"])
def test_an_encoder_stage_that_fails_drops_nothing(name, monkeypatch):
    """Neither in the encoder nor, in its place, after it."""
    fixture = FIXTURES[name]
    picture = fixture.prompts[0].pictures[0]

    def fail(*_):
        raise EngineError("it failed")

    with fixture.engine("fa") as engine:
        stock, _ = engine.read_prompt("what?", picture, None)
        monkeypatch.setattr(type(engine._reader.encoding.window), "rest", fail)
        for config in (PruneConfig(encoder_keep=0.5), STRICT):
            state, report = engine.read_prompt("what?", picture, config)
            assert report.notes == ["no encoder stage: it failed"] and report.n_vision_kept == report.n_image_tokens
            assert np.array_equal(state.logits, stock.logits)


def test_a_bounded_number_of_graphs_is_remembered(monkeypatch):
    """Of encoders whose rows leave: a server sees many sizes of pictures, and each keeps another number of tokens."""
    fixture = FIXTURES["gemma3"]
    picture = fixture.prompts[0].pictures[0]
    monkeypatch.setattr(row_window, "_KEPT", 3)
    with fixture.engine("fa") as engine:
        counts = [
            engine.read_prompt("what?", picture, PruneConfig(encoder_keep=n))[1].n_encoder_kept
            for n in (6, 12, 18, 24, 6)
        ]
        assert counts == [6, 12, 18, 24, 6] and len(engine._reader.encoding.window._rehearsals) == 3


def test_auto_is_exact_where_the_encoder_can(vlm, picture):
    states = [vlm.read_prompt("what?", picture, PruneConfig(redundancy=r)) for r in ("auto", "exact")]
    assert np.array_equal(states[0][0].logits, states[1][0].logits)
    assert states[0][1].n_redundant == states[1][1].n_redundant > 0


@pytest.mark.parametrize("redundancy", ["off", "exact"])
def test_another_process_finds_it(picture, redundancy, tmp_path):
    """In the directory of the cache, also where the picture needs all of its tokens."""
    fixture = FIXTURES["qwen2-vl"]
    noise, plain = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8), np.full_like(picture, 220)
    config = replace(STRICT, redundancy=redundancy)
    states = []
    for _ in range(2):
        with StarVLM(fixture.text, fixture.mmproj, n_ctx=1024, n_threads=1, image_cache_dir=tmp_path) as engine:
            states += [engine.read_prompt("what?", shown, config) for shown in (plain, noise)]
    for (first, report), (second, found) in zip(states[:2], states[2:]):
        assert not report.images[0].cached and found.images[0].cached
        assert np.array_equal(first.logits, second.logits)
        before, after = (image.vision_mass for image in (report.images[0], found.images[0]))
        assert before is after is None or np.array_equal(before, after)
    assert states[0][1].n_encoder_kept < states[1][1].n_encoder_kept == states[1][1].n_image_tokens


def test_each_frame_keeps_what_it_needs():
    """However the frames of a video divide their least: there is room for all, and so each may have all of it."""
    fixture = FIXTURES["gemma3"]
    busy = fixture.prompts[0].pictures[0]
    with fixture.engine("fa") as engine:
        frames = [busy, *[np.full_like(busy, shade) for shade in (30, 220)]]
        _, report = engine.read_prompt(
            "what?", Video(frames), replace(STRICT, encoder_keep=0.3, encoder_tolerance=1e-9)
        )
    assert report.n_encoder_kept == report.n_image_tokens and not report.notes


def test_what_must_be_processed_at_once_fits():
    """Of Gemma 3 whole rows of tokens stay: as many as fit the decode of all rows of an image, and not one row more."""
    fixture = FIXTURES["gemma3"]
    busy = fixture.prompts[0].pictures[0]
    with StarVLM(fixture.text, fixture.mmproj, n_ctx=1024, n_ubatch=20, n_threads=1) as engine:
        _, report = engine.read_prompt("what?", busy, STRICT)
        _, pruned = engine.read_prompt("what?", busy, replace(STRICT, vision_keep=0.3))  # which makes it fit
    assert report.images[0].grid == (6, 6) and report.n_encoder_kept == 18
    assert report.notes[-1].startswith("there is room for 18 of 36 image tokens")
    assert pruned.n_encoder_kept == 36 and pruned.n_vision_kept == 11 and not pruned.notes


def test_where_it_changes_nothing(vlm, picture):
    for config, why in (
        (PruneConfig(encoder_tolerance=0.2), "encoder_keep keeps all tokens"),
        (replace(STRICT, representatives="none"), 'representatives="none"'),
        (replace(STRICT, budget="prompt"), 'budget="prompt"'),
    ):
        state, report = vlm.read_prompt("what?", picture, config)
        assert report.notes == [f"encoder_tolerance={config.encoder_tolerance:g} changes nothing: {why}"]
        without, _ = vlm.read_prompt("what?", picture, replace(config, encoder_tolerance=None))
        assert np.array_equal(state.logits, without.logits)


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), True, "0.2"])
def test_values_that_cannot_be_used(value):
    with pytest.raises(ConfigError, match="encoder_tolerance="):
        PruneConfig(encoder_keep=0.5, encoder_tolerance=value)


def test_a_share_that_is_given_holds():
    fast = PRESETS["fast"]
    assert override(fast, encoder_keep=0.3) == replace(fast, encoder_keep=0.3, encoder_tolerance=None)
    assert override(fast, encoder_keep=0.3, encoder_tolerance=0.2).encoder_tolerance == 0.2
    assert override(fast, vision_keep=0.5).prunes_in_encoder is False  # which would leave less
    assert override(fast, vision_keep=0.5).encoder_tolerance is None
    assert override(fast, budget="prompt").encoder_tolerance is None
    # What adapts keeps at least its share: it contradicts no stage after it
    adapts = PruneConfig(0.3, 0.15, encoder_keep=0.1, encoder_tolerance=0.1)
    for change in ({"image_max_tokens": 0.5}, {"budget": "crop"}, {"encoder_layer": 3}, {"encoder_tolerance": 0.3}):
        assert override(adapts, **change) == replace(adapts, **change)
    stage = {"encoder_keep": 0.12, "encoder_tolerance": 0.05}
    assert override(PRESETS["balanced"], **stage) == replace(PRESETS["balanced"], **stage)
    both = {"vision_keep": 0.5, "encoder_tolerance": 0.1}
    assert override(adapts, **both) == replace(adapts, **both)
    assert override(adapts, vision_keep=0.5).prunes_in_encoder is False
    assert override(adapts, budget="prompt") == PruneConfig(0.3, 0.15, budget="prompt")
    assert override(adapts, encoder_keep=0.05) == PruneConfig(encoder_keep=0.05)
    body = {"encoder_keep": 0.3, "encoder_tolerance": 0.2, "redundancy": "auto"}
    assert parse_prune(body) == PruneConfig(**body)
    assert PruneConfig(**fast.to_dict()) == fast
