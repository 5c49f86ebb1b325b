"""What the encoder's ways to compute less hold in memory on our side, counted by allocation, not as resident memory."""

import tracemalloc

import numpy as np
import pytest
from helpers.models import LLAMA, QWEN2VL

from star_edge import PruneConfig, StarVLM
from star_edge.synthetic import write_decoder, write_encoder
from star_edge.synthetic.shapes import EncoderShape
from star_edge.vision.chunks import ImageChunk
from star_edge.vision.row_window import find_row_window
from star_edge.vision.window import find_window

WIDTH, SIDE = 512, 448  # of the encoder's rows, and of the picture in pixels
KINDS = {
    "qwen2vl": (QWEN2VL, EncoderShape(SIDE, 14, 3, WIDTH, 4, 512, kind="qwen2vl")),
    "qwen2.5vl": (QWEN2VL, EncoderShape(SIDE, 14, 3, WIDTH, 4, 512, kind="qwen2.5vl", full_attention_every=2)),
    "clip": (LLAMA, EncoderShape(SIDE, 14, 3, WIDTH, 4, 512)),
}
N_PATCHES = (SIDE // 14) ** 2
STATES = 4 * WIDTH * N_PATCHES  # bytes of the hidden states of all rows
PIXELS = 4 * 3 * SIDE**2  # bytes of what the encoder gets
OTHER = 3 * 2**20 // 4  # a request's objects, its scores and distances, and the picture itself, 0.6 MB


@pytest.fixture(scope="module", params=KINDS)
def vlm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    decoder, encoder = KINDS[request.param]
    write_decoder(folder / "text.gguf", decoder, "f32")
    write_encoder(folder / "mmproj.gguf", encoder, decoder.n_embd, "f16")
    with StarVLM(folder / "text.gguf", folder / "mmproj.gguf", n_ctx=2048, n_threads=1, image_cache_bytes=0) as vlm:
        vlm.kind = request.param
        yield vlm


def page():
    """Half of it is blank."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[: SIDE // 2] = np.random.default_rng(0).integers(0, 256, (SIDE // 2, SIDE, 3), dtype=np.uint8)
    return pixels


def allocated(vlm, config):
    """(most bytes during a request, bytes after it) that Python and NumPy have allocated since before it."""
    pixels = page()
    ask = lambda: vlm.read_prompt("<__media__>a", [pixels], config, chat=False)
    ask()  # what is allocated once
    tracemalloc.start()
    try:
        _, report = ask()
        assert report.notes == []
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return report, peak, held


def test_the_encoder_stage_holds_hidden_states_once(vlm):
    """All rows of the first pass, and the kept ones for the second, which is given all where rows leave its graph."""
    window = find_window(vlm.encoder) or find_row_window(vlm.encoder)
    prompt = vlm.tokenize("<__media__>", [page()], chat=False)
    try:
        chunk = next(c for c in prompt.chunks if isinstance(c, ImageChunk))
        kept = np.arange(0, chunk.n_tokens, 4)
        window.rest(window.first(chunk, 1, True), kept, None)  # what is allocated once
        tracemalloc.start()
        first = window.first(chunk, 1, True)
        in_first = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        features = window.rest(first, kept, None)
        in_rest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        prompt.close()
    vectors = 4 * WIDTH * chunk.n_tokens
    # while a mean is taken: the mean, and a row of each unit
    assert STATES + vectors < in_first < STATES + 2 * vectors + OTHER
    injected = 0 if vlm.kind == "clip" else STATES // 4
    assert in_rest < STATES + vectors + injected + features.embeddings.nbytes + OTHER


@pytest.mark.parametrize("redundancy", ["off", "exact"])
def test_nothing_is_held_after_a_request(vlm, redundancy):
    if vlm.kind == "clip" and redundancy == "exact":
        pytest.skip("its pictures have one size")
    config = PruneConfig(0.25, encoder_keep=0.25, encoder_layer=1, redundancy=redundancy)
    assert allocated(vlm, config)[2] < OTHER


def test_a_composed_picture_holds_pixels_of_what_stays(vlm):
    """While it looks at a picture: its pixels, and the same by units. After that, those of the units that stay."""
    if vlm.kind == "clip":
        pytest.skip("its pictures have one size")
    report, peak, _ = allocated(vlm, PruneConfig(redundancy="exact"))
    assert 0.4 < report.n_redundant / report.n_image_tokens < 0.6
    n_kept = 4 * (report.n_image_tokens - report.n_redundant)
    mask = 4 * n_kept**2 if vlm.kind == "qwen2.5vl" else 0
    assert peak < max(2 * PIXELS, PIXELS + mask) + OTHER
