"""Faithful: pruned logits and continuations equal a float64 reference of the algorithm, within the KV cache's
precision.

The reference (tests/helpers/reference.py) was written from the paper and the design, without the engine. How far the
engine may be from it is what stock llama.cpp rounds in the same mode with another prompt, unpruned (bounds.py).
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers import bounds, stock
from helpers.choosing import by_score, by_share, generate
from helpers.families import MODES
from helpers.models import random_image, random_prompt
from helpers.reference import ClipEncoder, Decoder
from helpers.reference_hybrid import open_decoder

from star_edge import PRESETS, PruneConfig, StarVLM, refvlm
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.io.images import load_image
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.names import KV_TYPES
from star_edge.llamacpp.tap import Tap
from star_edge.pruning.representatives import select
from star_edge.pruning.selection import Tokens

N_GENERATE = 16


@pytest.fixture(scope="module")
def decoders(families):
    """(family, mode) -> (DecoderContext, reference Decoder)."""
    made = {}

    def get(family, mode):
        if (family, mode) not in made:
            flash_attn, cache = MODES[mode]
            tap = Tap()
            llama = stock.load(
                families[family].text, flash_attn, n_threads=1, type_k=KV_TYPES[cache], type_v=KV_TYPES[cache]
            )
            attach_tap(llama, tap)
            made[family, mode] = DecoderContext(llama, tap), tap, open_decoder(families[family].text)
        context, _, reference = made[family, mode]
        context.clear()
        context.tap.set_position_shift(0, 0)
        return context, reference

    yield get
    for context, tap, _ in made.values():
        context.llama.close()
        tap.close()


def expected(reference, prompt, n_keep, layer, **options):
    return reference.prune(
        prompt.embed(reference),
        options.pop("positions", prompt.positions),
        prompt.image_of_row,
        n_keep=n_keep,
        K=layer,
        **options,
    )


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
@pytest.mark.parametrize(
    ("parts", "n_keep", "layer"),
    [([12, (10, 20), 9], [20], 2), ([12, (10, 20), 9], [1], 7), ([5, (6, 7), 4, (9, 5), 13], [9, 17], 4)],
)
def test_pruned_logits_and_continuation(families, decoders, decoder_rounding, family, mode, parts, n_keep, layer):
    context, reference = decoders(family, mode)
    rounding = decoder_rounding(family, mode)
    prompt = random_prompt(families[family], parts)
    (layer,) = families[family].at(layer)
    state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(layer, n_keep)], by_score))
    assert state.in_place
    history, tokens = generate(context, state, N_GENERATE)

    # The choice: scores agree, and no kept row scores worse than a dropped one by more than rounding.
    want = expected(reference, prompt, n_keep, layer)
    limit = bounds.share(rounding) * want.scores.max()
    assert bounds.distance(np.roll(want.scores, 1), want.scores) > limit
    reference_scores = np.split(want.scores, np.cumsum([len(s) for s in state.scores[0]])[:-1])
    kept_rows = [s.kept for s in state.selections[0]]
    image_rows = [np.flatnonzero(prompt.image_of_row == i) for i in range(len(n_keep))]
    rows = np.concatenate([r[kept] for r, kept in zip(image_rows, kept_rows)])
    for scores, theirs, kept, n in zip(state.scores[0], reference_scores, kept_rows, n_keep):
        assert bounds.distance(scores, theirs) <= limit and len(kept) == n
        bounds.assert_best(kept, theirs, limit)

    # Logits, given the engine's own choice.
    want = expected(reference, prompt, None, layer, keep_rows=rows)
    _, want_logits = reference.generate(want, N_GENERATE, prompt.next_position, forced=tokens)
    for ours, theirs in zip(history, want_logits):
        assert bounds.are_close(ours, theirs, rounding)
    # One row later in each image, and without a place for the rows that were dropped. What a single row does in the
    # last layer is less than
    # q8_0 rounds: the other modes show it.
    if mode != "q8_0" or min(n_keep) > 1:
        later = np.concatenate([np.roll(r, -1)[k] for r, k in zip(image_rows, kept_rows)])
        closed = np.array(prompt.positions)
        closed[..., image_rows[-1][-1] + 1 :] -= min(len(r) for r in image_rows) // 2
        for options in (dict(keep_rows=later), dict(keep_rows=rows, positions=closed)):
            wrong = expected(reference, prompt, None, layer, **options)
            assert not bounds.are_close(wrong.logits, want.logits, rounding)


@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_positions_are_kept(families, decoders, decoder_rounding, family):
    """Fails if kept tokens, or the text and the answer after them, are re-numbered."""
    context, reference = decoders(family, "f32")
    rounding = decoder_rounding(family)
    prompt = random_prompt(families[family], [12, (10, 20), 9])
    (layer,) = families[family].at(2)
    state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(layer, [30])], by_score))
    assert state.n_cells != state.next_position
    history, tokens = generate(context, state, 4)
    rows = np.flatnonzero(prompt.image_of_row == 0)[state.selections[0][0].kept]

    def is_close(positions, next_position):
        want = expected(reference, prompt, None, layer, keep_rows=rows, positions=positions)
        _, logits = reference.generate(want, 4, next_position, forced=tokens)
        return [bounds.are_close(a, b, rounding) for a, b in zip(history, logits)]

    assert all(is_close(prompt.positions, prompt.next_position))
    # the answer numbered on from the kept rows instead of from the prompt
    assert not any(is_close(prompt.positions, state.n_cells)[1:])
    # kept image rows and the text after them numbered without gaps from layer 0 on
    renumbered = np.array(prompt.positions)
    kept = np.concatenate([np.flatnonzero(prompt.image_of_row < 0), rows])
    dense = np.arange(len(kept))
    renumbered[..., np.sort(kept)] = dense if renumbered.ndim == 1 else np.stack([dense, dense, dense, 0 * dense])
    assert not any(is_close(renumbered, len(kept)))


def test_text_longer_than_ubatch_scores_with_every_row(families, decoders, decoder_rounding):
    context, reference = decoders("llama", "f32")
    prompt = random_prompt(families["llama"], [3, (10, 10), 75])
    context.n_ubatch, before = 32, context.n_ubatch
    try:
        state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(3, [10])], by_score))
        context.clear()
        last = prefill(
            context, prompt.segments, prompt.next_position, DecoderStage([(3, [10])], by_score, text_rows="last")
        )
    finally:
        context.n_ubatch = before
    share, n = bounds.share(decoder_rounding("llama")), len(prompt.image_of_row)
    want, want_last, want_less = (
        expected(reference, prompt, [10], 3, text_rows=r).scores for r in (None, [n - 1], np.arange(n - 75 % 32, n))
    )  # less: the last decode's
    assert bounds.distance(state.scores[0][0], want) <= share * want.max() < bounds.distance(want_less, want)
    assert bounds.distance(last.scores[0][0], want_last) <= share * want_last.max()


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_both_stages_end_to_end(families, flash_attn):
    """Pixels to logits: the reference encodes, scores, selects and prunes by itself."""
    models = families["llama"]
    image = random_image(3)
    encoder, decoder = ClipEncoder(str(models.mmproj)), Decoder(str(models.text))
    embeddings, attention = encoder.encode(image, repaired=True)
    received = encoder.received(attention, repaired=True)
    with StarVLM(
        models.text,
        models.mmproj,
        n_ctx=512,
        flash_attn=flash_attn,
        type_k="f16" if flash_attn else "f32",
        type_v="f16" if flash_attn else "f32",
        n_threads=1,
    ) as vlm:
        state, report = vlm.read_prompt(
            "see <__media__> what is it?",
            image,
            replace(PRESETS["star"], vision_keep=20, decoder_keep=7, decoder_layer=3),
            chat=False,
        )
        before = vlm.llama.tokenize(b"see ", add_bos=True, special=True)
        after = vlm.llama.tokenize(b" what is it?", add_bos=False, special=True)
        features = encode(vlm, image)
    picture = report.images[0]
    assert bounds.are_features(features, embeddings)
    limit = bounds.share(bounds.relative([(features, embeddings)])) * received.max()
    assert bounds.distance(picture.vision_scores, received) <= limit < bounds.distance(np.roll(received, 1), received)
    bounds.assert_best(picture.vision_kept, received, limit)

    n = len(before)
    rounding = rounding_with_features(models, flash_attn, before, features, after, embeddings)
    rows = np.concatenate([decoder.embed(before), embeddings[picture.vision_kept], decoder.embed(after)])
    positions = np.concatenate([np.arange(n), n + picture.vision_kept, n + len(received) + np.arange(len(after))])
    of_image = np.concatenate([np.full(n, -1), np.zeros(20, int), np.full(len(after), -1)])
    kept = np.searchsorted(picture.vision_kept, picture.decoder_kept)
    want = decoder.prune(rows, positions, of_image, K=3, keep_rows=n + kept)
    limit = bounds.share(rounding) * want.scores.max()
    assert (
        bounds.distance(picture.decoder_scores, want.scores)
        <= limit
        < bounds.distance(np.roll(want.scores, 1), want.scores)
    )
    bounds.assert_best(kept, want.scores, limit)
    assert bounds.are_close(state.logits, want.logits, rounding)
    other = decoder.prune(rows, positions, of_image, K=3, keep_rows=n + (kept + 1) % 20)
    assert not bounds.are_close(other.logits, want.logits, rounding)


def encode(vlm, image):
    prompt = vlm.tokenize("<__media__>", [image], chat=False)
    try:
        return vlm.encoder.encode(next(c for c in prompt.chunks if hasattr(c, "causal"))).embeddings.copy()
    finally:
        prompt.close()


def rounding_with_features(models, flash_attn, before, features, after, right):
    """What stock rounds with an unpruned prompt, given features that the encoder has rounded already: right ones are
    the reference's.
    """
    cache = {} if flash_attn else {"type_k": KV_TYPES["f32"], "type_v": KV_TYPES["f32"]}
    llama, decoder = stock.load(models.text, flash_attn, n_threads=1, **cache), Decoder(models.text)
    stock.decode(llama, tokens=before, positions=np.arange(len(before)))
    n, m = len(before), len(features)
    stock.decode(llama, embeddings=features, positions=np.arange(n, n + m))
    out = stock.decode(llama, tokens=after, positions=np.arange(n + m, n + m + len(after)))
    llama.close()
    rows = np.concatenate([decoder.embed(before), right, decoder.embed(after)])
    return bounds.rounding([(out, decoder.forward(rows, np.arange(len(rows)))[-1])])


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_shipped_model_scores(flash_attn):
    encoder = ClipEncoder(str(refvlm.MMPROJ))
    image = load_image(refvlm.DEMO_IMAGE)
    embeddings, attention = encoder.encode(image)
    received = encoder.received(attention)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, flash_attn=flash_attn) as vlm:
        _, report = vlm.read_prompt("how many squares?", image, PRESETS["star"])
        features = encode(vlm, image)
    scores = report.images[0].vision_scores
    assert bounds.are_features(features, embeddings)
    limit = bounds.share(bounds.relative([(features, embeddings)])) * received.max()
    assert bounds.distance(scores, received) <= limit < bounds.distance(np.roll(received, 1), received)
    bounds.assert_best(np.argsort(-scores)[:60], received, limit)


@pytest.mark.parametrize("mode", ["f32", "fa"])
@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_attention_mass(families, decoders, decoder_rounding, family, mode):
    """Representatives: log(mass) is in the attention of the probe, in the scores, after layer K, and while generating.

    The reference chooses by itself from the masses' definition: the k - m best by score per unit of mass stay as they
    are, and m that lie evenly over the rest share the rest's mass.
    """
    context, reference = decoders(family, mode)
    rounding = decoder_rounding(family, mode)
    prompt = random_prompt(families[family], [5, (6, 7), 4, (9, 5), 13])
    layer, n_keep, share = 3, [12, 20], 0.5
    rng = np.random.default_rng(0)
    masses = [rng.uniform(1, 6, len(s.rows)) for s in prompt.segments if s.image is not None]
    for segment in prompt.segments:
        segment.mass = None if segment.image is None else masses[segment.image]
    stage = DecoderStage([(layer, n_keep)], lambda seen, n: by_share(seen, n, share))
    state = prefill(context, prompt.segments, prompt.next_position, stage)
    history, tokens = generate(context, state, N_GENERATE)
    context.tap.set_cell_bias(None)
    assert state.in_place

    def bias_of(by_image, rows_by_image):
        bias = np.zeros(len(prompt.image_of_row))
        for mass, rows in zip(by_image, rows_by_image):
            bias[rows] = np.log(mass)
        return bias

    image_rows = [np.flatnonzero(prompt.image_of_row == i) for i in range(2)]
    before = bias_of(masses, image_rows)
    want = expected(reference, prompt, None, layer, column_bias=before)
    scores = np.split(want.scores, [len(image_rows[0])])
    kept_rows, kept_masses = [], []
    for i in range(2):
        assert bounds.distance(state.scores[0][i], scores[i]) <= bounds.share(rounding) * want.scores.max()
        source = state.scores[0][i]  # rounding may swap near-ties
        k, m = n_keep[i], n_keep[i] // 2
        order = np.argsort(-source / masses[i], kind="stable")
        best, rest = order[: k - m], np.sort(order[k - m :])
        spread = [rest[int((j + 0.5) * len(rest) / m)] for j in range(m)]
        mass = {int(t): masses[i][t] for t in best} | {int(t): masses[i][rest].sum() / m for t in spread}
        assert state.selections[0][i].kept.tolist() == sorted(mass)
        assert np.allclose(state.selections[0][i].mass, [mass[t] for t in sorted(mass)])
        assert state.selections[0][i].mass.sum() == pytest.approx(masses[i].sum())  # nothing is lost
        kept_rows.append(image_rows[i][state.selections[0][i].kept])
        kept_masses.append(state.selections[0][i].mass)
    after = bias_of(kept_masses, kept_rows)
    n_layers = families[family].shape.n_layers
    by_layer = np.stack([before] * layer + [after] * (n_layers - layer))
    result = expected(reference, prompt, None, layer, keep_rows=np.concatenate(kept_rows), column_bias=by_layer)
    result.column_bias = np.stack(
        [after[result.kept]] * n_layers
    )  # the answer's tokens see the final masses in every layer
    _, logits = reference.generate(result, N_GENERATE, prompt.next_position, forced=tokens)
    for ours, theirs in zip(history, logits):
        assert bounds.are_close(ours, theirs, rounding)
    without = expected(reference, prompt, None, layer, keep_rows=np.concatenate(kept_rows))
    assert not bounds.are_close(without.logits, history[0], rounding)  # the masses matter
    assert bounds.distance(without.scores, want.scores) > bounds.share(rounding) * want.scores.max()


@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_defaults_end_to_end(families, decoder_rounding, family):
    """The default config, but for the scorer: given what it kept, and what each kept token stands for, logits equal the
    reference's.

    The vision stage hands the decoder the mean embedding of each group, at the kept token's position, with log(mass) in
    the attention from layer 0; the decoder stage's masses take over at layer K.
    """
    models = families[family]
    image = random_image(7)
    with StarVLM(
        models.text, models.mmproj, n_ctx=512, flash_attn=False, type_k="f32", type_v="f32", n_threads=1
    ) as vlm:
        prompt = vlm.tokenize("ab<__media__>cde?", [load_image(image)], chat=False)
        before, chunk, after = prompt.chunks
        embeddings = vlm.encoder.encode(chunk).embeddings.astype(np.float64)
        prompt.close()
        state, report = vlm.read_prompt(
            "ab<__media__>cde?", image, PruneConfig(0.5, 0.2, 3, decoder_scorer="text"), chat=False
        )
        picture, decoder = report.images[0], Decoder(str(models.text))
        tokens = Tokens(embeddings.astype(np.float32), picture.cells, picture.grid)
        selection = select("cluster", tokens, np.zeros(len(tokens)), len(picture.vision_kept), 1.0)
    assert np.array_equal(selection.kept, picture.vision_kept) and np.array_equal(selection.mass, picture.vision_mass)
    merged = np.stack([embeddings[selection.group == i].mean(axis=0) for i in range(len(selection.kept))])
    n, n1 = len(before.tokens), len(selection.kept)
    rows = np.concatenate([decoder.embed(before.tokens), merged, decoder.embed(after.tokens)])
    after_image = n + chunk.n_positions + np.arange(len(after.tokens))
    if chunk.positions.ndim == 1:
        positions = np.concatenate([np.arange(n), n + chunk.positions[picture.vision_kept], after_image])
    else:
        text = lambda p: np.stack([p, p, p, 0 * p])
        offset = np.array([[n]] * 3 + [[0]])
        positions = np.concatenate(
            [text(np.arange(n)), chunk.positions[:, picture.vision_kept] + offset, text(after_image)], axis=1
        )
    of_image = np.concatenate([np.full(n, -1), np.zeros(n1, int), np.full(len(after.tokens), -1)])
    first, second = np.zeros(len(rows)), np.zeros(len(rows))
    first[n : n + n1] = np.log(picture.vision_mass)
    kept = n + np.searchsorted(picture.vision_kept, picture.decoder_kept)
    second[kept] = np.log(picture.decoder_mass)
    n_layers = models.shape.n_layers
    bias = np.stack([first] * 3 + [second] * (n_layers - 3))
    want = decoder.prune(rows, positions, of_image, None, K=3, keep_rows=kept, column_bias=bias)
    seen = decoder.prune(rows, positions, of_image, None, K=3, column_bias=first).scores
    rounding = decoder_rounding(family)
    assert (
        bounds.distance(picture.decoder_scores, seen)
        <= bounds.share(rounding) * seen.max()
        < bounds.distance(np.roll(seen, 1), seen)
    )
    assert bounds.are_close(state.logits, want.logits, rounding)
    unmerged = np.concatenate([rows[:n], embeddings[picture.vision_kept], rows[n + n1 :]])
    wrong = decoder.prune(unmerged, positions, of_image, None, K=3, keep_rows=kept, column_bias=bias)
    assert not bounds.are_close(wrong.logits, want.logits, rounding)
