"""Exact: with everything kept, the layer window gives stock llama.cpp's logits, bit for bit.

The oracle is stock llama.cpp, in a context without the tap. Identity holds beyond f32 and plain attention: every
segment is decoded with the number of rows that stock decodes it with, so the kernels round alike.
"""

import numpy as np
import pytest
from helpers import stock
from helpers.choosing import by_score, generate, keep_all
from helpers.models import random_image, random_prompt

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.io.images import load_image
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.names import KV_TYPES
from star_edge.llamacpp.tap import Tap

N_GENERATE = 32
PARTS = [12, (10, 20), 9]
SEVERAL = [5, (6, 7), 4, (9, 5), 3, (4, 4), 11]


@pytest.fixture(scope="module")
def tapped(families):
    """A function that gives a tapped decoder: (family, flash_attn, **options) -> DecoderContext, kept for the
    module.
    """
    made = {}

    def get(family, flash_attn, **options):
        key = (family, flash_attn, tuple(options.items()))
        if key not in made:
            tap = Tap()
            llama = stock.load(families[family].text, flash_attn, **options)
            attach_tap(llama, tap)
            made[key] = (DecoderContext(llama, tap), tap)
        context, _ = made[key]
        context.clear()
        context.tap.set_position_shift(0, 0)
        return context

    yield get
    for context, tap in made.values():
        context.llama.close()
        tap.close()


@pytest.mark.parametrize("parts", [PARTS, SEVERAL], ids=["one-image", "three-images"])
@pytest.mark.parametrize(
    ("flash_attn", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")], ids=["no-fa", "fa", "fa-q8_0"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_keep_all_equals_stock(families, tapped, family, flash_attn, cache, parts):
    options = {"type_k": KV_TYPES[cache], "type_v": KV_TYPES[cache], "n_threads": 1}
    prompt = random_prompt(families[family], parts)
    n_images = sum(s.image is not None for s in prompt.segments)
    plain = stock.load(families[family].text, flash_attn, **options)
    expected, expected_tokens = stock.run_segments(plain, prompt.segments, prompt.next_position, N_GENERATE)
    plain.close()
    n_layers = families[family].shape.n_layers
    for layer in families[family].at(1, n_layers // 2, n_layers - 1):
        context = tapped(family, flash_attn, **options)
        state = prefill(
            context, prompt.segments, prompt.next_position, DecoderStage([(layer, [0] * n_images)], keep_all)
        )
        history, tokens = generate(context, state, N_GENERATE)
        assert state.in_place
        assert tokens == expected_tokens
        assert [float(np.abs(a - b).max()) for a, b in zip(history, expected)] == [0.0] * (N_GENERATE + 1)


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_keep_all_with_small_ubatch_and_quantized_cache(families, tapped, cache):
    """Segments longer than n_ubatch take several decodes; the cache may be quantized."""
    options = {"type_k": KV_TYPES[cache], "type_v": KV_TYPES[cache]}
    prompt = random_prompt(families["llama"], [7, (15, 15), 40])
    plain = stock.load(families["llama"].text, True, **options)
    # what stock does with n_ubatch = 32: the same decodes of at most 32 rows
    for segment in prompt.segments:
        for at in range(0, len(segment.rows), 32):
            rows = segment.rows.slice(at, min(at + 32, len(segment.rows)))
            expected = stock.decode(plain, rows.tokens, rows.embeddings, rows.positions)
    plain.close()
    context = tapped("llama", True, **options)
    context.n_ubatch, before = 32, context.n_ubatch
    try:
        state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(3, [0])], keep_all))
    finally:
        context.n_ubatch = before
    assert np.array_equal(state.logits, expected)


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_whole_pipeline_equals_stock(families, family, flash_attn):
    """Image to text: StarVLM with everything kept against libmtmd and llama.cpp, two images between texts."""
    models = families[family]
    images = [random_image(1), random_image(2, 84, 126)]
    prompt = "first <__media__> second <__media__> what differs?"
    llama = stock.load(models.text, flash_attn, n_threads=1)
    plain = stock.Multimodal(llama, models.mmproj, flash_attn)
    expected, expected_tokens = plain.ask(prompt, images, N_GENERATE)
    plain.close()
    llama.close()
    with StarVLM(
        models.text, models.mmproj, n_ctx=1024, n_batch=512, flash_attn=flash_attn, n_threads=1, encoder="stock"
    ) as vlm:
        for prune in (None, PruneConfig(decoder_layer=1), PruneConfig(1.0, 1.0, 4), PruneConfig(decoder_layer=7)):
            state, report = vlm.read_prompt(prompt, images, prune, chat=False)
            assert np.array_equal(state.logits, expected[0])
            _, tokens = generate(vlm.decoder, state, N_GENERATE)
            assert tokens == expected_tokens
            assert report.n_vision_kept == report.n_decoder_kept == report.n_image_tokens


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_shipped_model_equals_stock(flash_attn):
    llama = stock.load(refvlm.TEXT_MODEL, flash_attn)
    plain = stock.Multimodal(llama, refvlm.MMPROJ, flash_attn)
    image = load_image(refvlm.DEMO_IMAGE)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_batch=512, flash_attn=flash_attn, n_threads=2) as vlm:
        for question in refvlm.demo_questions()[::3]:
            prompt = f"USER:<__media__>{question['question']} ASSISTANT:"
            expected, expected_tokens = plain.ask(prompt, [image], N_GENERATE)
            for layer in (None, 1, 3, 5):
                state, _ = vlm.read_prompt(
                    question["question"], image, PruneConfig(decoder_layer=layer) if layer else None
                )
                assert np.array_equal(state.logits, expected[0])
                assert generate(vlm.decoder, state, N_GENERATE)[1] == expected_tokens
    plain.close()
    llama.close()


def test_ordinary_decode_after_a_pruned_one(families, tapped):
    """Flags that were cleared to skip nodes are set again, and parked cells are free: nothing of a pruned run is
    left.
    """
    prompt = random_prompt(families["llama"], PARTS)
    plain = stock.load(families["llama"].text, True)
    expected, _ = stock.run_segments(plain, prompt.segments, prompt.next_position)
    plain.close()
    context = tapped("llama", True)
    for layer in (1, 4, 7):
        pruned = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(layer, [20])], by_score))
        assert not np.array_equal(pruned.logits, expected[0])
        # First a graph of the same shape as the resume's last one (embedding rows, as many, as many outputs and cells),
        # which llama.cpp reuses (llm_graph_result::can_reuse): a flag left cleared would show here.
        n = len(prompt.segments[-1].rows)
        context.remove(0, 12)
        rows = np.random.default_rng(1).standard_normal((n, 256)).astype(np.float32)
        again = stock.decode(context.llama, embeddings=rows, positions=np.arange(12, 12 + n))
        context.clear()
        one = stock.load(families["llama"].text, True)
        stock.decode(one, tokens=prompt.segments[0].rows.tokens, positions=prompt.segments[0].rows.positions)
        assert np.array_equal(again, stock.decode(one, embeddings=rows, positions=np.arange(12, 12 + n)))
        one.close()
        # straight through llama.cpp, with the tap idle
        history, _ = stock.run_segments(context.llama, prompt.segments, prompt.next_position)
        assert np.array_equal(history[0], expected[0])
        context.clear()


def test_a_thousand_mixed_requests_leave_no_drift(families):
    """Every request repeats an earlier one exactly, whatever came in between."""
    models = families["llama"]
    rng = np.random.default_rng(0)
    images = [random_image(i) for i in range(3)]
    configs = [
        None,
        PruneConfig(0.5, 0.25, 2),
        PruneConfig(decoder_layer=5),
        PruneConfig(0.25, 1.0),
        PruneConfig(1.0, 3, 1),
        PruneConfig(7, 2, 7, decoder_scorer="last"),
        PruneConfig(12, windows=((2, 9), (4, 5), (7, 2))),
    ]
    seen = {}
    with StarVLM(models.text, models.mmproj, n_ctx=256, n_threads=1) as vlm:
        for _ in range(1000):
            i, c, text = (
                rng.integers(3),
                rng.integers(len(configs)),
                ("what?", "where is it, and how many?")[rng.integers(2)],
            )
            n_images = rng.integers(0, 3)
            chosen = [images[(i + k) % 3] for k in range(n_images)]
            state, report = vlm.read_prompt(text, chosen, configs[c])
            if rng.random() < 0.1:  # some requests generate, and some are abandoned
                stream = vlm.generate(text, chosen, configs[c], max_tokens=4, stream=True)
                next(stream, None)
            key = (i if n_images else -1, c, text, n_images)
            first = seen.setdefault(key, state.logits)
            assert np.array_equal(state.logits, first), key
            assert report.in_place
    assert len(seen) > 50
