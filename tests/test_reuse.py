"""What the decoder computed for a prompt, used for the next one that begins alike: every answer equals a fresh engine's."""

import contextlib
import os
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
import stock
from conftest import LLAMA, random_image, random_prompt
from decoders import write_recurrent, write_sliding
from llama_cpp import Llama
from reusing import engine, fresh, same
from test_chat_handler import COLOR, PLATE, data_url, user
from test_exact import by_score

from star_edge import PruneConfig, StarChatHandler, StarVLM, errors, refvlm
from star_edge.decoder.context import MAIN, N_SEQUENCES, PARKED, DecoderContext, Rows, attach_tap
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.scorers import DECODER_SCORERS
from star_edge.tap import Plan, Tap
from star_edge.vision.encoder import TextChunk

QUESTIONS = ("what is this?", "where is the cat, and how many are there?")

PRESETS = ["off", "balanced", "fast", "star", "pyramiddrop"]


def first_tokens(vlm, prompt, images):
    """Text tokens before the first image."""
    with contextlib.closing(vlm.tokenize(prompt, images, chat=False)) as tokenized:
        return tokenized.chunks[0].tokens


def cells(vlm):
    """Positions of each sequence."""
    span = lambda s: (
        llama_cpp.llama_memory_seq_pos_min(vlm.decoder.memory, s),
        llama_cpp.llama_memory_seq_pos_max(vlm.decoder.memory, s),
    )
    return [span(s) for s in range(N_SEQUENCES)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("flash_attn", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")], ids=["no-fa", "fa", "fa-q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
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


def answers(vlm, request, n=12):
    """Token by token, with logits: what is sampled from, so that masses, positions and cells while generating count."""
    state, _ = vlm.read_prompt(*request, chat=False)
    prompt = vlm._reader.hand_over(state)
    logits, tokens = [state.logits], []
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        vlm.llama.eval(tokens[-1:])
        logits.append(vlm.decoder.logits())
    assert len(prompt) == state.n_cells
    return np.array(logits)


@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
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
        (f"one {m} two?", a, PruneConfig(1.0, 0.25, 4), 1),  # another layer: the text before the image is the same in any case
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
            with contextlib.closing(vlm.tokenize(prompt, images if isinstance(images, list) else [images], chat=False)) as tokenized:
                sizes = [len(chunk.tokens) if isinstance(chunk, TextChunk) else next(left) for chunk in tokenized.chunks]
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
    n_alike = len(os.path.commonprefix(texts))
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


@pytest.mark.parametrize(("flash_attn", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")], ids=["no-fa", "fa", "fa-q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_what_is_decoded_for_a_further_question(families, decodes, family, flash_attn, cache):
    """Image rows never run layers < K again, and layers >= K only where other ones stay than for the last question."""
    models, image = families[family], random_image(1, 168, 168)
    options = dict(flash_attn=flash_attn, type_k=cache, type_v=cache)
    other = PruneConfig(1.0, 0.5, 3)
    alike = PruneConfig(1.0, 0.5, 3, decoder_scorer="uniform")
    ask = lambda q, config: (f"ab <__media__> {q}", image, config)
    steps = [  # with the last layer of the image rows that stay
        (ask(QUESTIONS[1], other), 8),
        (ask(QUESTIONS[1], other), 3),  # the same question again
        (ask(QUESTIONS[0], other), 8),
        (ask(QUESTIONS[0], alike), 8),
        (ask(QUESTIONS[1], alike), 3),  # another one that leaves the same rows
        (ask("x", alike), 3),
        (ask(QUESTIONS[0], other), 8),
        (ask(QUESTIONS[1], other), 8),
    ]
    with engine(models, **options) as vlm:
        _, report = vlm.read_prompt(*ask(QUESTIONS[0], other), chat=False)
        n, k = report.images[0].n_tokens, report.n_decoder_kept
        for request, last in steps:
            want = fresh(models, request, **options)
            decodes.clear()
            report = same(vlm.read_prompt(*request, chat=False), want)
            n_text = report.n_text_tokens - len(first_tokens(vlm, request[0], [image]))
            assert decodes == [(n, 3, 3), (n_text, 0, 3), (k, 3, last), (n_text, 3, 8)]
            assert report.reused_above == (k if last == 3 else 0) and report.windows == [(3, k)]
        got = answers(vlm, steps[-1][0], 40)  # a choice that is known, and what is generated then
    with engine(models, **options) as vlm:
        assert np.array_equal(got, answers(vlm, steps[-1][0], 40))


def test_a_choice_that_begins_alike(families, decodes):
    """Of several images, the first ones of which the same rows stay; with other masses or further stages, none."""
    models = families["llama"]
    images = [random_image(i) for i in range(2)]
    by_order = lambda n, **more: PruneConfig(1.0, n, 3, **{"decoder_scorer": "uniform", "representatives": "none", **more})
    prompt = lambda q, m="two": f"one <__media__> {m} <__media__> {q}"
    even = by_order(9, representatives="even", vision_share=0.5, decoder_share=0.5)
    stages = PruneConfig(1.0, windows=((3, 9), (5, 4)), decoder_scorer="uniform", representatives="none")
    steps = [  # with the rows that are known above: of the first image, the text between, the second image
        (prompt("a"), images, by_order(9), ""),
        (prompt("b c"), images, by_order(9), "1t2"),
        (prompt("b c"), images, by_order(8), ""),
        (prompt("b c"), [images[0], images[0]], by_order(8), "1t"),
        (prompt("b c", "else"), [images[0], images[0]], by_order(8), "1"),
        (prompt("b c", "else"), [images[1], images[0]], by_order(8), ""),
        (prompt("b c", "else"), [images[1], images[0]], even, ""),  # the same rows or not, with other masses
        (prompt("d", "else"), [images[1], images[0]], even, "1t2"),
        (prompt("d", "else"), [images[1], images[0]], stages, ""),
        (prompt("d", "else"), [images[1], images[0]], stages, ""),
        (prompt("d", "else"), [images[1], images[0]], by_order(9), ""),
        (prompt("d", "else"), [images[1], images[0]], by_order(9, decoder_scorer="random"), ""),
        (prompt("e", "else"), [images[1], images[0]], by_order(9, decoder_scorer="random"), "1t2"),
    ]
    with engine(models) as vlm:
        for text, pictures, config, known in steps:
            report = same(vlm.read_prompt(text, pictures, config, chat=False), fresh(models, (text, pictures, config)))
            with contextlib.closing(vlm.tokenize(text, pictures, chat=False)) as tokenized:
                n_between = len(tokenized.chunks[2].tokens)
            sizes = {"1": len(report.images[0].decoder_kept), "t": n_between, "2": len(report.images[1].decoder_kept)}
            assert report.reused_above == sum(sizes[part] for part in known), (text, config)


def test_a_long_choice_takes_several_decodes(families):
    """Pieces of n_ubatch rows that stay: those before the first difference are known."""
    models, image = families["llama"], random_image(1)
    options = dict(n_ubatch=16, n_batch=16)

    class Scorer:  # rows 0 to 39 stay, and one more that the question's length decides
        reads = "all"

        @staticmethod
        def score(tokens, k):
            scores = np.where(np.arange(len(tokens)) < 39, 2.0, 0.0)
            scores[45 if Scorer.late else 40] = 1.0
            return scores

    config = PruneConfig(1.0, 40, 3, decoder_scorer="uniform", representatives="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODER_SCORERS, "uniform", Scorer)
        with engine(models, **options) as vlm:
            for Scorer.late, n_above in ((False, 0), (True, 32), (True, 40), (False, 32)):
                request = (f"ab <__media__> {'late' if Scorer.late else 'not'}", image, config)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request, **options))
                assert report.reused_above == n_above


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_non_causal_images(families, monkeypatch, flash_attn):
    """Image rows that attend to each other both ways. What was read in one way is not used in the other."""
    models, images = families["llama"], [random_image(1), random_image(2)]
    tokenize, causal = StarVLM.tokenize, [False]

    def tokenized(*args, **kwargs):
        prompt = tokenize(*args, **kwargs)
        for chunk in prompt.chunks:
            if not isinstance(chunk, TextChunk):
                chunk.causal = causal[0]
        return prompt

    monkeypatch.setattr(StarVLM, "tokenize", tokenized)
    for preset in (None, "balanced", PruneConfig(1.0, 0.25, 3, decoder_scorer="uniform")):
        with engine(models, flash_attn=flash_attn) as vlm:
            reused, above = [], []
            for causal[0], question in ((False, "one?"), (False, "where is it?"), (True, "where is it?"), (False, "one?"), (False, "two?")):
                request = (f"ab <__media__> and <__media__> {question}", images, preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request, flash_attn=flash_attn))
                n_prefix = len(first_tokens(vlm, request[0], images))
                reused.append(report.reused_tokens > n_prefix)
                above.append(report.reused_above > 0)
                assert report.reused_tokens in (0, n_prefix) or reused[-1]
            assert reused == [False, True, False, False, True]
    expected = [fresh(models, request, flash_attn=flash_attn)[0].logits for causal[0] in (False, True)]
    assert not np.array_equal(*expected)  # it does make a difference
    assert above == [False, True, False, False, True]


@pytest.mark.parametrize(("window", "has_stage"), [(24, False), (400, True)])
def test_sliding_windows_keep_nothing(families, tmp_path, window, has_stage):
    """llama.cpp gives out cells that have left the window, parked ones too. The encoder's output is kept all the same."""
    write_sliding(tmp_path / "text.gguf", replace(LLAMA, n_layers=4), window)
    models = replace(families["llama"], text=tmp_path / "text.gguf")
    with engine(models) as vlm:
        assert vlm.decoder.n_swa == window
        for i, question in enumerate((*QUESTIONS, QUESTIONS[0])):
            for preset in (None, "balanced", "star"):
                request = (f"ab <__media__> {question}", random_image(1), preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
                assert report.reused_tokens == report.reused_above == 0 and (report.images[0].cached or not i)
                assert bool(report.windows) is (has_stage and preset is not None)
                assert vlm.llama._ctx.stem is None and cells(vlm)[1:] == [(-1, -1)] * (N_SEQUENCES - 1)


def test_recurrent_decoders_keep_nothing(families, tmp_path):
    """A state that has gone on cannot be taken back. Without pruning it is stock's, and with it the report says what cannot be."""
    write_recurrent(tmp_path / "text.gguf", replace(LLAMA, n_layers=4))
    models = replace(families["llama"], text=tmp_path / "text.gguf")
    plain = stock.load(models.text, True)
    with engine(models) as vlm:
        for question in (*QUESTIONS, QUESTIONS[0]):
            for preset in (None, "balanced", "star"):
                request = (f"ab <__media__> {question}", random_image(1), preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
                assert report.reused_tokens == report.reused_above == 0 and not report.windows
                assert vlm.llama._ctx.stem is None
                notes = [note.split(":")[0] for note in report.notes]
                assert notes == {None: [], "star": ["no decoder stage"]}.get(preset, ["no decoder stage", "no representatives"])
                assert report.images[0].vision_mass is None
                n = report.n_kv_cells
                assert vlm.generate(*request, max_tokens=3, chat=False).report.n_kv_cells == n
        tokens = np.array(vlm.llama.tokenize(b"a text", special=True), np.int32)
        state, _ = vlm.read_prompt("a text", chat=False)
        assert np.array_equal(state.logits, stock.decode(plain, tokens=tokens, positions=np.arange(len(tokens))))
    plain.close()


def test_mixed_requests_equal_fresh_ones(families):
    models = families["llama"]
    rng = np.random.default_rng(0)
    images = [random_image(i) for i in range(2)]
    configs = [
        None, "balanced", "star", PruneConfig(0.5, 0.25, 2), PruneConfig(decoder_layer=5), PruneConfig(0.25, 1.0),
        PruneConfig(7, 2, 7, decoder_scorer="last"), PruneConfig(12, windows=((2, 9), (4, 5), (7, 2))),
    ]  # fmt: skip
    expected, n_reused, n_above = {}, 0, 0
    with engine(models, n_ctx=256) as vlm, engine(models, n_ctx=256, reuse=False) as plain:
        request = None
        for _ in range(90):
            # often the same image and config as before, as in a conversation
            c, which, start = (
                request if request and rng.random() < 0.6 else (rng.integers(8), tuple(rng.integers(0, 2, rng.integers(0, 3))), "")
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
            n_above += report.reused_above > 0
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
    assert 20 < n_reused < 80 and n_above > 5 and len(expected) > 25


@pytest.mark.parametrize("layer", [None, 3])
def test_rows_that_differ_in_one_thing_are_read_again(families, layer):
    """As the decoder gets them, one thing at a time; what the encoder and the config make of it does not matter here."""
    models = families["llama"]
    tap = Tap()
    llama = stock.load(models.text, True)
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)
    stage = None if layer is None else DecoderStage([(layer, [9, 9])], by_score)

    def prompt(segment=None, **changes):
        result = random_prompt(models, [6, (5, 8), 3, (4, 4), 7])
        if segment is not None:
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
    for case, n_alike in steps:
        got = prefill(context, case.segments, case.next_position, stage, keep=True)
        assert got.n_reused == sum(len(s.rows) for s in case.segments[:n_alike])
        other = DecoderContext(fresh_llama := stock.load(models.text, True), fresh_tap := Tap())
        attach_tap(fresh_llama, fresh_tap)
        assert np.array_equal(got.logits, prefill(other, case.segments, case.next_position, stage).logits)
        fresh_llama.close()
        fresh_tap.close()
        context.llama._ctx.end_prompt()
    llama.close()
    tap.close()


# ---- what must not be used ----


SURPRISES = {
    "llama_memory_clear": lambda vlm: llama_cpp.llama_memory_clear(vlm.decoder.memory, True),
    "other rows": lambda vlm: (
        llama_cpp.llama_memory_clear(vlm.decoder.memory, True),
        stock.decode(vlm.llama, tokens=np.arange(300, 400), positions=np.arange(100)),
    ),
    "kv_cache_clear": lambda vlm: vlm.llama._ctx.kv_cache_clear(),
    "seq_rm": lambda vlm: vlm.llama._ctx.kv_cache_seq_rm(-1, 20, -1),
    "all sequences": lambda vlm: llama_cpp.llama_memory_seq_rm(vlm.decoder.memory, -1, 20, -1),
    "another sequence": lambda vlm: llama_cpp.llama_memory_seq_cp(vlm.decoder.memory, PARKED, 5, 0, 10),
    "shift": lambda vlm: vlm.llama._ctx.kv_cache_seq_shift(0, 10, 30, 5),
    "eval": lambda vlm: (vlm.llama.reset(), vlm.llama.eval(list(range(300, 420)))),
    "completion": lambda vlm: vlm.llama.create_completion("x" * 90, max_tokens=3),
    "state": lambda vlm: vlm.llama.load_state(vlm.llama.save_state()),
    "n_ubatch": lambda vlm: setattr(vlm.decoder, "n_ubatch", 16),
    "inspect": lambda vlm: vlm.inspect("a", random_image(2), decoder_layers=[0]),
}


@pytest.mark.parametrize("idle", [False, True], ids=["read", "answered"])
@pytest.mark.parametrize("surprise", SURPRISES)
def test_after_a_surprise_everything_is_read(families, surprise, idle):
    models = families["llama"]
    for preset in (None, "star"):
        request = ("ab <__media__> " + QUESTIONS[0], random_image(1), preset)
        with engine(models) as vlm:
            vlm.generate(*request, max_tokens=2, chat=False) if idle else vlm.read_prompt(*request, chat=False)
            SURPRISES[surprise](vlm)
            options = {"n_ubatch": 16} if surprise == "n_ubatch" else {}
            report = same(vlm.read_prompt(*request, chat=False), fresh(models, request, **options))
            assert report.reused_tokens == 0
            assert same(vlm.read_prompt(*request, chat=False), fresh(models, request, **options)).reused_tokens > 20


def test_a_state_of_another_image_is_no_stem(families):
    """Llama.load_state brings back cells of the same sequences and positions."""
    ask = lambda vlm, seed: vlm.read_prompt("ab <__media__> c", random_image(seed), "star", chat=False)
    with engine(families["llama"]) as vlm:
        first = ask(vlm, 1)
        n_prefix = len(first_tokens(vlm, "ab <__media__> c", [random_image(1)]))
        saved = vlm.llama.save_state()
        ask(vlm, 2)
        vlm.llama.load_state(saved)
        assert same(ask(vlm, 2), fresh(families["llama"], ("ab <__media__> c", random_image(2), "star"))).reused_tokens == 0
        assert same(ask(vlm, 1), first).reused_tokens == n_prefix


def test_rows_that_move_are_read_again(families, monkeypatch):
    """llama.cpp gives other cells than expected: found out, and read from the beginning."""
    models = families["llama"]
    for preset in ("star", None):
        requests = [(f"ab <__media__> {q}", random_image(1), preset) for q in QUESTIONS]
        with engine(models) as vlm:
            vlm.read_prompt(*requests[0], chat=False)
            remove = type(vlm.decoder).remove
            n_calls = []

            def leave_one(self, sequence, start, stop=-1, remove=remove, n_calls=n_calls):
                remove(self, sequence, start, stop)
                if sequence == PARKED and start == 0 and not n_calls:  # a cell in the way of the rows that come next
                    n_calls.append(1)
                    at = llama_cpp.llama_memory_seq_pos_max(self.memory, MAIN) + 1
                    one = np.array([300], np.int32)
                    self.decode(Rows(np.arange(at, at + 1), tokens=one), at, Plan(), "in the way")
                    self.copy(MAIN, 5, at)
                    remove(self, MAIN, at)

            monkeypatch.setattr(type(vlm.decoder), "remove", leave_one)
            got = vlm.read_prompt(*requests[1], chat=False)
            assert n_calls
            monkeypatch.undo()
            assert same(got, fresh(models, requests[1])).reused_tokens == 0
            assert "fallback" in got[1].milliseconds
            assert same(vlm.read_prompt(*requests[0], chat=False), fresh(models, requests[0])).reused_tokens > 20


def test_nothing_is_left_when_it_is_off(families):
    with engine(families["llama"], reuse=False) as vlm:
        for _ in range(2):
            state, report = vlm.read_prompt("a", random_image(1), "star")
            assert report.reused_tokens == 0
        assert cells(vlm) == [(0, state.n_cells - 1)] + [(-1, -1)] * (N_SEQUENCES - 1)


def test_a_long_answer_takes_the_cells_of_the_stem(families):
    """The context is as large as without reuse, and before it is full nobody pays."""
    models = families["llama"]
    with engine(models, n_ctx=256) as vlm:
        request = ("ab <__media__> " + "c" * 140, random_image(1), PruneConfig(1.0, 4, 2))
        free = 256 - 4 - vlm.read_prompt(*request, chat=False)[1].n_text_tokens
        assert vlm.llama._ctx.n_parked == 45 < free
        unwanted = [vlm.llama.token_eos(), *range(3 + 0x80, 3 + 0x100)]  # after part of a character there is more than max_tokens
        ask = lambda n: vlm.generate(*request, max_tokens=n, chat=False, logit_bias=dict.fromkeys(unwanted, -100.0))
        assert ask(free - 45).finish_reason == "length" and vlm.llama._ctx.n_parked == 45
        assert same(vlm.read_prompt(*request, chat=False), fresh(models, request, n_ctx=256)).reused_tokens > 49
        answer = ask(None)
        assert answer.finish_reason == "length" and vlm.llama._ctx.n_parked == 0
        assert answer.report.n_kv_cells + answer.report.n_generated >= 256
        assert same(vlm.read_prompt(*request, chat=False), fresh(models, request, n_ctx=256)).reused_tokens == 0
        with pytest.raises(errors.ContextLengthError):
            vlm.read_prompt("x" * 300, chat=False)
        assert vlm.read_prompt(*request, chat=False)[1].reused_tokens > 49
        assert vlm.read_prompt("y" * 240, chat=False)[0].n_cells > 240  # does not fit beside the stem


def test_an_owner_finds_the_llama_as_if_nothing_had_been_asked(families):
    models = families["llama"]
    with engine(models, n_ctx=256) as vlm:
        expected = vlm.llama.create_completion("x" * 100, max_tokens=100, temperature=0.0)["choices"][0]["text"]
        vlm.generate("ab <__media__> c", random_image(1), "star", max_tokens=3, chat=False)
        assert [first for first, _ in cells(vlm)] == [-1, 0, -1, -1, -1, -1, -1]
        assert vlm.llama.create_completion("x" * 100, max_tokens=100, temperature=0.0)["choices"][0]["text"] == expected
        assert [first for first, _ in cells(vlm)] == [0, -1, -1, -1, -1, -1, -1]
        vlm.generate("ab <__media__> c", random_image(1), "star", max_tokens=3, chat=False)
        state = vlm.llama.save_state()
        vlm.llama.load_state(state)
        assert vlm.llama.create_completion("x" * 200, max_tokens=40)


@pytest.mark.parametrize("preset", ["off", "star"])
def test_chat_handler(families, preset):
    """Questions about one image through Llama.create_chat_completion, with other uses of the Llama between."""
    image = random_image(3, 168, 168)
    ask = lambda llm, question, **options: llm.create_chat_completion(
        [user(data_url(image), question)], max_tokens=8, temperature=0.0, **options
    )
    text = lambda response: response["choices"][0]["message"]["content"]
    make = lambda **options: Llama(
        str(refvlm.TEXT_MODEL), n_ctx=1024, n_threads=1, verbose=False, flash_attn=True,
        chat_handler=StarChatHandler(str(refvlm.MMPROJ), verbose=False, prune=preset, **options),
    )  # fmt: skip
    llm, plain = make(), make(reuse=False, image_cache_bytes=0)
    expected = {q: text(ask(plain, q)) for q in (COLOR, PLATE)}
    reused = []
    for i, question in enumerate((COLOR, PLATE, PLATE, COLOR, PLATE, COLOR)):
        if i == 2:
            llm.create_completion("USER: is there a star?", max_tokens=3)
        if i == 3:
            next(ask(llm, PLATE, stream=True))
        if i == 4:
            with pytest.raises(errors.StarEdgeError):
                llm.create_chat_completion([user("data:image/png;base64,AAAA", COLOR)])
        response = ask(llm, question)
        assert text(response) == expected[question]
        reused.append(response["star_edge"]["reused_tokens"] > 50)
        assert response["star_edge"]["images"][0]["cached"] is (i > 0)
    assert reused == [False, True, False, True, True, True]
    llm.close()
    plain.close()
