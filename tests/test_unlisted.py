"""Encoders that no profile describes: the engine is stock llama.cpp with everything kept, prunes by embeddings, and
says so.

tests/unlisted has files of such models (tools/fixtures/families/unlisted.py). Others lose their profile here.
"""

import numpy as np
import pytest
from helpers import stock
from helpers.choosing import generate
from helpers.families import FOLDER, N_THREADS

from star_edge import MEDIA_MARKER, PruneConfig, StarVLM
from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.vision import profiles

UNLISTED = {folder.name: folder for folder in sorted((FOLDER.parent / "unlisted").iterdir())}
BEREFT = {name: FOLDER / name for name in ("glm4.1v", "hunyuan-ocr", "internvl3.5", "pixtral", "qwen2.5-vl")}
N_GENERATE = 8
TEXT = f"first {MEDIA_MARKER} then {MEDIA_MARKER} which of the two is the brighter one?"


def picture(seed):
    """96 x 96 of squares, which the fixed sizes among these encoders scale."""
    squares = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.ascontiguousarray(squares.repeat(8, axis=0).repeat(8, axis=1))


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("name", [*UNLISTED, *BEREFT])
def test_an_encoder_without_a_profile(name, flash_attn, monkeypatch):
    for projector in list(profiles.PROFILES):
        monkeypatch.delitem(profiles.PROFILES, projector)
    folder, pictures = {**UNLISTED, **BEREFT}[name], [picture(0), picture(1)]
    llama = stock.load(folder / "text.gguf", flash_attn, n_ctx=2048, n_threads=N_THREADS)
    plain = stock.Multimodal(llama, folder / "mmproj.gguf", flash_attn)
    expected, expected_tokens = plain.ask(TEXT, pictures, N_GENERATE)
    plain.close()
    llama.close()
    options = {"n_ctx": 2048, "n_threads": N_THREADS, "flash_attn": flash_attn, "encoder": "stock"}
    with StarVLM(folder / "text.gguf", folder / "mmproj.gguf", **options) as vlm:
        assert vlm.encoder.profile is profiles.GENERIC
        for config in (None, *(PruneConfig(decoder_layer=layer) for layer in range(1, vlm.decoder.n_layers))):
            state, report = vlm.read_prompt(TEXT, pictures, config, chat=False)
            assert np.array_equal(state.logits, expected[0])
            assert generate(vlm.decoder, state, N_GENERATE)[1] == expected_tokens
            assert report.n_decoder_kept == report.n_image_tokens
        state, report = vlm.read_prompt(TEXT, pictures, PruneConfig(0.5, 0.25, 2, budget="image"), chat=False)
        assert state.in_place and report.windows
        said = f"projector type {vlm.encoder.projector!r} has no profile: the vision stage goes by embeddings"
        assert said in " ".join(report.notes)
        assert 0 < report.n_decoder_kept < report.n_vision_kept < report.n_image_tokens
        assert not np.array_equal(state.logits, expected[0])
        assert len(generate(vlm.decoder, state, N_GENERATE)[1]) == N_GENERATE


def test_the_unlisted_have_no_profile():
    """A family that gets a profile belongs to tests/fixtures, where more is asked of it."""
    infos = [read_gguf_info(folder / "mmproj.gguf", profiles.METADATA_KEYS) for folder in UNLISTED.values()]
    found = [profiles.find_profile(info.values) for info in infos]
    assert len({projector for projector, _ in found}) >= 3
    assert all(profile is profiles.GENERIC for _, profile in found)
