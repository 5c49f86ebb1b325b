"""Several decoder stages (progressive pruning): exact with everything kept, faithful to the float64 reference, cells
where they belong.
"""

import numpy as np
import pytest
from helpers import bounds, stock
from helpers.choosing import by_score, generate, keep_all
from helpers.models import random_image, random_prompt
from helpers.reference_hybrid import open_decoder
from llama_cpp import Llama

from star_edge import PRESETS, PruneConfig, StarVLM, refvlm
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.context import MAIN, N_SEQUENCES, DecoderContext, attach_tap
from star_edge.llamacpp.names import KV_TYPES
from star_edge.llamacpp.tap import Plan, Tap
from star_edge.rows import Rows

PARTS = [5, (6, 7), 4, (9, 5), 13]


@pytest.fixture
def rounding(model, families, decoder_rounding):
    return decoder_rounding(next(name for name, models in families.items() if models is model[0]))


@pytest.fixture(scope="module", params=["llama", "qwen2vl", "qwen35", "lfm2"])
def model(request, families):
    """(models, context, reference): f32 cache, flash attention off."""
    models, tap = families[request.param], Tap()
    llama = stock.load(models.text, False, n_threads=1, type_k=KV_TYPES["f32"], type_v=KV_TYPES["f32"])
    attach_tap(llama, tap)
    yield models, DecoderContext(llama, tap), open_decoder(models.text)
    llama.close()
    tap.close()


def fresh(context):
    context.clear()
    context.tap.set_position_shift(0, 0)
    return context


def test_keep_all_is_exact(model):
    models, context, _ = model
    prompt = random_prompt(models, PARTS)
    plain = prefill(fresh(context), prompt.segments, prompt.next_position)
    expected, tokens = generate(context, plain, 8)
    for windows in ([1, 2, 7], [3, 4], [1, 2, 3, 4, 5, 6]):
        state = prefill(
            fresh(context),
            prompt.segments,
            prompt.next_position,
            DecoderStage([(k, [0, 0]) for k in models.at(*windows)], keep_all),
        )
        history, same = generate(context, state, 8)
        assert state.in_place and same == tokens and all(np.array_equal(a, b) for a, b in zip(history, expected)), (
            windows
        )


@pytest.mark.parametrize("windows", [[(2, [30, 20]), (4, [11, 20]), (6, [3, 1])], [(1, [20, 20]), (2, [10, 10])]])
def test_pruned_logits_scores_and_continuation(model, rounding, windows):
    models, context, reference = model
    prompt = random_prompt(models, PARTS)
    windows = list(zip(models.at(*(k for k, _ in windows)), (n for _, n in windows), strict=True))
    state = prefill(fresh(context), prompt.segments, prompt.next_position, DecoderStage(windows, by_score))
    assert state.in_place and [[len(s.kept) for s in stage] for stage in state.selections] == [n for _, n in windows]
    history, tokens = generate(context, state, 12)
    image_rows = [np.flatnonzero(prompt.image_of_row == i) for i in range(2)]
    kept = [np.concatenate([rows[s.kept] for rows, s in zip(image_rows, stage)]) for stage in state.selections]
    want = reference.progressive(
        prompt.embed(reference),
        prompt.positions,
        prompt.image_of_row,
        [(k, rows) for (k, _), rows in zip(windows, kept)],
    )
    before = [np.arange(len(rows)) for rows in image_rows]
    for scores, theirs, stage in zip(state.scores, want.scores, state.selections):
        for i in range(2):
            mine = theirs[image_rows[i][before[i]]]
            limit = bounds.share(rounding) * np.nanmax(theirs)
            assert bounds.distance(scores[i], mine) <= limit
            bounds.assert_best(np.searchsorted(before[i], stage[i].kept), mine, limit)
            before[i] = stage[i].kept
    _, logits = reference.generate(want, 12, prompt.next_position, forced=tokens)
    assert all(bounds.are_close(a, b, rounding) for a, b in zip(history, logits))
    first_only = reference.progressive(
        prompt.embed(reference), prompt.positions, prompt.image_of_row, [(windows[0][0], kept[0])]
    )
    assert not bounds.are_close(first_only.logits, logits[0], rounding)  # the later stages matter


def test_dropped_cells_are_free_again(model):
    models, context, _ = model
    prompt = random_prompt(models, PARTS)
    windows = list(zip(models.at(2, 4, 6), ([30, 20], [11, 20], [3, 1]), strict=True))
    state = prefill(fresh(context), prompt.segments, prompt.next_position, DecoderStage(windows, by_score))
    import llama_cpp

    largest = [llama_cpp.llama_memory_seq_pos_max(context.memory, s) for s in range(N_SEQUENCES)]
    assert largest == [state.n_cells + state.gap - 1] + [-1] * (N_SEQUENCES - 1)
    assert context.is_hybrid or llama_cpp.llama_memory_seq_pos_min(context.memory, MAIN) == 0
    n_free = llama_cpp.llama_n_ctx(context.llama.ctx) - state.n_cells  # all others can be had
    for a in range(0, n_free, context.n_ubatch):
        at = np.arange(a, min(n_free, a + context.n_ubatch), dtype=np.int32)
        positions = np.stack([at, at, at, 0 * at]) if context.mrope else at
        context.decode(Rows(positions, tokens=np.full(len(at), 300)), state.n_cells + state.gap + a, Plan(), "fill")


def test_report_of_a_progressive_run():
    config = PruneConfig(0.5, windows=((0.25, 0.25), (4, 10)))
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as vlm:
        state, report = vlm.read_prompt("how many squares?", refvlm.DEMO_IMAGE, config)
        assert report.windows == [(2, 36), (4, 10)] and report.decoder_layer == 2 and state.in_place
        assert report.average_tokens == pytest.approx((2 * 72 + 2 * 36 + 2 * 10) / 6)
        image = report.images[0]
        assert len(image.decoder_kept) == 10 and set(image.decoder_kept) <= set(image.vision_kept)
        assert image.decoder_mass.sum() == pytest.approx(144)
        _, report = vlm.read_prompt("how many squares?", refvlm.DEMO_IMAGE, PRESETS["pyramiddrop"])
        assert report.windows == [(2, 72), (3, 36), (4, 18)]  # a quarter, a half and three quarters of 6 layers
        assert report.images[0].decoder_mass is None


@pytest.mark.parametrize("scorer", ["text", "last", "raters", "uniform", "random"])
def test_decoder_scorers_answer(families, scorer):
    models = families["qwen2vl"]
    with StarVLM(models.text, models.mmproj, n_ctx=256, n_threads=2) as vlm:
        config = PruneConfig(0.5, windows=((2, 0.25), (5, 3)), decoder_scorer=scorer)
        state, report = vlm.read_prompt("what is this?", [random_image(1), random_image(2)], config)
        again, _ = vlm.read_prompt("what is this?", [random_image(1), random_image(2)], config)
    assert report.windows[-1] == (5, 6) and state.in_place and np.array_equal(state.logits, again.logits)


@pytest.fixture
def decodes(monkeypatch):
    """Rows of each decode."""
    seen, decode = [], DecoderContext.decode

    def spy(self, rows, *rest):
        seen.append(len(rows))
        return decode(self, rows, *rest)

    monkeypatch.setattr(DecoderContext, "decode", spy)
    return seen


@pytest.mark.parametrize(
    "change, resumed",
    [
        ("", [[20 + 4 + 20 + 13], [3 + 4 + 1 + 13]]),
        ("second image not causal", [[20 + 4, 20, 13], [3 + 4, 1, 13]]),
        ("layers tell text apart", [[20, 4, 20, 13], [3, 4, 1, 13]]),
    ],
)
def test_what_stays_is_resumed_in_one_decode(model, decodes, monkeypatch, change, resumed):
    """Unless image rows attend to each other, or later layers need to know which token a row is; and as on stock where
    nothing is dropped.
    """
    models, context, _ = model
    prompt = random_prompt(models, PARTS)
    prompt.segments[3].causal = change != "second image not causal"
    monkeypatch.setattr(context, "tells_text_apart", change == "layers tell text apart")
    probed, (first, second) = [5, 42, 4, 45, 13], models.at(2, 5)
    if context.is_hybrid:  # the question comes apart: its last row's cell is free after the first decode alone
        resumed = [[*chunk[:-1], chunk[-1] - 13, 13] if chunk[-1] > 13 else chunk for chunk in resumed]
    stages = [(first, [20, 20]), (second, [3, 1])]
    prefill(fresh(context), prompt.segments, prompt.next_position, DecoderStage(stages, by_score))
    assert decodes == probed + [n for chunk in resumed for n in chunk]
    decodes.clear()
    prefill(
        fresh(context),
        prompt.segments,
        prompt.next_position,
        DecoderStage([(first, [0, 0]), (second, [3, 1])], later_by_score),
    )
    assert decodes == probed + probed[1:] + resumed[1]  # nothing is dropped at the first stage


def later_by_score(seen, n):
    return by_score(seen, n) if n else keep_all(seen, n)


@pytest.mark.parametrize("text_rows", ["all", "last", "each"])
def test_text_in_several_decodes_scores_alike(model, rounding, text_rows):
    """Of the last decodes some rows are an image's, and some score: with 16 rows a decode they lie otherwise than with
    512.
    """
    models, context, _ = model
    prompt = random_prompt(models, [5, (6, 7), 4, (9, 5), 29])

    def run(context):
        by_row = []

        def choose(seen, n):
            by_row.append(seen.row_attention)
            return by_score(seen, n)

        first, second = models.at(2, 5)
        stage = DecoderStage([(first, [11, 12]), (second, [3, 4])], choose, text_rows)
        return prefill(fresh(context), prompt.segments, prompt.next_position, stage), by_row

    want, rows = run(context)
    tap, f32 = Tap(), KV_TYPES["f32"]
    small = Llama(
        str(models.text),
        n_ctx=512,
        n_batch=16,
        n_ubatch=16,
        n_threads=1,
        n_threads_batch=1,
        type_k=f32,
        type_v=f32,
        verbose=False,
    )
    attach_tap(small, tap)
    got, others = run(DecoderContext(small, tap))
    small.close()
    tap.close()
    assert bounds.are_close(got.logits, want.logits, rounding)
    share = bounds.share(rounding)
    for mine, theirs in zip(got.scores, want.scores, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert bounds.distance(a, b) <= share * b.max() < bounds.distance(np.roll(b, 1), b)
    for a, b in zip(rows, others, strict=True):
        assert (a is None) == (b is None) == (text_rows != "each")
        if a is not None:
            assert a.shape[0] == 29
            assert bounds.distance(a, b) <= share * b.max() < bounds.distance(np.roll(b, 1, axis=0), b)
