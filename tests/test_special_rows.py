"""Rows that show no place (row ends, tile separators): they stay at every stage, stand for nothing else, and are in no
budget.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers.gguf_files import rewrite
from helpers.models import random_image

from star_edge import PruneConfig, StarVLM
from star_edge.errors import ConfigError, ContextLengthError
from star_edge.llamacpp.context import DecoderContext
from star_edge.pruning.config import keep_count
from star_edge.pruning.representatives import REPRESENTATIVES, merge, select
from star_edge.pruning.scorers import DECODER_SCORERS, VISION_SCORERS
from star_edge.pruning.selection import Tokens, apart
from star_edge.vision import encoder as encoder_module
from star_edge.vision import profiles

ENDS = np.arange(49) % 7 == 6  # the last of each row of 7 x 7 tokens
SPECIAL = np.flatnonzero(ENDS)


@pytest.fixture
def row_ends(monkeypatch):
    """LLaVA's profile, as if the encoder put a learned row end in place of the last patch of each row."""
    ordinary = np.flatnonzero(~ENDS)
    profile = replace(
        profiles.PROFILES["mlp"],
        to_tokens=lambda rows, layout: rows[layout.index[ordinary]],
        grid=lambda n, nx, ny: (7, 6),
        special=lambda n, grid: ENDS,
        to_cells=None,
        cls_first=None,
    )
    monkeypatch.setitem(profiles.PROFILES, "mlp", profile)


@pytest.fixture
def found_row_ends(monkeypatch):
    """The same rows in an encoder without a profile, whose rows are looked at once they are there."""
    monkeypatch.setattr(profiles, "PROFILES", {})
    monkeypatch.setattr(encoder_module, "repeated_rows", lambda embeddings: ENDS)


def load(families, **options):
    models = families["llama"]
    return StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1, **options)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_as_if_special_tokens_were_not_there(kind, share):
    rng = np.random.default_rng(1)
    special = np.zeros(30, bool)
    special[[0, 7, 8, 29]] = True
    fields = {"mass": rng.random(30) + 1, "attention": rng.random(30).astype(np.float32)}
    tokens = Tokens(rng.standard_normal((30, 12)).astype(np.float32), np.arange(30), (5, 6), **fields)
    tokens.mass[special] = 1
    choose = lambda t: select(kind, t, t.attention, 9, share)
    got, alone = apart(special, tokens, choose), choose(tokens.part(~special))
    ordinary = np.flatnonzero(~special)
    assert got.kept.tolist() == sorted([0, 7, 8, 29, *ordinary[alone.kept]])
    is_special = special[got.kept]
    if alone.mass is None:
        assert got.mass is None
    else:
        assert (got.mass[is_special] == 1).all() and np.array_equal(got.mass[~is_special], alone.mass)
    assert (got.scores[special] == 0).all() and np.array_equal(got.scores[ordinary], alone.scores)
    if alone.group is not None:
        merged = merge(tokens.vectors, got)
        assert np.array_equal(merged[is_special], tokens.vectors[special])
        assert np.array_equal(merged[~is_special], merge(tokens.vectors[ordinary], alone))


def test_nothing_but_special_tokens_and_none():
    tokens = Tokens(np.eye(4, dtype=np.float32), np.arange(4))
    assert apart(np.ones(4, bool), tokens, None).kept.tolist() == [0, 1, 2, 3]
    for special in (None, np.zeros(4, bool)):
        assert apart(special, tokens, lambda t: t) is tokens


def test_counts():
    assert [keep_count("k", keep, 49, 7) for keep in (0.5, 0.001, 1.0, 5, 45)] == [28, 8, 49, 12, 49]
    assert keep_count("k", 0.5, 7, 7) == keep_count("k", 3, 7, 7) == 7
    with pytest.raises(ConfigError, match="over the image's 49 tokens.*1 to 42"):
        keep_count("k", 50, 49, 7)


def check(image, n_vision, n_decoder):
    assert (len(image.vision_kept), len(image.decoder_kept)) == (n_vision, n_decoder)
    for kept, mass in ((image.vision_kept, image.vision_mass), (image.decoder_kept, image.decoder_mass)):
        assert set(SPECIAL) <= set(kept)
        if mass is not None:
            assert (mass[ENDS[kept]] == 1).all()
            assert np.isclose(mass.sum(), 49)
    assert (image.cells[ENDS] == -1).all() and sorted(image.cells[~ENDS]) == list(range(42))
    assert image.n_special == 7


@pytest.mark.parametrize("vision_scorer", VISION_SCORERS)
@pytest.mark.parametrize("known", ["row_ends", "found_row_ends"])
def test_vision_stage(families, request, known, vision_scorer):
    request.getfixturevalue(known)
    with load(families) as vlm:
        for kind in REPRESENTATIVES:
            config = PruneConfig(vision_keep=0.5, vision_scorer=vision_scorer, representatives=kind, vision_share=0.5)
            _, report = vlm.read_prompt("what?", random_image(1), config)
            check(report.images[0], 28, 28)
            assert report.figures()["images"][0]["n_special"] == 7
            if report.images[0].vision_scores is not None:
                assert (report.images[0].vision_scores[ENDS] == 0).all()


@pytest.mark.parametrize("decoder_scorer", DECODER_SCORERS)
@pytest.mark.parametrize("known", ["row_ends", "found_row_ends"])
def test_decoder_stage(families, request, known, decoder_scorer):
    request.getfixturevalue(known)
    with load(families) as vlm:
        for kind in REPRESENTATIVES:
            config = PruneConfig(0.5, 0.25, 3, decoder_scorer=decoder_scorer, representatives=kind)
            _, report = vlm.read_prompt("what?", random_image(1), config)
            image = report.images[0]
            if kind == "contextual":  # it has no masses
                assert set(SPECIAL) <= set(image.decoder_kept)
            else:
                check(image, 28, 18)
            assert report.windows == [(3, 18)]
        windows = PruneConfig(0.5, windows=((2, 0.25), (4, 5)), decoder_scorer=decoder_scorer)
        _, report = vlm.read_prompt("what?", random_image(1), windows)
        check(report.images[0], 28, 12)
        assert report.windows == [(2, 18), (4, 12)]


def test_special_rows_are_not_changed(families, row_ends):
    """What the decoder gets of them is what the encoder made."""
    from star_edge.stopwatch import Stopwatch
    from star_edge.vision.stage import encode_images, run_vision_stage

    with load(families) as vlm:
        prompt = vlm.tokenize("<__media__>a", [random_image(1)], chat=False)
        plan, _ = vlm._reader.plan(prompt, PruneConfig(vision_keep=5))
        encoded = encode_images(plan.images, vlm.encoder, plan.config, Stopwatch())
        segments, images, _ = run_vision_stage(plan, encoded, False, Stopwatch())
        prompt.close()
    segment = next(s for s in segments if s.image is not None)
    kept = images[0].selection.kept
    is_special = ENDS[kept]
    assert np.array_equal(segment.rows.embeddings[is_special], encoded[0].embeddings[ENDS])
    assert not np.array_equal(segment.rows.embeddings[~is_special], encoded[0].embeddings[kept[~is_special]])


def test_corrected_counts_are_checked_before_anything_is_decoded(families, found_row_ends, monkeypatch):
    """28 tokens stay where 25 were expected; the prompt fits with 27."""
    models = families["llama"]
    with StarVLM(models.text, models.mmproj, n_ctx=256, n_threads=1) as vlm:
        n_text = vlm.decoder.n_ctx - 28
        prompt = "<__media__>" + "a" * (n_text - 1)  # and BOS
        half = PruneConfig(vision_keep=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(DecoderContext, "decode", lambda *a, **k: pytest.fail("decoded"))
            with pytest.raises(ContextLengthError, match=rf"takes {n_text + 28} tokens \({n_text} text, 28 image\)"):
                vlm.read_prompt(prompt, random_image(1), half, chat=False)
        _, report = vlm.read_prompt(prompt[:-1], random_image(1), half, chat=False)
        assert report.n_kv_cells == n_text - 1 + 28


@pytest.mark.parametrize("budget", ["image", "prompt"])
@pytest.mark.parametrize("known", ["row_ends", "found_row_ends"])
def test_images_that_share_their_tokens(families, request, tmp_path, known, budget):
    """Two pictures of five crops each: no special row is in what they share."""
    request.getfixturevalue(known)
    mmproj = rewrite(
        families["llama"].mmproj, tmp_path / "mmproj.gguf", add=[("clip.vision.image_grid_pinpoints", [196, 196])]
    )
    with StarVLM(families["llama"].text, mmproj, n_ctx=1024, n_threads=1) as vlm:
        pictures = [random_image(1, 196, 196), random_image(2, 196, 196)]
        _, report = vlm.read_prompt("what?", pictures, PruneConfig(0.3, 40, 3, budget=budget))
    assert len(report.images) == 10 and report.figures()["pictures"][0]["n_special"] == 35
    kept = [(p["n_vision_kept"], p["n_decoder_kept"]) for p in report.pictures]
    assert report.n_vision_kept == 2 * (35 + 63) and report.n_decoder_kept == 2 * (35 + 40)
    if budget == "image":
        assert kept == [(98, 75)] * 2
    for image in report.images:
        check(image, len(image.vision_kept), len(image.decoder_kept))
        assert len(image.vision_kept) >= 7 + 3 and len(image.decoder_kept) >= 7 + 2  # a quarter of 63 / 5 and of 40 / 5
