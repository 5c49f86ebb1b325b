"""Every family: the engine against stock llama.cpp with everything kept, and against transformers' own attention,
logits and answers.

Files and numbers are tests/fixtures/<family>, made by tools/fixtures; nothing of transformers is needed here. A new
folder is tested without a change to this file.

What may differ from transformers is what stock llama.cpp rounds on this backend with the unpruned prompts (bounds.py).
The tool makes sure that pruning changes logits by 0.5 at least, and that no greedy token leads by less than 0.02: what
is a tie on this backend may go either way.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers import bounds, stock, stock_attention, support
from helpers.choosing import generate, keep_all
from helpers.families import (
    IS_0_3_35,
    MODES,
    N_THREADS,
    OTHER_FEATURES,
    OTHER_MASK,
    OTHER_TOKENS,
    load_fixtures,
    tokenized,
)

from star_edge import MEDIA_MARKER, PruneConfig
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.names import KV_TYPES
from star_edge.pruning.selection import Selection
from star_edge.vision.composed import GEOMETRIES
from star_edge.vision.row_window import find_row_window
from star_edge.vision.window import find_window

FIXTURES = load_fixtures()
N_GENERATE = 8
BOTH_WAYS = ("gemma3", "gemma4", "gemma4-moe", "gemma4-unified")


@pytest.fixture(scope="module", params=list(FIXTURES))
def fixture(request):
    return FIXTURES[request.param]


@pytest.fixture(autouse=True)
def same_tokens(request):
    """Skips what compares with a fixture's tokens where this libmtmd makes others."""
    compares = "fixture" in request.fixturenames and request.function is not test_whole_pipeline_equals_stock
    if compares and request.getfixturevalue("fixture").tokens_differ:
        pytest.skip(OTHER_TOKENS)


@pytest.fixture(scope="module")
def engines(fixture):
    """(mode, encoder) -> StarVLM of the family, kept while its tests run."""
    made = {}

    def get(mode="f32", encoder=None):
        if (mode, encoder) not in made:
            made[mode, encoder] = fixture.engine(mode, encoder)
        return made[mode, encoder]

    yield get
    for vlm in made.values():
        vlm.close()


@pytest.fixture
def decoder_stage(fixture):
    if fixture.decoder_problem:
        pytest.skip(f"no decoder stage: {fixture.decoder_problem}")


@pytest.fixture
def same_mask(fixture):
    if fixture.mask_differs:
        pytest.skip(OTHER_MASK)


@pytest.fixture(scope="module")
def rounding(fixture, engines):
    """(mode, features) -> what stock llama.cpp rounds in its decoder with the unpruned prompts, given transformers'
    features, or with "pixels" given those of the encoder on this backend, whose own rounding is in it then."""
    measured = {}

    def get(mode, features="given"):
        if (mode, features) not in measured:
            vlm, plain, pairs = engines(mode), load_stock(fixture, mode), []
            for prompt in fixture.prompts if features == "given" else as_transformers(fixture):
                with tokenized(vlm, prompt) as chunks:
                    segments = prompt.segments(chunks, features=encode(vlm, chunks) if features == "pixels" else None)
                stock.clear(plain)
                pairs.append((stock.run_segments(plain, segments, prompt.next_position)[0][0], prompt.logits))
            plain.close()
            measured[mode, features] = bounds.rounding(pairs)
        return measured[mode, features]

    return get


def load_stock(fixture, mode):
    flash_attn, cache = MODES[mode]
    return stock.load(fixture.text, flash_attn, type_k=KV_TYPES[cache], type_v=KV_TYPES[cache], n_threads=N_THREADS)


def as_transformers(fixture):
    """The prompts of which transformers' values hold from the pixels on."""
    prompts = [prompt for prompt in fixture.prompts if not any(fixture.features_differ(prompt))]
    if not prompts:
        pytest.skip(OTHER_FEATURES)
    return prompts


def encode(vlm, chunks):
    """The features of each image."""
    return [vlm.encoder.encode(chunk).embeddings.copy() for chunk in chunks if hasattr(chunk, "causal")]


def afresh(vlm):
    """The decoder with an empty cache, and nothing of an earlier answer in the tap."""
    vlm._reader.begin()
    vlm.decoder.clear()
    return vlm.decoder


def layers(vlm):
    n = vlm.decoder.n_layers
    return sorted({vlm.decoder.nearest_attention(layer) for layer in (1, n // 2, n - 1)})


# ---- the prompt ----


def test_text_is_decoded_as_text_where_layers_tell_it_apart(fixture, engines):
    """Gemma 4 has an embedding of each token in every layer, and no other family here has anything like it."""
    assert engines().decoder.tells_text_apart == fixture.name.startswith("gemma4")


def test_tokens_and_positions(fixture, engines):
    """Both sides are asked the same: token ids, image tokens, and positions as transformers counts them."""
    vlm = engines()
    for prompt in fixture.prompts:
        with tokenized(vlm, prompt) as chunks:
            at, base = 0, 0
            for chunk in chunks:
                is_image = hasattr(chunk, "causal")
                n = chunk.n_tokens if is_image else len(chunk.tokens)
                rows = slice(at, at + n)
                at += n
                if is_image:
                    assert np.array_equal(chunk.positions_at(base), prompt.row_positions[..., rows])
                    assert (prompt.tokens[rows] == -1).all()
                    base += chunk.n_positions
                else:
                    assert np.array_equal(chunk.tokens, prompt.tokens[rows])
                    dense = np.arange(base, base + n)
                    assert np.array_equal(prompt.row_positions.reshape(-1, len(prompt.tokens))[:1, rows], dense[None])
                    base += n
            assert at == len(prompt.tokens) and base == prompt.next_position


def test_which_images_are_causal(fixture, engines, same_mask, rounding):
    """As in transformers, which says of Gemma 3 and of Gemma 4's sizes but E2B and E4B that the rows of an image see
    each other both ways. Its logits are not those of the other way.
    """
    vlm, prompt = engines(), fixture.prompts[0]
    with tokenized(vlm, prompt) as chunks:
        assert {chunk.causal for chunk in chunks if hasattr(chunk, "causal")} == {fixture.name not in BOTH_WAYS}
        segments = prompt.segments(chunks)
    if not fixture.name.startswith("gemma"):
        return
    for wrong in (False, True):
        turned = [replace(s, causal=s.causal != (wrong and s.image is not None)) for s in segments]
        state = prefill(afresh(vlm), turned, prompt.next_position)
        assert bounds.are_close(state.logits, prompt.logits, rounding("f32")) != wrong


# ---- exact: stock llama.cpp ----


@pytest.mark.parametrize("mode", ["f16", "fa", "q8_0"])
def test_keep_all_equals_stock(fixture, engines, decoder_stage, mode):
    """The same features through stock llama.cpp and through a window at K with everything kept: bit for bit, answer
    included.
    """
    vlm, plain = engines(mode), load_stock(fixture, mode)
    for prompt in fixture.prompts:
        with tokenized(vlm, prompt) as chunks:
            segments = prompt.segments(chunks)
        stock.clear(plain)
        expected, expected_tokens = stock.run_segments(plain, segments, prompt.next_position, N_GENERATE)
        for layer in layers(vlm):
            stage = DecoderStage([(layer, [0] * len(prompt.features))], keep_all)
            state = prefill(afresh(vlm), segments, prompt.next_position, stage)
            history, tokens = generate(vlm.decoder, state, N_GENERATE)
            assert state.in_place and state.scores
            assert tokens == expected_tokens
            assert [float(np.abs(a - b).max()) for a, b in zip(history, expected)] == [0.0] * (N_GENERATE + 1)
    plain.close()


@pytest.mark.parametrize("mode", ["f16", "fa", "q8_0"])
def test_whole_pipeline_equals_stock(fixture, engines, mode):
    """Pixels to answer with everything kept, two images: libmtmd and stock llama.cpp against the engine as it is
    without a repair.
    """
    flash_attn, _ = MODES[mode]
    vlm = engines(mode, "stock")
    prompt = fixture.prompts[-1]
    llama = load_stock(fixture, mode)
    plain = stock.Multimodal(llama, fixture.mmproj, flash_attn)
    expected, expected_tokens = plain.ask(prompt.text, prompt.pictures, N_GENERATE)
    plain.close()
    llama.close()
    for config in (None, *(PruneConfig(decoder_layer=layer) for layer in layers(vlm))):
        state, report = vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
        assert np.array_equal(state.logits, expected[0])
        assert generate(vlm.decoder, state, N_GENERATE)[1] == expected_tokens
        assert report.n_decoder_kept == report.n_image_tokens
        assert bool(report.windows) == (config is not None and not fixture.decoder_problem)


def test_frames(fixture, engines):
    """Four frames of a film as images of one prompt: exact with everything kept, and pruned none of them starves."""
    vlm = engines("fa", "stock")
    first, second = fixture.prompts[-1].pictures[:2]
    frames = [np.ascontiguousarray(frame) for frame in (first, first[::-1], second, second[:, ::-1])]
    text = "".join(f"{i}: {MEDIA_MARKER} " for i in range(4)) + "what happens?"
    llama = stock.load(fixture.text, True)
    plain = stock.Multimodal(llama, fixture.mmproj, True)
    expected, expected_tokens = plain.ask(text, frames, N_GENERATE)
    plain.close()
    llama.close()
    layer = layers(vlm)[1]
    state, report = vlm.read_prompt(text, frames, PruneConfig(decoder_layer=layer), chat=False)
    assert np.array_equal(state.logits, expected[0])
    assert generate(vlm.decoder, state, N_GENERATE)[1] == expected_tokens
    n_images = len(report.images)
    assert n_images % 4 == 0 and report.n_decoder_kept == report.n_image_tokens
    state, report = vlm.read_prompt(text, frames, PruneConfig(20, 8, layer, budget="crop"), chat=False)
    assert state.in_place and len(report.images) == n_images
    n_keep = 20 if fixture.decoder_problem else 8
    assert all(len(image.decoder_kept) == n_keep + image.n_special for image in report.images)
    assert len(generate(vlm.decoder, state, N_GENERATE)[1]) == N_GENERATE


def test_frames_share_a_budget(fixture, engines):
    """A film that stands still for a frame: together they keep as many tokens, the frame that shows nothing new fewer
    than the others.
    """
    vlm = engines("fa", "stock")
    first, second = fixture.prompts[-1].pictures[:2]
    if first.shape != second.shape:
        second = np.ascontiguousarray(first[::-1])
    text = "".join(f"{i}: {MEDIA_MARKER} " for i in range(3)) + "what happens?"
    counts = {}
    for budget in ("image", "prompt"):
        config = PruneConfig(0.4, 0.2, layers(vlm)[1], budget=budget)
        _, report = vlm.read_prompt(text, [first, first, second], config, chat=False)
        counts[budget] = [(picture["n_vision_kept"], picture["n_decoder_kept"]) for picture in report.pictures]
    assert len(set(counts["image"][:2])) == 1
    assert [sum(n) for n in zip(*counts["prompt"])] == [sum(n) for n in zip(*counts["image"])]
    kept = [n_vision for n_vision, _ in counts["prompt"]]
    assert 0 < kept[1] < min(kept[0], kept[2]) and min(n for _, n in counts["prompt"]) > 0


# ---- transformers: the encoder ----


def test_features(fixture, engines):
    vlm = engines()
    for prompt in fixture.prompts:
        with tokenized(vlm, prompt) as chunks:
            ours = encode(vlm, chunks)
        assert len(ours) == len(prompt.features)
        for a, b, other in zip(ours, prompt.features, fixture.features_differ(prompt)):
            assert a.shape == b.shape
            assert other or bounds.are_features(a, b)


def test_what_is_repaired(fixture, engines):
    """Where the engine repairs the encoder stock's features are another image's; where stock is right nothing is
    repaired.
    """
    repaired = engines()
    stock_ = engines(encoder="stock")
    prompt = fixture.prompts[0]
    if fixture.features_differ(prompt)[0]:
        pytest.skip(OTHER_FEATURES)
    means = []
    for vlm in (stock_, repaired):
        with tokenized(vlm, prompt) as chunks:
            image = next(c for c in chunks if hasattr(c, "causal"))
            means.append(bounds.cosines(vlm.encoder.encode(image).embeddings, prompt.features[0]).mean())
    assert not stock_.encoder.repairs
    assert bool(repaired.encoder.repairs) == fixture.repaired
    assert means[1] >= 0.999 and (1 - means[0] > 10 * (1 - means[1])) == fixture.repaired


@pytest.mark.parametrize("mode", ["f32", "fa"])
def test_encoder_scores(fixture, engines, mode):
    """What each image token's patches receive; the same top-k up to ties. Bound: how far the features are off in the
    same run.
    """
    if fixture.vision_problem:
        pytest.skip(f"no encoder scores: {fixture.vision_problem}")
    vlm = engines(mode)
    if fixture.prompts[0].encoder_scores is None:
        pytest.skip("tokens have no patches of their own: the vision stage goes by embeddings")
    for prompt in fixture.prompts:
        with tokenized(vlm, prompt) as chunks:
            images = [c for c in chunks if hasattr(c, "causal")]
            ours = [vlm.encoder.encode(c).scores for c in images]
            features = encode(vlm, images)
        for a, b, f, right, other in zip(
            ours, prompt.encoder_scores, features, prompt.features, fixture.features_differ(prompt)
        ):
            if other:
                continue
            limit = bounds.share(bounds.relative([(f, right)])) * b.max()
            assert_same_scores(a, b, limit, len(b) // 2)
            for wrong in (np.roll(b, 1), np.roll(b, -1), np.full_like(b, b.mean())):
                assert bounds.distance(wrong, b) > limit


def assert_same_scores(ours, theirs, limit, n):
    """Within the limit, and nothing among our n best that is not among theirs but for ties."""
    assert bounds.distance(ours, theirs) <= limit
    bounds.assert_best(np.argsort(-ours, kind="stable")[:n], theirs, limit)


def is_same_choice(kept, theirs, scores, limit):
    """Whether the same tokens stay; where others do they must be ties in transformers' scores of all tokens there
    were.
    """
    assert len(kept) == len(theirs)
    if np.array_equal(kept, theirs):
        return True
    assert scores[np.setdiff1d(theirs, kept)].max() - scores[np.setdiff1d(kept, theirs)].min() <= 2 * limit
    return False


def assert_answers(vlm, state, answer, limit):
    """Each token of the answer is our best after the ones before it, but for ties."""
    first = state.n_cells + state.gap
    vlm.decoder.tap.set_position_shift(first, state.next_position - first)
    out = state.logits
    for i, token in enumerate(answer):
        assert out[token] >= out.max() - 2 * limit
        vlm.decoder.tap.begin()
        out = stock.decode(vlm.decoder.llama, tokens=[token], positions=[first + i])


# ---- the decoder's scores: stock's own attention ----


@pytest.mark.parametrize("mode", list(MODES))
def test_decoder_scores_are_stocks_attention(fixture, engines, decoder_stage, mode):
    """Scores at K are what stock's layer K attends to, read by another callback: the same numbers, whatever the backend
    rounds.
    """
    vlm, plain = engines(mode), load_stock(fixture, mode)
    reader = stock_attention.Reader(plain)
    for prompt in fixture.prompts:
        with tokenized(vlm, prompt) as chunks:
            segments = prompt.segments(chunks)
        for layer in layers(vlm):
            stage = DecoderStage([(layer, [0] * len(prompt.features))], keep_all)
            ours = prefill(afresh(vlm), segments, prompt.next_position, stage).scores[0]
            operation = vlm.decoder.attention_layers.index(layer)
            attention = stock_attention.of_images(reader, segments, operation)
            before = stock_attention.of_images(reader, segments, operation - 1 if operation else 1)
            assert len(ours) == len(attention) == len(prompt.features)
            for scores, received, earlier in zip(ours, attention, before):
                right = received.mean(axis=(0, 1))
                limit = bounds.FLOAT32 * right.max()
                assert bounds.distance(scores, right) <= limit
                # another row, another layer (the one before, if it has attention), a row of the text or a head less
                for wrong in (
                    np.roll(right, 1),
                    *(a.mean(axis=(0, 1)) for a in (earlier, received[:, 1:], received[1:])),
                ):
                    assert bounds.distance(wrong, right) > limit
    plain.close()


# ---- transformers: the decoder, on its features ----


@pytest.mark.parametrize("mode", ["f32", "f16", "fa"])
def test_unpruned_decoder(fixture, engines, same_mask, rounding, mode):
    """The engine without a stage is stock, and stock is transformers: root mean square of 3% of a deviation is too much
    for any rounding.
    """
    vlm = engines(mode)
    assert rounding(mode) < 0.03
    for prompt in fixture.prompts:
        with tokenized(vlm, prompt) as chunks:
            state = prefill(afresh(vlm), prompt.segments(chunks), prompt.next_position)
        assert bounds.are_close(state.logits, prompt.logits, rounding(mode))
        if mode == "f32":
            assert_answers(vlm, state, prompt.answer, bounds.of(prompt.logits, rounding(mode)))


@pytest.mark.parametrize("mode", ["f32", "f16", "fa"])
def test_pruned_decoder(fixture, engines, decoder_stage, same_mask, rounding, mode):
    """Scores at K, what stays, logits and the greedy answer with tokens removed at K and positions kept."""
    vlm = engines(mode)
    for prompt in fixture.prompts:
        for case in prompt.cases:
            assert_pruned(vlm, prompt, case, rounding(mode), answers=mode == "f32")


def assert_pruned(vlm, prompt, case, rounding, features=None, answers=False):
    """The decoder stage after transformers' choice of the vision stage; logits given its choice at K, which ours must
    be but for ties.
    """
    with tokenized(vlm, prompt) as chunks:
        segments = prompt.segments(chunks, case.vision_kept, features)
    n = [case.n2] * len(prompt.features)
    state = prefill(afresh(vlm), segments, prompt.next_position, DecoderStage([(case.layer, n)], case.choose))
    assert state.in_place
    same = True
    for ours, theirs, kept, rows in zip(state.scores[0], case.decoder_scores, state.selections[0], case.decoder_rows):
        limit = bounds.share(rounding) * theirs.max()
        assert_same_scores(ours, theirs, limit, case.n2)
        assert bounds.distance(np.roll(theirs, 1), theirs) > limit
        same &= is_same_choice(kept.kept, rows, theirs, limit)
    if not same:
        stage = DecoderStage([(case.layer, n)], lambda seen, n: Selection(case.decoder_rows[seen.image]))
        state = prefill(afresh(vlm), segments, prompt.next_position, stage)
    assert bounds.are_close(state.logits, case.logits, rounding)
    others = [prompt.logits, *(other.logits for other in prompt.cases if other is not case)]
    assert not any(
        bounds.are_close(other, case.logits, rounding) for other in others
    )  # pruning shows, and which tokens and where
    if answers:
        assert_answers(vlm, state, case.answer, bounds.of(case.logits, rounding))


# ---- transformers: pixels to answer ----


@pytest.mark.parametrize("mode", ["f32", "fa", "q8_0"])
def test_both_stages(fixture, engines, same_mask, rounding, mode):
    """Plain STAR on both stages: the same tokens stay, and logits and answer are transformers'. q8_0: tokens and budget
    alone.
    """
    vlm = engines(mode)
    for prompt in as_transformers(fixture):
        for case in prompt.cases:
            n_special = int(case.special[0].sum())  # they stay beside what is asked for
            n1 = case.n1 - n_special if case.prunes_vision else 1.0
            config = PruneConfig(
                n1,
                case.n2 - n_special,
                case.layer,
                decoder_scorer="text",
                representatives="none",
                seen_below=False,
                budget="crop",
            )
            state, report = vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
            windows = [] if case.layer is None else [(case.layer, case.n2 * len(prompt.features))]
            assert state.in_place and report.windows == windows
            assert all(
                len(image.vision_kept) == case.n1 and len(image.decoder_kept) == case.n2 for image in report.images
            )
            share = bounds.share(rounding(mode, "pixels"))
            same = True
            if case.prunes_vision:
                for image, theirs, scores in zip(report.images, case.vision_kept, prompt.encoder_scores):
                    same &= is_same_choice(image.vision_kept, theirs, scores, share * scores.max())
            if mode == "q8_0":
                continue
            if same and windows:
                for image, scores, rows in zip(report.images, case.decoder_scores, case.decoder_rows):
                    limit = share * scores.max()
                    assert_same_scores(image.decoder_scores, scores, limit, case.n2)
                    same &= is_same_choice(np.searchsorted(image.vision_kept, image.decoder_kept), rows, scores, limit)
            assert not bounds.are_close(prompt.logits, case.logits, rounding(mode, "pixels"))
            if same:
                assert bounds.are_close(state.logits, case.logits, rounding(mode, "pixels"))
                if mode == "f32":
                    assert_answers(vlm, state, case.answer, bounds.of(case.logits, rounding(mode, "pixels")))
            elif (
                windows
            ):  # ties went the other way on this backend: transformers' choice on the features of this encoder
                with tokenized(vlm, prompt) as chunks:
                    features = encode(vlm, chunks)
                assert_pruned(vlm, prompt, case, rounding(mode, "pixels"), features, answers=mode == "f32")


def test_a_stage_that_cannot_be_is_reported(fixture, engines):
    """Where a family cannot have a stage the report says why, and the answer is stock's; where it can, nothing is
    said.
    """
    vlm = engines()
    prompt = fixture.prompts[0]
    config = PruneConfig(0.5, 0.25, 1, representatives="none")
    state, report = vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
    notes = " ".join(report.notes)
    assert ("no vision stage" in notes) == bool(fixture.vision_problem)
    assert ("no decoder stage" in notes) == bool(fixture.decoder_problem)
    for problem in (fixture.vision_problem, fixture.decoder_problem):
        assert not problem or problem in notes
    assert (report.n_vision_kept < report.n_image_tokens) != bool(fixture.vision_problem)
    assert bool(report.windows) != bool(fixture.decoder_problem)
    if fixture.vision_problem and fixture.decoder_problem:
        unpruned, _ = vlm.read_prompt(prompt.text, prompt.pictures, None, chat=False)
        assert np.array_equal(state.logits, unpruned.logits)


# ---- before and within the encoder (tests/test_encoder_units.py has the rest) ----


def test_redundant_tokens(fixture, engines):
    """A picture whose upper half is blank: fewer tokens enter the encoder and count for the others, or the report says
    why not and the answer is stock's.
    """
    vlm, prompt = engines("fa", "stock"), fixture.prompts[0]
    picture = prompt.pictures[0].copy()
    picture[: len(picture) // 2] = 255
    stock_, _ = vlm.read_prompt(prompt.text, [picture], None, chat=False)
    state, report = vlm.read_prompt(prompt.text, [picture], PruneConfig(redundancy="exact"), chat=False)
    if fixture.projector in GEOMETRIES:
        (image,) = report.images
        assert 0 < len(image.redundant) == image.n_tokens - image.n_encoder_kept and not report.notes
        assert image.vision_mass.sum() == image.n_tokens and not np.array_equal(state.logits, stock_.logits)
    else:
        assert "no tokens are left out before the encoder" in " ".join(report.notes)
        assert report.n_redundant == 0 and np.array_equal(state.logits, stock_.logits)
    again, _ = vlm.read_prompt(prompt.text, [picture], None, chat=False)
    assert np.array_equal(again.logits, stock_.logits)


def test_encoder_stage(fixture, engines):
    """Stock with everything kept, for every M; half of the tokens at one; or the report says why there is none."""
    vlm, prompt = engines("fa"), fixture.prompts[-1]
    window = find_window(vlm.encoder) or find_row_window(vlm.encoder)
    window = window if support.has_encoder_stage(fixture) else None
    stock_, _ = vlm.read_prompt(prompt.text, prompt.pictures, None, chat=False)
    for layer in range(1, window.n_layers if window else 2):
        config = PruneConfig(encoder_layer=layer)
        state, report = vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
        assert np.array_equal(state.logits, stock_.logits)
        assert report.encoder_layer == (layer if window else None)
        assert ("no encoder stage" in " ".join(report.notes)) != bool(window)
    state, report = vlm.read_prompt(prompt.text, prompt.pictures, PruneConfig(encoder_keep=0.5), chat=False)
    assert np.array_equal(state.logits, stock_.logits) != bool(window)
    n_special = sum(image.n_special for image in report.images)
    share = (report.n_encoder_kept - n_special) / (report.n_image_tokens - n_special)
    assert 0.45 <= share <= 0.7 if window else share == 1
    assert len(generate(vlm.decoder, state, N_GENERATE)[1]) == N_GENERATE


# ---- a further question (tests/test_reuse.py and test_hybrid_reuse.py have the rest) ----


def test_reuse(fixture, engines):
    """A further question about the same images: a fresh engine's bits, without decoding or encoding them again."""
    prompt = fixture.prompts[-1]
    config = PruneConfig(1.0 if fixture.vision_problem else 0.6, 1.0 if fixture.decoder_problem else 0.4)
    ask = lambda vlm, text: vlm.read_prompt(prompt.text + text, prompt.pictures, config, chat=False)
    vlm = engines("fa")
    _, first = ask(vlm, "")
    state, report = ask(vlm, " then")
    with fixture.engine("fa") as fresh:
        right, alone = ask(fresh, " then")
    assert np.array_equal(state.logits, right.logits)
    assert all(image.cached for image in report.images) and alone.reused_tokens == 0
    if support.has_sliding_window(fixture):
        assert report.reused_tokens == 0
    else:
        n_text = report.n_text_tokens - first.n_text_tokens
        assert first.n_vision_kept <= report.reused_tokens < first.n_vision_kept + first.n_text_tokens and n_text >= 1


# ---- docs/models.md: what it says is of the newest llama-cpp-python ----


@pytest.mark.skipif(IS_0_3_35, reason="the table is of a newer llama-cpp-python")
def test_support_table(request):
    """The page says of each family what must hold of it."""
    shown = support.table(FIXTURES)
    if request.config.getoption("--write-support-table"):
        support.write(shown)
    assert support.read() == shown, "run `make support-table` and read what changed"


@pytest.mark.skipif(IS_0_3_35, reason="the table is of a newer llama-cpp-python")
def test_support_table_is_proven(family_results):
    """Each "yes" has a test behind it that ran. Stands last in this file: it needs the results of all."""
    if not support.is_complete(FIXTURES, family_results):
        pytest.skip("needs the results of the whole file")
    assert support.unproven(FIXTURES, family_results) == []
