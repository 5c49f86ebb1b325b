"""star-edge bench on random models of real shapes: each runs, with the tokens and parameters that arithmetic says."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.synthetic_shapes import tiny

from star_edge import refvlm
from star_edge.benchmarking.run import run, shape_context, shape_request
from star_edge.benchmarking.summary import text_table
from star_edge.errors import ConfigError
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.pruning.config import PruneConfig
from star_edge.pruning.presets import PRESETS
from star_edge.synthetic import PICTURES, SHAPES, ModelShape, model_files

FAST = NamedConfig("fast", "presets", PRESETS["fast"])


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_run(name, tmp_path):
    """Each shape's graphs at a tiny size: stock and pruned answer, and the picture has the tokens that arithmetic
    says.
    """
    shape = tiny(name)
    with model_files(shape, tmp_path) as files:
        request = shape_request(shape, (0.25,))
        result = run(
            *files,
            {"n_ctx": shape_context(shape, 3)},
            [OFF, replace(FAST, prune=replace(PRESETS["fast"], vision_tolerance=None, encoder_tolerance=None))],
            ("flash", "fewer"),
            request,
            fewer=(0.25,),
            repeats=1,
            n_generate=3,
            with_memory=False,
        )
        written = sorted(p.name for p in tmp_path.iterdir())
        with model_files(shape, tmp_path):  # found again
            assert sorted(p.name for p in tmp_path.iterdir()) == written and len(written) == 2
    sides = {row["name"]: row for row in result["sides"]}
    stock, fast = sides["stock, flash attn"], sides["fast"]
    assert stock["image_tokens"] == fast["image_tokens"] == shape.n_image_tokens
    # 35 + 40 and what the encoder puts around: two tokens, or three and one around the overview, two before each tile,
    # one between rows
    extra = {
        "qwen2-vl-2b": 2,
        "qwen2.5-vl-3b": 2,
        "qwen3-vl-4b": 2,
        "qwen3.5-4b": 2,
        "qwen3.5-0.8b": 2,
        "gemma-3-4b": 2,
        "smolvlm-500m": 4 + 4 * 2 + 1,
    }.get(name, 0)
    assert stock["text_tokens"] == fast["text_tokens"] == 75 + extra
    assert (
        fast["average_tokens"] < stock["average_tokens"]
        and fast["kv_cells"] < stock["kv_cells"]
        and fast["kv_bytes"] < stock["kv_bytes"]
    )
    if name in (
        "qwen2-vl-2b",
        "qwen2.5-vl-3b",
        "qwen3-vl-4b",
        "qwen3.5-4b",
        "qwen3.5-0.8b",
        "llava-next-7b",
    ):  # dynamic resolution, and crops: a smaller picture has fewer tokens
        assert sides["stock, fewer tokens"]["image_tokens"] < shape.n_image_tokens
    elif name != "smolvlm-500m":
        assert "stock, fewer tokens" not in sides and any("smaller picture" in note for note in result["notes"])
    has_profile = result["model"]["vision_stage"] == "yes"
    assert has_profile == (fast["vision_kept"] < shape.n_image_tokens)
    assert has_profile or any("no vision stage" in note for note in fast["notes"])
    least = {"smolvlm-500m": 5, "gemma-3-4b": 1}.get(name, 0)  # one token of each image, which is all that so few leave
    assert fast["decoder_kept"] < fast["vision_kept"] or fast["decoder_kept"] == least
    assert fast["decoder_layer"] == 4


@pytest.mark.parametrize(
    "name, n_parameters",
    [
        ("llava-1.1b", 1.10e9),
        ("llava-1.5-7b", 6.74e9),
        ("smolvlm-500m", 362e6),
        ("qwen2-vl-2b", 1.54e9),
        ("qwen2.5-vl-3b", 3.09e9),
        ("qwen3-vl-4b", 4.02e9),
        ("gemma-3-4b", 3.88e9),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, n_parameters):
    """Of the text model, in billions: TinyLlama 1.10, Vicuna-7B 6.74, SmolLM2-360M 0.362, Qwen2.5-3B 3.09,
    Qwen3-4B 4.02, Gemma 3 4B 3.88.
    """
    d = SHAPES[name].decoder
    q, kv = d.n_heads * d.d_head, d.n_heads_kv * d.d_head
    layer = 2 * d.n_embd * q + 2 * d.n_embd * kv + 3 * d.n_embd * d.n_ff
    assert d.n_layers * layer + (1 if d.tied else 2) * d.n_vocab * d.n_embd == pytest.approx(n_parameters, rel=0.01)


def test_temporary_files_go_away_and_half_written_ones_do_not_stay(tmp_path, monkeypatch):
    shape = tiny("llava-1.5-7b")
    with model_files(shape) as files:
        assert all(f.exists() for f in files)
    assert not any(f.exists() or f.parent.exists() for f in files)

    def fail(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("star_edge.synthetic.store.write_encoder", fail)
    with (
        pytest.raises(ConfigError, match="No space left.*GiB are free.*more room"),
        model_files(shape, tmp_path / "new"),
    ):
        pass
    assert [p.name[:11] for p in (tmp_path / "new").iterdir()] == ["random-text"]
    small = ModelShape(shape.decoder, shape.encoder, "f16", (9, 9), 1, "")
    with pytest.raises(ConfigError, match="cannot be written"), model_files(small, refvlm.TEXT_MODEL):
        pass


@pytest.mark.parametrize(("kind", "low", "high"), [("photo", 1, 1), ("page", 0.5, 0.65), ("screenshot", 0.4, 0.6)])
def test_pictures_are_as_redundant_as_such_pictures_are(kind, low, high):
    """Squares of 28 pixels that are no copy of their left or upper neighbour. Of 40 rendered pages it was 0.52."""
    assert all(f(*size).shape == (size[1], size[0], 3) for f in PICTURES.values() for size in ((1, 1), (300, 7)))
    pixels = PICTURES[kind](896, 896)
    assert np.array_equal(pixels, PICTURES[kind](896, 896))
    squares = pixels.reshape(32, 28, 32, 28, 3).swapaxes(1, 2).reshape(32, 32, -1)
    alike = np.zeros((32, 32), bool)
    alike[:, 1:] |= (squares[:, 1:] == squares[:, :-1]).all(axis=-1)
    alike[1:] |= (squares[1:] == squares[:-1]).all(axis=-1)
    assert low <= 1 - alike.mean() <= high


def test_encoder_stages_are_in_the_table(tmp_path):
    """A page on a Qwen2.5-VL: tokens are left out before the encoder, and within it. Stock has smaller pictures too."""
    shape = replace(tiny("qwen2.5-vl-3b"), picture=(448, 448), n_image_tokens=256)
    configs = [
        NamedConfig("redundancy", "redundancy", PruneConfig(0.5, 0.25, redundancy="exact")),
        NamedConfig("encoder", "encoder", PruneConfig(0.25, 0.125, encoder_keep=0.25, encoder_layer=1)),
    ]
    with model_files(shape, tmp_path) as files:
        result = run(
            *files,
            {"n_ctx": shape_context(shape, 2), "n_threads": 1},
            configs,
            ("flash", "fewer"),
            shape_request(shape, (0.25, 0.1), "page"),
            fewer=(0.25, 0.1),
            repeats=1,
            n_generate=2,
            with_memory=False,
        )
    sides = {row["name"]: row for row in result["sides"]}
    assert list(sides)[1:3] == ["stock, 25% of the tokens", "stock, 10% of the tokens"]
    assert 256 > sides["stock, 25% of the tokens"]["image_tokens"] > sides["stock, 10% of the tokens"]["image_tokens"]
    assert sides["redundancy"]["encoder_entered"] < 256 == sides["encoder"]["encoder_entered"]
    assert sides["redundancy"]["stages_ms"]["redundancy"] > 0 == sides["encoder"]["stages_ms"]["redundancy"]
    assert sides["encoder"]["encoder_kept"] == 64 and sides["encoder"]["stages_ms"]["encoder_stage"] > 0
    header, rows = text_table(result)
    assert "tokens into the encoder" in header and "  redundancy" in header and "  encoder stage" in header
    assert all(len(row) == len(header) for row in rows)
