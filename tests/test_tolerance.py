"""PruneConfig.vision_tolerance in requests: as many tokens as a picture needs, as far as there is room."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.models import random_image

from star_edge import PRESETS, PruneConfig, StarVLM, Video, refvlm
from star_edge.batch import Settings, read_tasks
from star_edge.errors import ConfigError, ContextLengthError
from star_edge.pruning.presets import override
from star_edge.server.schema import parse_prune
from star_edge.vision.stage import Room

QUESTION = "what color is the star?"
NEEDS = PruneConfig(0.05, 0.02, vision_tolerance=0.05)
PLAIN = np.full((168, 168, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1) as engine:
        yield engine


def test_each_picture_keeps_what_it_needs(vlm):
    """Of one prompt: a plain picture, a scene, and noise. Every token stays within the tolerance of its own."""
    pictures = [PLAIN, refvlm.DEMO_IMAGE, random_image(1, 168, 168)]
    _, report = vlm.read_prompt(QUESTION, pictures, NEEDS)
    kept = [len(image.vision_kept) for image in report.images]
    assert 7 <= kept[0] < kept[1] < kept[2] and not report.notes
    assert [image.vision_mass.sum() for image in report.images] == pytest.approx([144] * 3)
    assert [len(image.decoder_kept) for image in report.images] == [3] * 3
    tighter = vlm.read_prompt(QUESTION, pictures, replace(NEEDS, vision_tolerance=0.01))[1]
    assert all(len(a.vision_kept) >= n for a, n in zip(tighter.images, kept))
    fixed = vlm.read_prompt(QUESTION, pictures, replace(NEEDS, vision_tolerance=None))[1]
    assert [len(image.vision_kept) for image in fixed.images] == [7] * 3


def test_the_decoder_stage_keeps_no_more_than_there_is(vlm):
    """A count for one stage and a share for the other have no order, and a stage may keep everything."""
    for config in (PruneConfig(10, 0.5, 3, vision_tolerance=0.1), PruneConfig(10, 1.0, 3, vision_tolerance=0.1)):
        _, report = vlm.read_prompt(QUESTION, refvlm.DEMO_IMAGE, config)
        image = report.images[0]
        assert 10 < len(image.vision_kept) < 72
        assert np.array_equal(image.decoder_kept, image.vision_kept)


def test_the_context_holds_it_down():
    """What vision_keep needs fits, what the tolerance asks for does not: as much as leaves room for an answer."""
    noise = [random_image(i, 168, 168) for i in range(2)]
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256, n_threads=1) as engine:
        answer = engine.generate(QUESTION, noise, NEEDS, max_tokens=4)
        report = answer.report
        n = report.n_vision_kept
        assert 14 < n < 288 and n + report.n_text_tokens == 256 - 64
        (note,) = report.notes
        assert note == f"there is room for {n} of 288 image tokens, which is less than vision_tolerance asks for"
        _, report = engine.read_prompt(QUESTION, [PLAIN] * 2, NEEDS)
        assert not report.notes
        with pytest.raises(ContextLengthError):
            engine.read_prompt(QUESTION, noise, replace(NEEDS, vision_keep=0.95))
        _, report = engine.read_prompt(QUESTION, noise, replace(NEEDS, vision_keep=0.75, decoder_keep=0.1))
        assert (
            report.n_vision_kept == 216 and len(report.notes) == 1
        )  # more than leaves room for an answer, but it fits


def test_images_that_share_a_budget(vlm):
    """One budget for all is kept to: what a frame repeats is not needed again, which a frame alone cannot tell."""
    pictures = [PLAIN, random_image(1, 168, 168)]
    _, report = vlm.read_prompt(QUESTION, pictures, replace(NEEDS, budget="prompt"))
    assert report.n_vision_kept == 14 and report.notes == ['vision_tolerance=0.05 changes nothing: budget="prompt"']
    assert override(NEEDS, budget="prompt") == replace(NEEDS, budget="prompt", vision_tolerance=None)
    with_it, without = (
        vlm.read_prompt(QUESTION, pictures, replace(NEEDS, budget="prompt", vision_tolerance=tolerance))[0]
        for tolerance in (0.05, None)
    )
    assert np.array_equal(with_it.logits, without.logits)


def test_each_frame_keeps_what_it_needs(vlm):
    """However the frames of a video divide their least: there is room for all, and so each may have all of it."""
    frames = [random_image(1, 168, 168)] * 3
    _, report = vlm.read_prompt(QUESTION, Video(frames), replace(NEEDS, vision_tolerance=1e-9))
    assert [len(image.vision_kept) for image in report.images] == [144] * 3 and not report.notes


def test_notes_where_it_changes_nothing(vlm):
    for config, why in (
        (PruneConfig(vision_tolerance=0.2), "vision_keep keeps all tokens"),
        (PruneConfig(0.5, representatives="none", vision_tolerance=0.2), 'representatives="none"'),
    ):
        _, report = vlm.read_prompt(QUESTION, refvlm.DEMO_IMAGE, config)
        assert report.notes == [f"vision_tolerance=0.2 changes nothing: {why}"]
        assert report.n_vision_kept == (144 if config.vision_keep == 1.0 else 72)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, float("nan"), float("inf"), True, "0.2", [0.2]])
def test_values_that_cannot_be_used(value):
    with pytest.raises(ConfigError, match="vision_tolerance="):
        PruneConfig(0.5, vision_tolerance=value)


def test_a_budget_that_is_given_holds():
    assert override(PRESETS["balanced"], vision_keep=0.5) == replace(
        PRESETS["balanced"], vision_keep=0.5, vision_tolerance=None
    )
    assert override(PRESETS["balanced"], decoder_keep=0.5).vision_keep == 1.0
    assert override(PRESETS["balanced"], decoder_keep=0.5).vision_tolerance is None
    assert override(PRESETS["balanced"], decoder_keep=0.1).vision_tolerance == PRESETS["balanced"].vision_tolerance
    both = override(PRESETS["balanced"], vision_keep=0.5, vision_tolerance=0.3)
    assert (both.vision_keep, both.vision_tolerance) == (0.5, 0.3)
    assert override(PRESETS["document"], decoder_layer=3).decoder_windows(6) == [(3, 0.15)]


def test_batches_and_requests_take_it(tmp_path):
    line = {"image": str(refvlm.DEMO_IMAGE), "prompt": "?", "preset": "fast", "vision_tolerance": 0.3}
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    (task,) = read_tasks(tmp_path / "t.jsonl", None, Settings(None))
    assert task.settings.prune == replace(PRESETS["fast"], vision_tolerance=0.3)
    body = {"vision_keep": 0.3, "vision_tolerance": 0.2}
    assert parse_prune(body) == PruneConfig(**body)
    assert PruneConfig(**PRESETS["document"].to_dict()) == PRESETS["document"]


def test_room_is_shared_by_what_would_be_dropped():
    causal, whole = SimpleNamespace(causal=True), SimpleNamespace(causal=False)
    assert Room((100,)).fill([causal, causal], [10, 20], [50, 100], 10) == [30, 60]
    assert Room((1000,)).fill([causal, causal], [10, 20], [50, 100], 10) == [50, 100]
    assert Room((20,)).fill([causal, causal], [10, 20], [50, 100], 10) == [10, 20]  # none: the least is another's check
    # What fits into a sliding window stays in it; what does not has the context
    assert Room((50, 200)).fill([causal], [20], [500], 10) == [40]
    assert Room((50, 200)).fill([causal], [60], [500], 10) == [190]
    # Rows that attend to each other are processed at once
    assert Room((1000,), 64).fill([whole, causal], [10, 10], [100, 100], 10) == [64, 100]
    assert Room((1000,), 64).fill([whole], [80], [100], 10) == [80]
