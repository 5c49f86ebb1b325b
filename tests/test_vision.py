"""The vision stage: scores against float64 references, which token shows which place, and encoders without a
profile.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers import bounds
from helpers.models import random_image
from helpers.reference_qwen2vl_vision import QwenVisionEncoder

from star_edge import PRESETS, StarVLM, refvlm
from star_edge.io.images import load_image
from star_edge.vision import profiles
from star_edge.vision.chunks import ImageChunk
from star_edge.vision.profiles import repeated_rows


def encode(vlm, image):
    prompt = vlm.tokenize("<__media__>a", [image], chat=False)
    try:
        chunk = next(c for c in prompt.chunks if isinstance(c, ImageChunk))
        encoded = vlm.encoder.encode(chunk)
        encoded.embeddings = encoded.embeddings.copy()
        return chunk, encoded
    finally:
        prompt.close()


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
@pytest.mark.parametrize(("height", "width"), [(112, 112), (84, 140), (224, 280)])
def test_qwen2vl_scores(families, flash_attn, height, width):
    models = families["qwen2vl"]
    image = random_image(5, height, width)
    reference = QwenVisionEncoder(str(models.mmproj))
    embeddings, attention = reference.encode(image)
    received = reference.received(attention)
    with StarVLM(models.text, models.mmproj, n_ctx=512, flash_attn=flash_attn, n_threads=2) as vlm:
        chunk, encoded = encode(vlm, image)
    assert chunk.grid == (height // 28, width // 28)
    assert bounds.are_features(encoded.embeddings, embeddings) and not bounds.are_features(
        np.roll(embeddings, 1, axis=0), embeddings
    )
    limit = bounds.share(bounds.relative([(encoded.embeddings, embeddings)])) * received.max()
    assert bounds.distance(encoded.scores, received) <= limit < bounds.distance(np.roll(received, 1), received)


def test_qwen2vl_positions(families):
    """Kept tokens keep their (t, y, x)."""
    models = families["qwen2vl"]
    with StarVLM(models.text, models.mmproj, n_ctx=512) as vlm:
        prompt = vlm.tokenize("ab<__media__>c", [random_image(5, 84, 140)], chat=False)
        chunk = prompt.chunks[1]
        prompt.close()
    y, x = np.divmod(np.arange(15), 5)
    assert np.array_equal(chunk.positions, [np.zeros(15), y, x, np.zeros(15)])
    assert chunk.n_positions == 5 and chunk.causal


def test_tokens_show_the_place_that_the_report_says():
    """Changing one patch changes the token of that patch most, for every patch tried."""
    image = load_image(refvlm.DEMO_IMAGE)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as vlm:
        _, before = encode(vlm, image)
        for row in range(1, 12, 4):
            for column in range(1, 12, 4):
                changed = image.copy()
                block = changed[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
                block[:] = 255 - block
                _, after = encode(vlm, changed)
                token = int(((after.embeddings - before.embeddings) ** 2).sum(axis=1).argmax())
                assert after.cells[token] == 12 * row + column
    assert after.cells[-1] == -1  # CLS, which stock llama.cpp feeds as the last token
    assert sorted(after.cells[:-1]) == list(range(1, 144))


def test_metadata_that_promise_another_layer_are_corrected_by_the_graph(families, monkeypatch):
    """The layer to read is found from the running graph when the file's metadata mislead, in both directions."""
    models = families["llama"]
    image = random_image(1)
    with StarVLM(models.text, models.mmproj, n_ctx=512) as vlm:
        _, expected = encode(vlm, image)
        layer = vlm.encoder._layer
        for wrong in (0, layer + 5):
            vlm.encoder._layer = wrong
            _, encoded = encode(vlm, image)
            assert np.array_equal(encoded.scores, expected.scores)
            assert vlm.encoder._layer == layer


@pytest.mark.parametrize("preset", ["star", "visionzip", "balanced", "divprune"])
def test_encoder_without_a_profile_is_pruned_by_embeddings(families, monkeypatch, preset):
    """No attention is read, what needs it goes by diversity, and the report says both."""
    monkeypatch.setattr(profiles, "PROFILES", {})
    models = families["llama"]
    config = replace(
        PRESETS[preset],
        encoder_keep=1.0,
        encoder_tolerance=None,
        redundancy="off",
        vision_keep=0.5,
        vision_tolerance=None,
        decoder_keep=0.25,
        decoder_layer=2,
    )
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        state, report = vlm.read_prompt("what?", random_image(1), config)
        other, _ = vlm.read_prompt("what?", random_image(1), replace(config, vision_scorer="maxmin"))
    assert (report.n_vision_kept, report.n_decoder_kept) == (25, 12)
    assert len(report.notes) == 1 and "'mlp' has no profile" in report.notes[0]
    by_attention = {"star": "attention", "visionzip": "cls"}.get(preset)
    assert report.notes[0].endswith(f"maxmin in place of {by_attention}" if by_attention else "embeddings alone")
    assert np.array_equal(state.logits, other.logits)
    assert report.images[0].grid is None  # 49 tokens are a square, which says nothing of where they lie


def test_repeated_rows():
    rows = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    assert not repeated_rows(rows).any()
    ends = rows.copy()
    ends[7::8] = rows[0] + 1  # learned row ends
    assert np.flatnonzero(repeated_rows(ends)).tolist() == [7, 15, 23, 31, 39]
    flat = ends.copy()
    flat[16:19] = flat[20]  # an area of one colour
    assert np.flatnonzero(repeated_rows(flat)).tolist() == [7, 15, 23, 31, 39]
    near = rows.copy()
    near[3, :8], near[30, :8] = 1, 1  # alike at first only
    assert not repeated_rows(near).any()
    twice = np.concatenate([rows, ends])  # a picture whose overview is its only tile
    assert not repeated_rows(twice).any()


@pytest.mark.parametrize(("height", "width", "side"), [(2, 3, 2), (4, 4, 1), (3, 2, 4)])
def test_maps_of_rows_to_tokens(height, width, side):
    """A raster pooled by squares is what the same rows give when the encoder has put each square in turn."""
    raster = np.random.default_rng(0).random((height * side, width * side))
    in_blocks = raster.reshape(height, side, width, side).swapaxes(1, 2).reshape(-1)
    layout = profiles.Layout(height * width, (height, width))
    want = [
        raster[side * y : side * y + side, side * x : side * x + side].mean()
        for y in range(height)
        for x in range(width)
    ]
    assert np.allclose(profiles.on_raster(raster.ravel(), layout), want)
    assert np.allclose(profiles.in_turn(side * side)(in_blocks, layout), want)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (2, 3), (6, 5), (5, 6), (64, 64), (7, 55)])
def test_grid_with_row_ends(rows, columns):
    """The number of tokens and the shape of the image say how many there are in a row."""
    n = rows * (columns + 1) - 1
    grid = profiles.grid_with_row_ends(n, (rows * 28, columns * 28))
    assert grid == (rows, columns)
    laid_out = np.append(profiles.row_ends(n, grid), True).reshape(rows, columns + 1)
    assert laid_out[:, -1].all() and not laid_out[:, :-1].any()
    assert profiles.grid_with_row_ends(n + 1, (rows * 28, columns * 28)) is None


def test_sampled_query_rows_estimate_the_mean(families):
    """Large encoders score with a sample of query rows; the estimate stays close to the mean over all."""
    models = families["qwen2vl"]
    from star_edge.vision import encoder as module

    image = random_image(6, 336, 336)
    with StarVLM(models.text, models.mmproj, n_ctx=512) as vlm:
        _, every = encode(vlm, image)
        before, module.MAX_QUERY_ROWS = module.MAX_QUERY_ROWS, 144
        try:
            _, sampled = encode(vlm, image)
        finally:
            module.MAX_QUERY_ROWS = before
    assert not np.array_equal(every.scores, sampled.scores)
    assert np.corrcoef(every.scores, sampled.scores)[0, 1] > 0.98
    assert abs(sampled.scores.sum() / every.scores.sum() - 1) < 1e-3
