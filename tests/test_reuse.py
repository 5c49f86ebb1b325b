"""What the decoder computed for a prompt, used for the next one that begins alike: every answer equals a fresh
engine's.
"""

import contextlib
import os

import numpy as np
import pytest
from helpers import stock
from helpers.choosing import by_score
from helpers.models import random_image, random_prompt
from helpers.reusing import QUESTIONS, answers, engine, first_tokens, fresh, same

from star_edge import PruneConfig, errors
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.tap import Tap
from star_edge.vision.chunks import TextChunk
from star_edge.vision.encoder import VisionEncoder

PRESETS = ["off", "balanced", "fast", "star", "pyramiddrop"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("flash_attn", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")], ids=["no-fa", "fa", "fa-q8_0"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_a_further_question_equals_a_fresh_engine(families, family, flash_attn, cache, preset):
    models, image = families[family], random_image(1)
    options = dict(flash_attn=flash_attn, type_k=cache, type_v=cache)
    prompts = [f"system: be brief <__media__> {q}" for q in (*QUESTIONS, "x")]
    with engine(models, **options) as vlm:
        for i, prompt in enumerate(prompts):
            got = vlm.read_prompt(prompt, image, preset, chat=False)
            report = same(got, fresh(models, (prompt, image, preset), **options))
            n_prefix = len(first_tokens(vlm, prompt, [image]))
            assert report.reused_tokens == (n_prefix + report.n_vision_kept if i else 0)
            assert report.in_place


@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_answers_to_a_further_question_equal_a_fresh_engines(families, family):
    models, image = families[family], random_image(1)
    for preset in ("balanced", "pyramiddrop", "off", PruneConfig(0.5, 0.25, 2, representatives="even")):
        with engine(models) as vlm:
            answers(vlm, (f"ab <__media__> {QUESTIONS[0]}", image, preset))
            got = answers(vlm, (f"ab <__media__> {QUESTIONS[1]}", image, preset), 40)
        with engine(models) as vlm:
            assert np.array_equal(got, answers(vlm, (f"ab <__media__> {QUESTIONS[1]}", image, preset), 40))


def test_as_much_is_read_again_as_differs(families):
    """Several images, turns and system prompts: whole segments that are alike from the beginning."""
    models = families["llama"]
    a, b, c = (random_image(i) for i in range(3))
    m = "<__media__>"
    config = PruneConfig(1.0, 0.25, 3)
    steps = [  # with the number of segments that are not read again
        (f"one {m} two {m} three?", [a, b], config, 0),
        (f"one {m} two {m} four?", [a, b], config, 4),
        (f"one {m} two {m} three?", [a, c], config, 3),
        (f"one {m} other {m} three?", [a, c], config, 2),
        (f"one {m} and now the second question?", a, config, 2),
        (f"one {m} and now the second question? yes. the third {m}?", [a, b], config, 2),
        (f"one {m} and now the second question? yes. the third {m}? no. a fourth", [a, b], config, 4),
        (
            f"one {m} two?",
            a,
            PruneConfig(1.0, 0.25, 4),
            1,
        ),  # another layer: the text before the image is the same in any case
        (f"one {m} two?", a, PruneConfig(1.0, 0.5, 4), 2),  # another budget
        (f"one {m} two?", a, PruneConfig(1.0, 0.5, 4, decoder_scorer="last"), 2),
        (f"one {m} two?", a, PruneConfig(0.5, 0.5, 4, representatives="none"), 1),  # other rows
        (f"one {m} two?", a, PruneConfig(0.5, 0.5, 4), 1),  # other masses
        (f"one {m} two?", a, PruneConfig(0.5, 1.0), 1),  # no decoder stage
        (f"one {m} three?", a, PruneConfig(0.5, 1.0), 2),
        (f"one {m} three?", a, PruneConfig(0.5, 1.0), 2),
        (f"one {m} three?", c, PruneConfig(0.5, 1.0), 1),
        (f"two {m} three?", c, PruneConfig(0.5, 1.0), 0),
        ("one two", [], None, 0),
        (f"{m} what?", a, config, 0),
        (f"{m} where?", a, config, 2),  # BOS is a segment
        (f"{m} where? {m}", [a, b], None, 1),
        (f"{m} where? {m}", [a, b], None, 3),  # the last segment gives the logits
    ]
    with engine(models) as vlm:
        for prompt, images, config, n_segments in steps:
            got = vlm.read_prompt(prompt, images, config, chat=False)
            report = same(got, fresh(models, (prompt, images, config)))
            left = iter(len(image.vision_kept) for image in report.images)
            with contextlib.closing(
                vlm.tokenize(prompt, images if isinstance(images, list) else [images], chat=False)
            ) as tokenized:
                sizes = [
                    len(chunk.tokens) if isinstance(chunk, TextChunk) else next(left) for chunk in tokenized.chunks
                ]
            assert report.reused_tokens == sum(sizes[:n_segments]), prompt


@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_pieces_of_n_ubatch(families, family):
    """Long segments take several decodes; of text that begins alike, whole decodes are used again."""
    models, image = families[family], random_image(1, 112, 112)
    text = "a long system prompt that goes on and on. " * 2
    options = dict(n_ubatch=16, n_batch=16)
    requests = [
        (f"{text}<__media__> one?", image, PruneConfig(1.0, 0.25, 3)),
        (f"{text}<__media__> two?", image, PruneConfig(1.0, 0.25, 3)),
        (f"{text}x<__media__> two?", image, PruneConfig(1.0, 0.25, 3)),
        (f"{text}y, and {text}", [], None),
        (f"{text}y, and {text}z", [], None),
        (f"{text}y, and {text}z", [], None),
    ]
    with engine(models, **options) as vlm:
        reused = [same(vlm.read_prompt(*r, chat=False), fresh(models, r, **options)).reused_tokens for r in requests]
        texts = [vlm.llama.tokenize(r[0].encode(), special=True) for r in requests[3:]]
    n = 16 if family == "qwen2vl" else 49
    assert reused[0] == 0 and reused[1] > len(text) + n and reused[2] % 16 == 0 < reused[2]
    n_alike = len(os.path.commonprefix(texts))  # noqa: RUF071 - lists of tokens, compared token by token
    assert reused[4:] == [n_alike // 16 * 16, (len(texts[2]) - 1) // 16 * 16] and reused[3] > 0


@pytest.fixture
def decodes(monkeypatch):
    """(rows, first layer, last layer) of each decode that a prompt takes."""
    seen, decode = [], DecoderContext.decode

    def spy(self, rows, first_position, plan, what, logits=False):
        seen.append((len(rows), *(plan.window or (0, self.n_layers, 0))[:2]))
        return decode(self, rows, first_position, plan, what, logits)

    monkeypatch.setattr(DecoderContext, "decode", spy)
    return seen


@pytest.mark.parametrize(
    ("flash_attn", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")], ids=["no-fa", "fa", "fa-q8_0"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_what_is_decoded_for_a_further_question(families, decodes, family, flash_attn, cache):
    """Image rows never run layers < K again. What stays is resumed with the text in one decode, and as on stock where
    nothing is dropped.
    """
    models, image = families[family], random_image(1, 168, 168)
    options = dict(flash_attn=flash_attn, type_k=cache, type_v=cache)
    half, alike, everything = (
        PruneConfig(1.0, 0.5, 3),
        PruneConfig(1.0, 0.5, 3, decoder_scorer="uniform"),
        PruneConfig(decoder_layer=3),
    )
    steps = [(1, half), (1, half), (0, half), (0, alike), (1, alike), (1, everything), (0, everything), (0, half)]
    request = lambda q, config: (f"ab <__media__> {QUESTIONS[q]}", image, config)
    with engine(models, **options) as vlm:
        vlm.read_prompt(*request(0, half), chat=False)
        for q, config in steps:
            want = fresh(models, request(q, config), **options)
            decodes.clear()
            report = same(vlm.read_prompt(*request(q, config), chat=False), want)
            n, k = report.n_image_tokens, report.n_decoder_kept
            n_text = report.n_text_tokens - len(first_tokens(vlm, request(q, config)[0], [image]))
            resumed = [(n, 3, 8), (n_text, 3, 8)] if config is everything else [(k + n_text, 3, 8)]
            assert decodes == [(n, 3, 3), (n_text, 0, 3), *resumed]
            assert report.windows == [(3, k)]
        got = answers(vlm, request(0, half), 40)  # a question that was asked before, and what is generated then
    with engine(models, **options) as vlm:
        assert np.array_equal(got, answers(vlm, request(0, half), 40))


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_non_causal_images(families, monkeypatch, flash_attn):
    """Image rows that attend to each other both ways. What was read in one way is not used in the other."""
    models, images = families["llama"], [random_image(1), random_image(2)]
    tokenize, causal = VisionEncoder.tokenize, [False]

    def tokenized(*args, **kwargs):
        prompt = tokenize(*args, **kwargs)
        for chunk in prompt.chunks:
            if not isinstance(chunk, TextChunk):
                chunk.causal = causal[0]
        return prompt

    monkeypatch.setattr(VisionEncoder, "tokenize", tokenized)
    for preset in (None, "balanced", PruneConfig(1.0, 0.25, 3, decoder_scorer="uniform")):
        with engine(models, flash_attn=flash_attn) as vlm:
            reused = []
            for causal[0], question in (
                (False, "one?"),
                (False, "where is it?"),
                (True, "where is it?"),
                (False, "one?"),
                (False, "two?"),
            ):
                request = (f"ab <__media__> and <__media__> {question}", images, preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request, flash_attn=flash_attn))
                n_prefix = len(first_tokens(vlm, request[0], images))
                reused.append(report.reused_tokens > n_prefix)
                assert report.reused_tokens in (0, n_prefix) or reused[-1]
            assert reused == [False, True, False, False, True]
    expected = [fresh(models, request, flash_attn=flash_attn)[0].logits for causal[0] in (False, True)]
    assert not np.array_equal(*expected)  # it does make a difference


def test_mixed_requests_equal_fresh_ones(families):
    models = families["llama"]
    rng = np.random.default_rng(0)
    images = [random_image(i) for i in range(2)]
    configs = [
        None,
        "balanced",
        "star",
        PruneConfig(0.5, 0.25, 2),
        PruneConfig(decoder_layer=5),
        PruneConfig(0.25, 1.0),
        PruneConfig(7, 2, 7, decoder_scorer="last"),
        PruneConfig(12, windows=((2, 9), (4, 5), (7, 2))),
    ]
    expected, n_reused = {}, 0
    with engine(models, n_ctx=256) as vlm, engine(models, n_ctx=256, reuse=False) as plain:
        request = None
        for _ in range(90):
            # often the same image and config as before, as in a conversation
            c, which, start = (
                request
                if request and rng.random() < 0.6
                else (rng.integers(8), tuple(rng.integers(0, 2, rng.integers(0, 3))), "")
            )
            request = (c, which, start)
            text = "s: " + "<__media__> and " * len(which) + ("what?", "where is it, and how many?")[rng.integers(2)]
            chosen = [images[i] for i in which]
            key = (c, which, text)
            state, report = vlm.read_prompt(text, chosen, configs[c], chat=False)
            if key not in expected:
                expected[key] = plain.read_prompt(text, chosen, configs[c], chat=False)[0].logits
            assert np.array_equal(state.logits, expected[key]), key
            assert report.in_place
            n_reused += report.reused_tokens > 10
            surprise = rng.random()
            if surprise < 0.1:  # a stream that is dropped
                next(vlm.generate(text, chosen, configs[c], max_tokens=4, stream=True, chat=False), None)
            elif surprise < 0.15:
                vlm.generate(text, chosen, configs[c], max_tokens=100, chat=False)
            elif surprise < 0.2:
                vlm.llama.create_completion("other text", max_tokens=2)
            elif surprise < 0.22:
                vlm.inspect(text, chosen, decoder_layers=[1], chat=False)
            elif surprise < 0.25:
                with pytest.raises(errors.ContextLengthError):
                    vlm.read_prompt("x" * 300 + text, chosen, configs[c], chat=False)
    assert 20 < n_reused < 80 and len(expected) > 25


def beside_a_fresh_one(models, steps):
    """Runs (prompt, decoder stage) one after the other in a context, compares logits with those of a new one, and
    yields the states.
    """

    def context(tap):
        llama = stock.load(models.text, True)
        attach_tap(llama, tap)
        return DecoderContext(llama, tap)

    tap = Tap()
    kept = context(tap)
    for prompt, stage in steps:
        got = prefill(kept, prompt.segments, prompt.next_position, stage, keep=True)
        other_tap = Tap()
        other = context(other_tap)
        assert np.array_equal(got.logits, prefill(other, prompt.segments, prompt.next_position, stage).logits)
        other.llama.close()
        other_tap.close()
        kept.llama._ctx.end_prompt()
        yield got
    kept.llama.close()
    tap.close()


@pytest.mark.parametrize("layer", [None, 3])
def test_rows_that_differ_in_one_thing_are_read_again(families, layer):
    """As the decoder gets them, one thing at a time; what the encoder and the config make of it does not matter
    here.
    """
    models = families["llama"]
    stage = None if layer is None else DecoderStage([(layer, [9, 9])], by_score)

    def prompt(segment=None, **changes):
        result = random_prompt(models, [6, (5, 8), 3, (4, 4), 7])
        for name, value in changes.items():
            holder = result.segments[segment] if name in ("mass", "causal") else result.segments[segment].rows
            setattr(holder, name, value(getattr(holder, name)))
        return result

    def one_more(array, at=1):
        array = array.copy()
        array.reshape(-1)[at] += 1
        return array

    mass = lambda last: lambda _: np.where(np.arange(16) == 3, last, 1.0)
    steps = [  # with the segments that the one before has too
        (prompt(), 0),
        (prompt(4, tokens=one_more), 4),
        (prompt(2, tokens=one_more), 2),
        (prompt(2, positions=one_more), 2),
        (prompt(3, positions=one_more), 2),
        (prompt(3, positions=lambda p: one_more(p, -1)), 3),
        (prompt(3, embeddings=one_more), 3),
        (prompt(3, mass=mass(5.0)), 3),
        (prompt(3, mass=mass(6.0)), 3),
        (prompt(3, mass=mass(6.0)), 4),
        (prompt(3), 3),
        (prompt(3, causal=lambda _: False), 3),
        (prompt(1, causal=lambda _: False), 1),
        (prompt(0, tokens=one_more), 0),
    ]
    states = beside_a_fresh_one(models, ((case, stage) for case, _ in steps))
    for (case, n_alike), state in zip(steps, states, strict=True):
        assert state.n_reused == sum(len(s.rows) for s in case.segments[:n_alike])
