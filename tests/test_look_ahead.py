"""PruneConfig.look_ahead: attention over rows that have stopped at layer K, against the float64 reference; and nothing
else changes.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers import bounds, stock
from helpers.choosing import by_score, generate, keep_all
from helpers.families import MODES, load_fixtures
from helpers.models import random_image, random_prompt
from helpers.reference import Decoder

from star_edge import PRESETS, PruneConfig, StarVLM, decoder_stage, errors
from star_edge.decoder import prefill as prefill_module
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.names import KV_TYPES
from star_edge.llamacpp.tap import AttentionRead, Plan, Tap
from star_edge.pruning.config import look_ahead_layers
from star_edge.pruning.presets import override
from star_edge.pruning.selection import with_neighbours

PARTS = [5, (6, 7), 4, (9, 5), 13]
FAMILIES = load_fixtures()


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


def ahead(reference, prompt, layer, layers, bias, text_rows, stopped=True):
    """What the image rows receive. stopped: rows from the first image to the last have the states that enter `layer`,
    in all layers after it. False: they go on, and the result is that of an unpruned prompt.
    """
    rows, positions = prompt.embed(reference), prompt.positions
    image = np.flatnonzero(prompt.image_of_row >= 0)
    first, end = image[0], image[-1] + 1
    states = reference.hidden(rows, positions, layer, bias)
    found = []
    for il in range(layer, layers[1] + 1):
        after, _, weights = reference.layer(il, states, positions, column_bias=bias)
        if il >= layers[0]:
            scoring = weights[:, end:, image].mean(axis=0)
            found.append(scoring.mean(axis=0) if text_rows == "all" else (scoring[-1] + scoring[-4:].mean(axis=0)) / 2)
        if stopped:
            after[first:end] = states[first:end]
        states = after
    return np.mean(found, axis=0)


@pytest.mark.parametrize("text_rows", ["all", "last"])
@pytest.mark.parametrize(("layer", "layers"), [(1, (3, 5)), (2, (2, 3)), (3, (6, 6))])
@pytest.mark.parametrize("mass", [1.0, 2.0])
def test_what_ranks_is_attention_over_rows_that_have_stopped(model, layer, layers, text_rows, mass):
    models, context, reference, rounding = model
    context.clear()
    prompt = random_prompt(models, PARTS)
    bias = np.where(prompt.image_of_row >= 0, np.log(mass), 0.0)
    for segment in prompt.segments:
        segment.mass = None if segment.image is None or mass == 1 else np.full(len(segment.rows), mass)
    stage = DecoderStage([(layer, [11, 12])], by_score, text_rows, look_ahead=layers)
    state = prefill(context, prompt.segments, prompt.next_position, stage)
    assert state.in_place
    got = np.concatenate(state.scores[0])
    right = ahead(reference, prompt, layer, layers, bias, text_rows)
    limit = bounds.share(rounding) * right.max()
    assert bounds.distance(got, right) <= limit
    image_rows = [np.flatnonzero(prompt.image_of_row == i) for i in range(2)]
    for rows, selection, n in zip(image_rows, state.selections[0], (11, 12)):
        bounds.assert_best(selection.kept, right[np.isin(np.concatenate(image_rows), rows)], limit)
        assert len(selection.kept) == n
    # what the bound tells apart: rows that go on, one layer more, and attention at layer K
    for wrong in (
        ahead(reference, prompt, layer, layers, bias, text_rows, stopped=False),
        ahead(reference, prompt, layer, (layers[0], layers[1] + 1), bias, text_rows),
        ahead(reference, prompt, layer, (layer, layer), bias, text_rows),
    ):
        assert bounds.distance(wrong, right) > limit
    # then the kept rows go on as if nothing had been looked at
    kept = np.concatenate([rows[s.kept] for rows, s in zip(image_rows, state.selections[0])])
    pruned = reference.prune(
        prompt.embed(reference), prompt.positions, prompt.image_of_row, K=layer, keep_rows=kept, column_bias=bias
    )
    if mass == 1:  # `by_score` gives the kept rows no mass
        history, tokens = generate(context, state, 6)
        _, expected = reference.generate(pruned, 7, prompt.next_position, forced=[*tokens, 0])
        assert all(bounds.are_close(a, b, rounding) for a, b in zip(history, expected, strict=True))


def test_a_question_of_two_rows(model):
    """There are no four last rows."""
    models, context, reference, rounding = model
    context.clear()
    prompt = random_prompt(models, [5, (6, 7), 2])
    stage = DecoderStage([(2, [11])], by_score, "last", look_ahead=(3, 4))
    got = prefill(context, prompt.segments, prompt.next_position, stage).scores[0][0]
    right = ahead(reference, prompt, 2, (3, 4), np.zeros(len(prompt.image_of_row)), "last")
    assert bounds.distance(got, right) <= bounds.share(rounding) * right.max()


def test_keeping_all_is_exact(model):
    """Bit for bit: all rows come back, with one stage and with several."""
    models, context, _, _ = model
    prompt, runs = random_prompt(models, PARTS), []
    for stage in (
        None,
        DecoderStage([(1, [0, 0])], keep_all, look_ahead=(3, 5)),
        DecoderStage([(1, [0, 0]), (3, [0, 0]), (6, [0, 0])], keep_all, look_ahead=(3, 5)),
    ):
        context.clear()
        context.owner.forget_prompt()
        state = prefill(context, prompt.segments, prompt.next_position, stage)
        assert state.in_place
        runs.append(generate(context, state, 6)[0])
    for history in runs[1:]:
        assert np.array_equal(history, runs[0])


def test_with_seen_below_and_several_stages(model):
    """What is chosen by looking ahead is pruned as if it had been given."""
    models, context, _, _ = model
    prompt, chosen = random_prompt(models, PARTS), []

    def remember(seen, n):
        chosen.append(by_score(seen, n))
        return chosen[-1]

    def given(seen, n):
        return chosen[given.number.__next__()]

    histories = []
    for choose, look in ((remember, (3, 5)), (given, None)):
        context.clear()
        context.owner.forget_prompt()
        given.number = iter(range(len(chosen)))
        stage = DecoderStage([(1, [20, 20]), (4, [5, 6])], choose, seen_below=True, look_ahead=look)
        state = prefill(context, prompt.segments, prompt.next_position, stage)
        histories.append(generate(context, state, 6)[0])
    assert len(chosen) == 4 and np.array_equal(*histories)


def test_rows_that_do_not_come_back(model, monkeypatch):
    """They are decoded again from the start."""
    models, context, _, _ = model
    prompt = random_prompt(models, PARTS)
    context.clear()
    look = prefill_module.look_ahead
    monkeypatch.setattr(prefill_module, "look_ahead", lambda *args: (look(*args)[0], False))
    stage = DecoderStage([(1, [11, 12])], by_score, look_ahead=(3, 5))
    moved = prefill(context, prompt.segments, prompt.next_position, stage)
    assert not moved.in_place
    context.clear()
    segments = [
        s if s.image is None else replace(s, rows=s.rows.take(moved.selections[0][s.image].kept), pruned=True)
        for s in prompt.segments
    ]
    again = prefill(context, segments, prompt.next_position)
    assert np.array_equal(moved.logits, again.logits)


def test_queries_of_rows_that_have_stopped_are_not_computed(model):
    """Unless attention is read there."""
    models, context, _, _ = model
    segment = random_prompt(models, [9]).segments[0]
    skipped, states = [], np.zeros((9, context.n_embd), np.float32)
    for attention in (None, AttentionRead([2], context.n_ctx + 1024)):
        context.clear()
        plan = Plan(window=(2, 2, context.n_layers), inject=states, attention=attention)
        skipped.append(context.decode(segment.rows, 0, plan, "test").n_skipped)
    assert skipped[0] >= skipped[1] + 2  # a product and a rotation


def test_what_touches_a_token_counts_a_share_of_it():
    """Against all pairs. A token without a place has no neighbours, and missing ones count nothing."""
    rng = np.random.default_rng(0)
    grid = (5, 7)
    cells = np.append(np.sort(rng.choice(35, 20, replace=False)), -1)
    values = rng.random(21).astype(np.float32) ** 4
    row, column = np.divmod(cells, grid[1])
    expected = values.copy()
    for i in range(20):
        for j in range(20):
            if max(abs(row[i] - row[j]), abs(column[i] - column[j])) == 1:
                expected[i] = max(expected[i], np.float32(0.1) * values[j])
    got = with_neighbours(values, cells, grid, 0.1)
    assert np.allclose(got, expected, rtol=1e-6) and not np.allclose(got, values)
    assert np.array_equal(with_neighbours(values, cells, None, 0.1), values)


def test_a_neighbour_stays_where_the_question_looks_ahead(families, monkeypatch):
    """What the stage chooses by, of an image's rows on their grid."""
    models, seen = families["qwen2vl"], []
    monkeypatch.setattr(decoder_stage, "BESIDE", 0.9)  # a random model attends to nothing ten times as much
    choose = decoder_stage.choose
    monkeypatch.setattr(decoder_stage, "choose", lambda *a, **k: seen.append(a[1].tokens) or choose(*a, **k))
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        for config in (PruneConfig(0.6, 0.2, 2, look_ahead=5), PruneConfig(0.6, 0.2, 2)):
            _, report = vlm.read_prompt("<__media__>what is it?", random_image(3), config, chat=False)
            tokens, raw = seen.pop(), report.images[0].decoder_scores
            wanted = with_neighbours(raw, tokens.cells, tokens.grid, 0.9) if config.look_ahead else raw
            assert np.array_equal(tokens.attention, wanted)
            assert (not np.array_equal(wanted, raw)) == (config.look_ahead is not None)


# ---- every family ----


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.decoder_problem])
def test_a_family_that_keeps_all_is_stock(name):
    fixture = FAMILIES[name]
    with fixture.engine("fa") as vlm:
        pictures, prompt = [random_image(1), random_image(2)], "one <__media__> two <__media__> what is shown?"
        plain, _ = vlm.read_prompt(prompt, pictures, None, chat=False)
        logits = plain.logits.copy()
        config = PruneConfig(decoder_layer=1, look_ahead=vlm.decoder.n_layers - 1)
        state, report = vlm.read_prompt(prompt, pictures, config, chat=False)
        assert np.array_equal(state.logits, logits)
        ahead, report = vlm.read_prompt(prompt, pictures, replace(config, decoder_keep=0.3), chat=False)
        plain, _ = vlm.read_prompt(prompt, pictures, PruneConfig(decoder_layer=1, decoder_keep=0.3), chat=False)
        notes = [note for note in report.notes if "look ahead" in note]
        if vlm.decoder.is_hybrid:
            assert notes == ["the question does not look ahead: a hybrid decoder's states cannot go back"]
            assert np.array_equal(*(np.concatenate(s.scores[0]) for s in (ahead, plain)))
        else:
            assert notes == [] and report.in_place and report.windows[0][1] < report.n_image_tokens
            assert not np.allclose(*(np.concatenate(s.scores[0]) for s in (ahead, plain)), rtol=1e-3)


def test_a_second_question_is_read_as_the_first_would_be(families):
    """The image's rows come back from the first question's prompt."""
    models = families["qwen2vl"]
    config = PruneConfig(0.6, 0.2, decoder_layer=2, look_ahead=5)
    logits, reused = [], []
    for questions in (["what is it?", "how many are there?"], ["how many are there?"]):
        with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
            for question in questions:
                state, report = vlm.read_prompt(f"<__media__>{question}", random_image(3), config, chat=False)
            logits.append(state.logits.copy())
            reused.append(report.reused_tokens)
    assert np.array_equal(*logits) and reused[0] > reused[1] == 0


# ---- configs ----


@pytest.mark.parametrize(
    ("look_ahead", "n_layers", "layers"),
    [(8, 12, (5, 8)), (0.75, 30, (13, 22)), (0.75, 18, (8, 14)), (0.01, 6, (1, 2))],
)
def test_layers_that_rank(look_ahead, n_layers, layers):
    assert look_ahead_layers(look_ahead, n_layers) == layers


def test_a_config_looks_ahead():
    assert PruneConfig(look_ahead=0.5).decoder_windows(12) == [(4, 1.0)] != PruneConfig().decoder_windows(12)
    assert PruneConfig(look_ahead=np.int64(8)).look_ahead == 8
    config = PruneConfig(decoder_keep=0.2, look_ahead=0.75)
    assert PruneConfig(**config.to_dict()) == config
    for wrong in (0, 1.0, -0.5, True, "8", float("nan")):
        with pytest.raises(errors.ConfigError, match="look_ahead"):
            PruneConfig(look_ahead=wrong)


def test_a_preset_of_a_late_layer_looks_ahead_from_an_early_one():
    config = override(PRESETS["document"], look_ahead=0.75)
    assert config.decoder_windows(12) == [(4, 0.15)] and config.vision_keep == PRESETS["document"].vision_keep
    assert override(PRESETS["document"], look_ahead=0.75, decoder_layer=2).decoder_windows(12) == [(2, 0.15)]
    assert override(PRESETS["balanced"], look_ahead=0.75).decoder_windows(12) == [(4, 0.15)]


def test_layers_that_cannot_be(families):
    models = families["llama"]
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        n = vlm.decoder.n_layers
        for config, words in (
            (PruneConfig(decoder_keep=0.5, look_ahead=n), f"outside 2..{n - 1}"),
            (PruneConfig(decoder_keep=0.5, look_ahead=1), f"outside 2..{n - 1}"),
            (PruneConfig(decoder_keep=0.5, decoder_layer=4, look_ahead=4), "not after layer K = 4"),
        ):
            with pytest.raises(errors.ConfigError, match=words):
                vlm.read_prompt("<__media__>what?", random_image(1), config, chat=False)
        assert vlm.read_prompt("<__media__>what?", random_image(1), None, chat=False)[1].n_image_tokens
