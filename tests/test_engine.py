"""StarVLM as a user sees it: sources of images, budgets, streaming, llama_cpp's own sampling options, and the
report.
"""

import base64
import io
import json
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
from helpers import bounds, stock
from helpers.choosing import by_score, by_share, keep_all
from helpers.models import random_image, random_prompt
from helpers.presets import kept
from llama_cpp import LlamaGrammar
from PIL import Image

from star_edge import PRESETS, PruneConfig, StarVLM, refvlm
from star_edge.decoder.cells import ParkingCells
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.errors import ConfigError, ContextLengthError
from star_edge.io.images import load_image
from star_edge.llamacpp.context import PARKED, DecoderContext, attach_tap
from star_edge.llamacpp.tap import Tap
from star_edge.pruning.config import choose_layer, keep_count
from star_edge.pruning.presets import override
from star_edge.pruning.selection import average_tokens, top_k

COLOR = "what color is the triangle?"
PLATE = "what number is shown?"


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024) as engine:
        yield engine


def test_answers_of_the_reference_model(vlm):
    for question in refvlm.demo_questions():
        assert vlm.generate(question["question"], refvlm.DEMO_IMAGE, None, 8).text.strip() == question["answer"]


def test_every_kind_of_image_source(vlm):
    data = refvlm.DEMO_IMAGE.read_bytes()
    picture = Image.open(io.BytesIO(data))
    sources = [
        refvlm.DEMO_IMAGE,
        str(refvlm.DEMO_IMAGE),
        data,
        picture,
        np.asarray(picture.convert("RGB")),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    expected, _ = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE)
    for source in sources:
        for images in (source, [source], (source,)):
            state, _ = vlm.read_prompt(COLOR, images)
            assert np.array_equal(state.logits, expected.logits)


@pytest.mark.parametrize(
    ("keep", "n"), [(1.0, 144), (1, 1), (144, 144), (0.5, 72), (1e-9, 1), (0.121, 17), (0.122, 18), (7, 7)]
)
def test_fractions_and_counts(vlm, keep, n):
    _, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(vision_keep=keep))
    assert (report.n_vision_kept, report.n_decoder_kept, report.decoder_layer) == (n, n, None)
    _, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(decoder_keep=keep, decoder_layer=3))
    assert (report.n_vision_kept, report.n_decoder_kept, report.decoder_layer) == (144, n, 3)


def test_halves_round_up_and_counts_are_checked():
    assert [keep_count("k", 0.5, n) for n in (1, 3, 5, 144)] == [1, 2, 3, 72]
    assert keep_count("k", 3, 3) == 3


def test_default_layer():
    assert [choose_layer(None, n) for n in (2, 3, 6, 22, 28, 32, 80)] == [1, 2, 4, 15, 19, 21, 53]
    assert choose_layer(5, 6) == 5


def test_presets_and_overrides():
    assert PRESETS["off"] is None
    assert override(None) is None
    assert override(None, vision_keep=0.5) == PruneConfig(vision_keep=0.5)
    assert override(PRESETS["balanced"], decoder_layer=3) == replace(PRESETS["balanced"], decoder_layer=3)


def test_top_k_is_stable():
    assert top_k(np.array([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert top_k(np.array([2.0, 2.0, 2.0, 2.0]), 2).tolist() == [0, 1]
    with pytest.raises(ValueError):
        top_k(np.ones(3), 4)


def test_mass_in_both_stages_is_in_the_report(vlm):
    state, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(0.5, 0.125, 2))
    image = report.images[0]
    assert image.vision_mass.sum() == image.decoder_mass.sum() == pytest.approx(144)
    assert len(image.vision_mass) == 72 and len(image.decoder_mass) == 18 and state.in_place
    plain, _ = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, None)  # the bias is gone
    fresh = vlm.generate(COLOR, refvlm.DEMO_IMAGE, None, 4)
    assert fresh.text == " red" and plain.n_cells == 153


def test_off_is_none(vlm):
    a, _ = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, "off")
    b, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, None)
    assert np.array_equal(a.logits, b.logits)
    assert report.config is None and report.average_tokens == 144


def test_report(vlm):
    answer = vlm.generate(PLATE, refvlm.DEMO_IMAGE, PruneConfig(0.5, 0.125, 2, representatives="none"), 8)
    report = answer.report
    image = report.images[0]
    assert (report.n_image_tokens, report.n_vision_kept, report.n_decoder_kept) == (144, 72, 18)
    assert report.average_tokens == pytest.approx((2 * 72 + 4 * 18) / 6) == average_tokens(72, [(2, 18)], 6)
    assert report.token_layer_ratio == pytest.approx(
        6 * (report.n_text_tokens + 144) / (6 * report.n_text_tokens + 2 * 72 + 4 * 18)
    )
    assert report.n_kv_cells == report.n_text_tokens + 18
    tokens = vlm.llama.input_ids[
        : report.n_kv_cells
    ].tolist()  # what logits processors see: text as it is, one id for image rows
    assert tokens[2:20] == [0] * 18 and vlm.llama.detokenize(tokens[20:]).decode().strip() == f"{PLATE} ASSISTANT:"
    assert set(image.decoder_kept) <= set(image.vision_kept) and (np.diff(image.decoder_kept) > 0).all()
    assert np.array_equal(image.vision_kept, top_k(image.vision_scores, 72))
    assert np.array_equal(image.decoder_kept, image.vision_kept[top_k(image.decoder_scores, 18)])
    assert image.kept_on_grid(image.decoder_kept).sum() in (17, 18)  # the token of CLS has no place
    ms = report.milliseconds
    assert {
        "preprocess",
        "encode",
        "vision_stage",
        "prefix",
        "probe",
        "decoder_scores",
        "decoder_stage",
        "resume",
        "first_token",
        "generate",
    } <= set(ms)
    assert ms["first_token"] >= ms["encode"] + ms["probe"] + ms["resume"]
    assert report.n_generated == 2 and report.n_sampled == 3  # two digits, and the end
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["images"][0]["decoder_kept"] == image.decoder_kept.tolist() and loaded["average_tokens"] == 36


def test_picture_of_a_report(vlm):
    """Beside the image one panel for each stage; what cannot be drawn is refused."""
    _, pruned = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(0.5, 0.125, 2))
    _, vision = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(0.5, 1.0))
    widths = [report.picture(refvlm.DEMO_IMAGE).width for report in (vision, pruned)]
    assert 2 * 336 < widths[0] < 3 * 336 < widths[1]
    for report, index in ((pruned, 1), (pruned, -1), (vlm.read_prompt(COLOR)[1], 0)):
        with pytest.raises(ConfigError, match="has no image"):
            report.picture(refvlm.DEMO_IMAGE, index)
    pruned.images[0].grid = None
    with pytest.raises(ConfigError, match="no grid"):
        pruned.picture(refvlm.DEMO_IMAGE)


@pytest.mark.parametrize("reuse", [True, False])
def test_cells_of_dropped_tokens(reuse):
    """The report counts the cells of what stays. Dropped tokens' are free at once without reuse, and with it when
    somebody needs the room.
    """
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256, reuse=reuse) as vlm:
        _, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(0.5, 0.125, 2, seen_below=False))
        last = lambda sequence: llama_cpp.llama_memory_seq_pos_max(vlm.decoder.memory, sequence)
        assert report.n_kv_cells == last(0) + 1 == 9 + 18
        assert vlm.llama._ctx.n_parked == (72 - 18 if reuse else 0)
        assert (last(PARKED) >= 0) is reuse
        long = COLOR + "!" * 150  # llama_cpp's time for an answer grows with the square of its length
        answer = vlm.generate(
            long, refvlm.DEMO_IMAGE, PruneConfig(0.5, 0.125, 2), None, logit_bias={vlm.llama.token_eos(): -100.0}
        )
        assert answer.report.n_kv_cells + answer.report.n_generated >= 256 and answer.report.n_generated > 72 - 18
        assert last(PARKED) == -1


def test_several_images_keep_a_share_each(vlm):
    other = random_image(3, 200, 120)
    state, report = vlm.read_prompt(
        "left <__media__> middle <__media__> right", [refvlm.DEMO_IMAGE, other], PruneConfig(0.5, 10, 2), chat=False
    )
    assert [len(i.vision_kept) for i in report.images] == [72, 72]
    assert [len(i.decoder_kept) for i in report.images] == [10, 10]
    assert state.in_place and report.n_text_tokens + 20 == report.n_kv_cells


def test_markers_in_the_prompt_are_kept_in_place(families):
    models = families["llama"]
    with StarVLM(models.text, models.mmproj, n_ctx=512) as vlm:
        front = vlm._chat.format("what?", 1)
        inside = vlm._chat.format("before <__media__> after", 1)
        assert front == "USER:<__media__>what? ASSISTANT:"
        assert inside == "USER:before <__media__> after ASSISTANT:"
        # a prompt that holds the marker as text, without images
        assert vlm._chat.format("plain", 0) == "USER: plain ASSISTANT:"


def test_stream_equals_answer(vlm):
    answer = vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=8)
    stream = vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=8, stream=True)
    assert stream.report.n_vision_kept == kept("balanced").vision and stream.text == ""
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.text == answer.text
    assert stream.finish_reason == answer.finish_reason == "stop"
    assert vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=1).finish_reason == "length"


def test_sampling_is_llama_cpps(vlm):
    grammar = LlamaGrammar.from_string('root ::= " green" | " blue"', verbose=False)
    assert vlm.generate(COLOR, refvlm.DEMO_IMAGE, max_tokens=4, grammar=grammar).text in (" green", " blue")
    stopped = vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=8, stop=[" 7"])
    assert stopped.text == " 0" and stopped.finish_reason == "stop"
    hot = [
        vlm.generate(
            COLOR, refvlm.DEMO_IMAGE, max_tokens=8, temperature=20.0, top_k=0, top_p=1.0, min_p=0.0, seed=s
        ).text
        for s in (1, 1, 2, 3)
    ]
    assert hot[0] == hot[1] and len(set(hot)) > 1
    red = vlm.llama.tokenize(b" red", add_bos=False)[-1]
    assert vlm.generate(COLOR, refvlm.DEMO_IMAGE, max_tokens=1, logit_bias={red: -100.0}).text != " red"


@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_generation_through_llama_cpp_has_the_true_positions(families, decoder_rounding, family):
    """Logits of every token that `generate` samples equal the float64 reference's at the positions after the unpruned
    prompt, and not those at positions that go on from the kept rows."""
    from helpers.reference import Decoder
    from llama_cpp import LogitsProcessorList

    models, image = families[family], random_image(4, 112, 112) if family == "qwen2vl" else random_image(4)
    seen = []

    def capture(tokens, scores):
        seen.append(np.array(scores, np.float64))
        return scores

    config = PruneConfig(0.75, 0.5, 3, representatives="none", seen_below=False)
    with StarVLM(
        models.text, models.mmproj, n_ctx=512, flash_attn=False, type_k="f32", type_v="f32", n_threads=2
    ) as vlm:
        answer = vlm.generate(
            "ab<__media__>cde?", image, config, 12, chat=False, logits_processor=LogitsProcessorList([capture])
        )
        report = answer.report.images[0]
        prompt = vlm.tokenize("ab<__media__>cde?", [image], chat=False)
        before, chunk, after = prompt.chunks
        embeddings = vlm.encoder.encode(chunk).embeddings[report.vision_kept].astype(np.float64)
        prompt.close()
    reference = Decoder(str(models.text))
    n, end = len(before.tokens), len(before.tokens) + chunk.n_positions
    rows = np.concatenate([reference.embed(before.tokens), embeddings, reference.embed(after.tokens)])
    text = lambda start, k: (
        np.stack([np.arange(start, start + k)] * 3 + [np.zeros(k, int)])
        if models.mrope
        else np.arange(start, start + k)
    )
    offset = np.array([[n], [n], [n], [0]]) if models.mrope else n
    positions = np.concatenate(
        [text(0, n), chunk.positions[..., report.vision_kept] + offset, text(end, len(after.tokens))], axis=-1
    )
    of_image = np.repeat([-1, 0, -1], [n, len(embeddings), len(after.tokens)])
    kept = n + np.flatnonzero(np.isin(report.vision_kept, report.decoder_kept))
    want = reference.prune(rows, positions, of_image, K=3, keep_rows=kept)
    tokens = [int(s.argmax()) for s in seen]
    assert len(tokens) >= 12  # more where bytes make no character yet
    rounding = decoder_rounding(family)
    are_close = lambda at: [
        bounds.are_close(a, b, rounding)
        for a, b in zip(seen, reference.generate(want, len(tokens), at, forced=tokens)[1])
    ]
    assert all(are_close(end + len(after.tokens)))
    assert answer.report.n_kv_cells != end + len(after.tokens)
    assert not any(are_close(answer.report.n_kv_cells)[1:])


def test_nothing_is_left_for_direct_use_of_llama(vlm):
    """After an answer, a closed stream and a finished stream, `vlm.llama` completes text as a fresh Llama does."""
    prompt = vlm.llama.tokenize(b"USER: is there a red star? ASSISTANT:", add_bos=True)
    complete = lambda llama: llama.create_completion(prompt=prompt, max_tokens=6, temperature=0)["choices"][0]["text"]
    fresh = stock.load(refvlm.TEXT_MODEL, True)
    expected = complete(fresh)
    fresh.close()
    vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=4)
    assert complete(vlm.llama) == expected
    stream = vlm.generate(PLATE, refvlm.DEMO_IMAGE, stream=True)
    next(stream)
    stream.close()
    assert complete(vlm.llama) == expected
    list(vlm.generate(PLATE, refvlm.DEMO_IMAGE, stream=True))
    assert complete(vlm.llama) == expected


def test_answer_goes_on_at_the_true_positions(vlm):
    """The same tokens, sampled by llama_cpp and decoded by hand at the positions that follow the unpruned prompt."""
    config = PruneConfig(0.5, 0.125, 2)
    answer = vlm.generate(PLATE, refvlm.DEMO_IMAGE, config, 8)
    state, report = vlm.read_prompt(PLATE, refvlm.DEMO_IMAGE, config)
    assert state.next_position == report.n_text_tokens + 144
    vlm.decoder.tap.set_position_shift(state.n_cells, state.next_position - state.n_cells)
    out, tokens = state.logits, []
    for i in range(answer.report.n_sampled - 1):
        tokens.append(int(out.argmax()))
        vlm.decoder.tap.begin()
        out = stock.decode(vlm.llama, tokens=tokens[-1:], positions=[state.n_cells + i])
    assert vlm.llama.detokenize(tokens).decode() == answer.text


def test_cells_that_do_not_come_back_are_noticed(families, monkeypatch):
    """When kept rows land in other cells, the kept rows are decoded again from the start, and the result says so."""
    models = families["llama"]
    prompt = random_prompt(models, [12, (10, 20), 9])
    tap = Tap()
    llama = stock.load(models.text, True)
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)

    def frees_everything(self, start, keep_row, cells):
        self.context.park(start, PARKED)
        self.context.remove(PARKED, 0)
        self.n_cells = start

    with monkeypatch.context() as patch:
        patch.setattr(ParkingCells, "free", frees_everything)
        with_mass = DecoderStage([(3, [20])], lambda seen, n: by_share(seen, n, 0.5))
        heavy = prefill(context, prompt.segments, prompt.next_position, with_mass)
        assert not heavy.in_place and heavy.selections[0][0].mass is None  # nothing is claimed that was not done
        context.clear()
        state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(3, [20])], by_score))
    assert not state.in_place and state.n_cells == 41
    # what is left is an ordinary prompt of the kept rows at their own positions
    context.clear()
    kept = state.selections[0][0].kept
    image = prompt.segments[1].rows
    prompt.segments[1].rows = type(image)(image.positions[kept], embeddings=image.embeddings[kept])
    expected = prefill(context, prompt.segments, prompt.next_position, None)
    assert np.array_equal(state.logits, expected.logits)
    llama.close()
    tap.close()


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_non_causal_images(families, flash_attn):
    """Image rows that attend to each other both ways: keep-all equals stock with causal attention switched off for
    them.
    """
    models = families["llama"]
    prompt = random_prompt(models, [6, (5, 8), 3, (4, 4), 7])
    for segment in prompt.segments:
        segment.causal = segment.image is None
    plain = stock.load(models.text, flash_attn)
    for segment in prompt.segments:
        llama_cpp.llama_set_causal_attn(plain.ctx, segment.causal)
        expected = stock.decode(plain, segment.rows.tokens, segment.rows.embeddings, segment.rows.positions)
    tap = Tap()
    llama = stock.load(models.text, flash_attn)
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)
    for layer in (1, 4, 7):
        context.clear()
        state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(layer, [0, 0])], keep_all))
        assert state.in_place and np.array_equal(state.logits, expected)
    plain.close()
    llama.close()
    tap.close()


def test_text_model_without_images(families):
    llama = stock.load(families["llama"].text, True)
    tokens = llama.tokenize(b"USER: hello ASSISTANT:", add_bos=True, special=True)
    expected = stock.decode(llama, tokens=tokens, positions=np.arange(len(tokens)))
    llama.close()
    with StarVLM(families["llama"].text, n_ctx=256, n_threads=2) as vlm:
        state, report = vlm.read_prompt("hello", prune="balanced")
    assert np.array_equal(state.logits, expected)
    assert report.decoder_layer is None and report.notes == [] and report.average_tokens == 0


def test_inspection_of_a_text_model(families, decoder_rounding):
    from helpers.reference import Decoder

    with StarVLM(families["llama"].text, n_ctx=256, n_threads=2) as vlm:
        seen = vlm.inspect("abc def", decoder_layers=[0, 3, 7], chat=False)
        mean = vlm.inspect("abc def", decoder_layers=[3], chat=False, mean_heads=True)
        tokens = vlm.llama.tokenize(b"abc def", add_bos=True, special=True)
    reference = Decoder(str(families["llama"].text))
    assert len(seen.tokens) == len(tokens)
    for layer, attention in seen.decoder.items():
        expected, other = (
            reference.attention(reference.embed(tokens), np.arange(len(tokens)), n) for n in (layer, (layer + 1) % 8)
        )
        assert attention.shape == (8, len(tokens), len(tokens))
        assert (
            bounds.distance(attention, expected)
            <= bounds.share(decoder_rounding("llama", "fa"))
            < bounds.distance(other, expected)
        )
    assert np.allclose(mean.decoder[3], seen.decoder[3].mean(axis=0), atol=1e-6)


def test_inspection_agrees_with_the_decoder_stage(vlm):
    seen = vlm.inspect(COLOR, refvlm.DEMO_IMAGE, decoder_layers=[2], encoder_layers=[3])
    _, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(1.0, 0.5, 2, decoder_scorer="text"))
    assert np.allclose(seen.to_image(2), report.images[0].decoder_scores, atol=1e-6)
    _, report = vlm.read_prompt(COLOR, refvlm.DEMO_IMAGE, PruneConfig(0.5, representatives="none"))
    assert np.allclose(seen.encoder[0][3].mean(axis=(0, 1))[1:], report.images[0].vision_scores, atol=1e-6)
    assert load_image(refvlm.DEMO_IMAGE).shape == (168, 168, 3)


@pytest.mark.parametrize(
    "prune, n_images, n_answer", [("fast", 1, 300), (None, 2, 3), (PruneConfig(decoder_keep=36), 2, 3)]
)
def test_the_context_that_is_needed(prune, n_images, n_answer):
    """Enough, and in the next smaller one the prompt is refused or the answer is cut."""

    def answer(n_ctx):
        with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=n_ctx) as vlm:
            no_end = {vlm.llama.token_eos(): -1e9}
            images = [refvlm.DEMO_IMAGE] * n_images
            return vlm.generate(
                "how many circles?", images, prune, max_tokens=n_answer, temperature=0, logit_bias=no_end
            )

    want = answer(1024)
    assert want.report.n_generated == n_answer and want.report.n_ctx_needed == 512
    again = answer(512)
    assert again.text == want.text and again.report.n_generated == n_answer
    if n_images > 1:
        with pytest.raises(ContextLengthError):
            answer(256)
    else:
        assert answer(256).report.n_generated < n_answer
