"""PruneConfig.seen_below: the answer sees a dropped row in the layers below the stage that dropped it, with the masses
of each layer, against the float64 reference.
"""

from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from helpers import bounds, stock
from helpers.choosing import by_score, generate, keep_all
from helpers.families import MODES
from helpers.models import random_image, random_prompt
from helpers.reference import Decoder
from helpers.tap_helpers import token_step
from llama_cpp import Llama

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.errors import ConfigError, EngineError
from star_edge.llamacpp.context import PARKED, DecoderContext, attach_tap
from star_edge.llamacpp.names import KV_TYPES
from star_edge.llamacpp.tap import Plan, Tap
from star_edge.pruning.selection import Selection
from star_edge.rows import Rows

FIXTURES = Path(__file__).parent / "fixtures"
PARTS = [5, (6, 7), 4, (9, 5), 13]
ONE, TWO = [(3, [11, 12])], [(2, [20, 20]), (5, [3, 1])]
N_ANSWER = 8


@pytest.fixture(params=[("llama", "f32"), ("qwen2vl", "f32"), ("llama", "fa"), ("qwen2vl", "fa")], ids="-".join)
def model(request, families, decoder_rounding):
    """(models, context, reference, rounding), in a mode of tests/helpers/families.py."""
    family, mode = request.param
    models, tap, (flash, cache) = families[family], Tap(), MODES[mode]
    llama = stock.load(models.text, flash, n_threads=1, type_k=KV_TYPES[cache], type_v=KV_TYPES[cache])
    attach_tap(llama, tap)
    kind = None if cache == "f32" else np.float16
    yield models, DecoderContext(llama, tap), Decoder(str(models.text), kind), decoder_rounding(family, mode)
    llama.close()
    tap.close()


def with_mass(seen, n):
    """The best n, each of which stands for as many as it can in equal parts."""
    kept = by_score(seen, n).kept
    mass = np.ones(len(seen.hidden)) if seen.mass is None else seen.mass
    return Selection(kept, np.full(n, mass.sum() / n))


def column_bias(reference, prompt, state, windows, n_answer, first_mass):
    """(n_layers, n) of the prompt and its answer: what each layer adds to a column."""
    image_rows = [np.flatnonzero(prompt.image_of_row == i) for i in range(2)]
    bias = np.zeros((reference.n_layer, len(prompt.image_of_row) + n_answer))
    bias[:, prompt.image_of_row.size :] = 0
    bias[:, np.flatnonzero(prompt.image_of_row >= 0)] = np.log(first_mass)
    for (layer, _), stage in zip(windows, state.selections):
        for rows, selection in zip(image_rows, stage):
            bias[layer:, rows] = -np.inf
            bias[layer:, rows[selection.kept]] = 0 if selection.mass is None else np.log(selection.mass)
    return bias


def forward(reference, prompt, tokens, bias):
    """Logits of the last row of the prompt and of each row of the answer, unpruned but for the bias."""
    rows = np.concatenate([prompt.embed(reference), reference.embed(tokens)])
    after = prompt.next_position + np.arange(len(tokens))
    if prompt.positions.ndim > 1:
        after = np.stack([after, after, after, 0 * after])
    positions = np.concatenate([prompt.positions, after], axis=-1)
    return reference.forward(rows, positions, bias)[-len(tokens) - 1 :]


@pytest.mark.parametrize("choose, first_mass", [(by_score, 1.0), (with_mass, 2.0)], ids=["gone", "mass"])
@pytest.mark.parametrize("windows", [ONE, TWO], ids=["one", "two"])
def test_answer_sees_each_dropped_row_below_its_stage(model, windows, choose, first_mass):
    models, context, reference, rounding = model
    context.clear()
    context.owner.forget_prompt()
    prompt = random_prompt(models, PARTS)
    if first_mass != 1.0:  # what a vision stage would leave
        for segment in prompt.segments:
            segment.mass = None if segment.image is None else np.full(len(segment.rows), first_mass)
    stage = DecoderStage(windows, choose, seen_below=True)
    state = prefill(context, prompt.segments, prompt.next_position, stage)
    assert state.in_place
    history, tokens = generate(context, state, N_ANSWER)
    bias = column_bias(reference, prompt, state, windows, N_ANSWER, first_mass)
    right = forward(reference, prompt, tokens, bias)
    assert all(bounds.are_close(a, b, rounding) for a, b in zip(history, right, strict=True))
    # what the bound tells apart: dropped rows that are gone below, or seen one layer further or less
    image = np.flatnonzero(prompt.image_of_row >= 0)
    gone, later = bias.copy(), bias.copy()
    gone[: windows[0][0]] = bias[windows[0][0]]
    later[windows[0][0]] = bias[windows[0][0] - 1]
    for wrong in (gone, later):
        assert wrong[:, image].tolist() != bias[:, image].tolist()
        theirs = forward(reference, prompt, tokens, wrong)
        assert not all(bounds.are_close(a, b, rounding) for a, b in zip(history[1:], theirs[1:]))


def test_keep_all_is_exact(model):
    models, context, _, _ = model
    prompt = random_prompt(models, PARTS)
    runs = []
    for stage in (None, DecoderStage([(2, [0, 0]), (5, [0, 0])], keep_all, seen_below=True)):
        context.clear()
        context.owner.forget_prompt()
        runs.append(generate(context, prefill(context, prompt.segments, prompt.next_position, stage), N_ANSWER))
    assert runs[0][1] == runs[1][1] and all(np.array_equal(a, b) for a, b in zip(runs[0][0], runs[1][0]))


# Times that a mask is due: once for each level in which a layer reads it. The one layer without a window in gemma3 is
# the last but one; the one with a window in gemma4-e2b is the first of three.
@pytest.mark.parametrize(("family", "n_writes"), [("gemma3", [3] * 6), ("gemma4-e2b", [2, 3])], ids=["gemma3", "e2b"])
@pytest.mark.parametrize("flash", [False, True], ids=["soft", "flash"])
def test_a_mask_that_nothing_reads_any_more_is_left_alone(family, n_writes, flash):
    """Where layers with and without a sliding window take turns there are two masks. ggml gives the memory of one to
    others after its last layer, and what is written there then is lost: an answer that sees the same in all levels is
    stock's. In the 4,096 cells of gemma4-e2b with flash attention such a write makes it NaN.
    """
    tap = Tap()
    text = str(FIXTURES / family / "text.gguf")
    llama = Llama(text, n_ctx=4096, n_batch=64, flash_attn=flash, n_threads=1, verbose=False)
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)

    def answer(layer):
        """Logits of a token after 30, and how often the tap has written."""
        context.clear()
        context.decode(Rows(np.arange(30, dtype=np.int32), np.arange(40, 70, dtype=np.int32)), 0, Plan(), "test")
        context.owner.continue_prompt(30, 30)
        if layer:
            tap.set_levels([0, layer], np.zeros((2, 30), np.float32), np.full(30, -1, np.int32))
        tap.take_traffic()
        llama.n_tokens = 30
        logits = token_step(llama, 7)
        context.owner.forget_prompt()
        llama.n_tokens = 0
        return logits, tap.take_traffic().n_writes

    expected, _ = answer(0)
    writes = []
    for layer in range(1, context.n_layers):
        logits, n = answer(layer)
        writes.append(n)
        assert np.array_equal(logits, expected)
    assert writes == n_writes
    llama.close()
    tap.close()


@pytest.fixture(scope="module")
def vlm(families):
    models = families["llama"]
    with StarVLM(models.text, models.mmproj, n_ctx=256, n_threads=1) as vlm:
        yield vlm


CONFIG = PruneConfig(decoder_keep=0.2, decoder_layer=5, representatives="none", seen_below=True)


def answers(vlm, config, n=6):
    return vlm.generate("what is this?", random_image(1), prune=config, max_tokens=n, temperature=0.0)


def test_the_engine_s_answers_see_what_was_dropped(vlm):
    """Another text than without it, the same again, and the other option is what it was."""
    seen, gone = answers(vlm, CONFIG), answers(vlm, replace(CONFIG, seen_below=False))
    again = answers(vlm, CONFIG)
    assert seen.text == again.text and seen.report.n_kv_cells == gone.report.n_kv_cells
    assert answers(vlm, replace(CONFIG, seen_below=False)).text == gone.text
    first = [
        vlm.read_prompt("what is this?", random_image(1), c)[0].logits
        for c in (CONFIG, replace(CONFIG, seen_below=False))
    ]
    assert np.array_equal(*first)  # the first token is the prompt's


def test_another_question_about_the_image_finds_its_rows(vlm, families):
    """What the first answer saw does not leak into the second, and the second sees what it should."""
    models = families["llama"]
    answers(vlm, CONFIG)
    second = [vlm.generate("and that?", random_image(1), prune=CONFIG, max_tokens=6, temperature=0.0)]
    with StarVLM(models.text, models.mmproj, n_ctx=256, n_threads=1) as fresh:
        second.append(fresh.generate("and that?", random_image(1), prune=CONFIG, max_tokens=6, temperature=0.0))
    assert second[0].report.reused_tokens > 0 == second[1].report.reused_tokens
    assert second[0].text == second[1].text


def test_cells_are_free_after_the_answer(vlm):
    answers(vlm, CONFIG)
    context = vlm.decoder.owner
    context.kv_cache_clear()
    assert llama_cpp.llama_memory_seq_pos_max(context.memory, PARKED) == -1 and context.n_parked == 0


def test_an_answer_that_needs_the_cells_gets_them(families):
    """Dropped rows go when the context is full; the answer goes on."""
    models = families["llama"]
    with StarVLM(models.text, models.mmproj, n_ctx=96, n_threads=1) as vlm:
        _, report = vlm.read_prompt("what is this?", random_image(1), CONFIG)
        n = 90 - report.n_kv_cells
        answer = vlm.generate("what is this?", random_image(1), prune=CONFIG, max_tokens=n, temperature=0.0)
        assert answer.report.n_generated == n or answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "layers, bias, witness",
    [
        ([1, 3], [[0, 0], [0, 0]], [-1, -1]),  # the first layers have no level
        ([0, 3, 3], [[0, 0], [0, 0], [0, 0]], [-1, -1]),  # a level of no layer
        ([0, 3], [[0, 0], [-np.inf, 0]], [1, 2]),  # a witness that is no cell
        ([0, 3], [[0, 0], [0, 0]], [1, 1]),  # one that asks another
        ([0, 3], [[0, 0], [0, -np.inf]], [1, -1]),  # one that is hidden itself
    ],
)
def test_levels_that_cannot_be(layers, bias, witness):
    tap = Tap()
    with pytest.raises(EngineError, match="levels"):
        tap.set_levels(layers, np.array(bias, np.float32), np.array(witness, np.int32))
    tap.set_levels([0, 3], np.zeros((2, 2), np.float32), np.array([1, -1], np.int32))
    tap.forget_levels()
    tap.close()


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_it_is_a_bool(value):
    with pytest.raises(ConfigError, match="seen_below"):
        PruneConfig(seen_below=value)


def test_decoder_representatives_are_the_decoder_stages_alone():
    """The vision stage's masses stay with what stays of them: none is added, none is lost to another."""
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        config = PruneConfig(0.5, 0.25, decoder_representatives="none")
        image = vlm.read_prompt("how many squares?", refvlm.DEMO_IMAGE, config)[1].images[0]
    mass = dict(zip(image.vision_kept.tolist(), image.vision_mass.tolist()))
    assert sum(mass.values()) == pytest.approx(144)
    assert image.decoder_mass.tolist() == [mass[i] for i in image.decoder_kept.tolist()]
    with pytest.raises(ConfigError, match="decoder_representatives"):
        PruneConfig(decoder_representatives="clusters")


def test_on_the_reference_model():
    """Where the vision stage does the work the answer is the same."""
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        config = PruneConfig(0.375, 0.1875)
        texts = {
            vlm.generate("how many squares?", refvlm.DEMO_IMAGE, prune=replace(config, seen_below=b), max_tokens=4).text
            for b in (True, False)
        }
    assert len(texts) == 1
