"""Images with nothing between them, as the crops of a picture: alone while they are whole, as on stock, and in shared
decodes once tokens of one are gone. Both are faithful, and what a prompt leaves for the next one is bit-exact.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import bounds, stock
from helpers.choosing import by_score, by_share, generate, keep_all
from helpers.families import FOLDER, load_fixtures, tokenized
from helpers.models import random_image, random_prompt
from helpers.reference_hybrid import open_decoder
from helpers.reusing import answers, engine, fresh, same

from star_edge import PruneConfig, StarVLM
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.decoder.windows import Windows
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.llamacpp.names import KV_TYPES
from star_edge.llamacpp.tap import Tap
from star_edge.rows import Rows, Segment, decodes

FAMILIES = ["llama", "qwen2vl", "qwen35", "lfm2"]
PARTS = [5, (6, 7), (9, 5), (4, 4), 13]
KEPT = [17, 11, 16]  # of 42, 45 and 16: the last image is whole
M = "<__media__>"


def images(prompt):
    return [s for s in prompt.segments if s.image is not None]


def pruned_prompt(models, seed=0, kept=KEPT, parts=PARTS):
    """A prompt as the vision stage leaves it: some rows of each image, at their own positions."""
    prompt = random_prompt(models, parts, seed)
    rng = np.random.default_rng(seed + 1)
    for segment, n in zip(images(prompt), kept, strict=True):
        segment.pruned = n < len(segment.rows)
        segment.rows = segment.rows.take(np.sort(rng.permutation(len(segment.rows))[:n]))
    return prompt


def alone(segments):
    """The same rows, each image in decodes of its own."""
    return [Segment(s.rows, s.image, s.causal, s.mass) for s in segments]


@pytest.fixture(scope="module")
def decoders(families):
    """(family, mode) -> a tapped DecoderContext with an empty cache, kept for the module."""
    made = {}

    def get(family, mode="f32", n_ubatch=512):
        if (family, mode) not in made:
            llama, tap = load(families[family].text, mode), Tap()
            attach_tap(llama, tap)
            made[family, mode] = DecoderContext(llama, tap), tap
        context, _ = made[family, mode]
        context.clear()
        context.tap.set_position_shift(0, 0)
        context.tap.set_cell_bias(None)
        context.n_ubatch = n_ubatch
        return context

    yield get
    for context, tap in made.values():
        context.llama.close()
        tap.close()


def load(path, mode):
    cache = KV_TYPES["f32" if mode == "f32" else "f16"]
    return stock.load(path, mode != "f32", n_threads=1, type_k=cache, type_v=cache)


@pytest.fixture
def sizes(monkeypatch):
    """Rows of each decode."""
    seen, decode = [], DecoderContext.decode

    def spy(self, rows, *rest):
        seen.append(len(rows))
        return decode(self, rows, *rest)

    monkeypatch.setattr(DecoderContext, "decode", spy)
    return seen


# ---- which rows share a decode ----


def segment(n, image=None, **options):
    return Segment(Rows(np.arange(n)), image, **options)


TEXT, WHOLE = segment(3), segment(4, 0)
PRUNED, BOTH_WAYS = segment(5, 1, pruned=True), segment(2, 2, causal=False, pruned=True)


@pytest.mark.parametrize(
    ("segments", "size", "expected"),
    [
        ([TEXT, WHOLE, WHOLE, TEXT], 9, [[3], [4], [4], [3]]),
        ([TEXT, WHOLE, PRUNED, TEXT], 9, [[3], [4, 5], [3]]),
        ([PRUNED, WHOLE, WHOLE], 99, [[5, 4, 4]]),
        ([WHOLE, TEXT, PRUNED], 9, [[4], [3], [5]]),
        ([TEXT, TEXT], 9, [[3], [3]]),
        ([PRUNED, BOTH_WAYS, BOTH_WAYS, PRUNED, WHOLE], 9, [[5], [2], [2], [5, 4]]),
        ([WHOLE, PRUNED, PRUNED], 6, [[4, 2], [3, 3], [2]]),
        ([PRUNED, PRUNED], 5, [[5], [5]]),
        ([WHOLE, WHOLE], 3, [[3], [1], [3], [1]]),
        ([], 3, []),
    ],
)
def test_rows_of_each_decode(segments, size, expected):
    found = list(decodes(segments, size))
    assert [[last - first for _, first, last in parts] for parts in found] == expected
    rows = [(id(s), row) for parts in found for s, first, last in parts for row in range(first, last)]
    assert rows == [(id(s), row) for s in segments for row in range(len(s.rows))]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_decoded(families, decoders, sizes, family):
    """In both windows: the probe, and a vision stage alone. Text is never with images at layer 0."""
    prompt, (layer,) = pruned_prompt(families[family]), families[family].at(3)
    context = decoders(family)
    sizes.clear()  # one row, if it was made just now (a hybrid's graph)
    prefill(context, prompt.segments, prompt.next_position)
    assert sizes == [5, 44, 13]
    prefill(decoders(family, n_ubatch=20), prompt.segments, prompt.next_position)
    assert sizes[3:] == [5, 20, 20, 4, 13]
    sizes.clear()
    resumed = [9, 13] if context.is_hybrid else [22]
    stage = DecoderStage([(layer, [4, 3, 2])], by_score)
    prefill(decoders(family), prompt.segments, prompt.next_position, stage)
    assert sizes == [5, 44, 13, *resumed]
    sizes.clear()
    images(prompt)[1].causal = False
    prefill(decoders(family), prompt.segments, prompt.next_position)
    assert sizes == [5, 17, 11, 16, 13]
    sizes.clear()
    whole = random_prompt(families[family], PARTS)
    prefill(decoders(family), whole.segments, whole.next_position, DecoderStage([(layer, [0] * 3)], keep_all))
    assert sizes == [5, 42, 45, 16, 13, *[42, 45, 16, 13]]


def test_crops_of_a_picture(sizes):
    """LLaVA-NeXT, a picture of one image and one of five: the five are in one decode once they have lost tokens."""
    fixture = load_fixtures()["llava-next"]
    prompt = fixture.prompts[1]
    with StarVLM(fixture.text, fixture.mmproj, n_ctx=512, n_threads=1, reuse=False) as vlm:
        with tokenized(vlm, prompt) as chunks:
            before, between, after = (len(chunk.tokens) for chunk in chunks if hasattr(chunk, "tokens"))
        for config in (PruneConfig(0.5), PruneConfig(0.5, 0.25, 1), PruneConfig(decoder_layer=1)):
            sizes.clear()
            _, report = vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
            first, *crops = (len(image.vision_kept) for image in report.images)
            assert len(crops) == 5 and sum(crops) == (90 if config.prunes_in_vision else 180)
            crops = [90] if config.prunes_in_vision else crops
            assert sizes[: 4 + len(crops)] == [before, first, between, *crops, after]


def test_images_are_resumed_together_where_layers_tell_text_apart(families, decoders, sizes, monkeypatch):
    prompt, context = random_prompt(families["llama"], PARTS), decoders("llama")
    monkeypatch.setattr(context, "tells_text_apart", True)
    prefill(context, prompt.segments, prompt.next_position, DecoderStage([(3, [4, 3, 2])], by_score))
    assert sizes == [5, 42, 45, 16, 13, 4 + 3 + 2, 13]


# ---- exact while all is kept ----


@pytest.mark.parametrize("mode", ["f32", "fa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_equals_stock(families, decoders, family, mode):
    prompt = random_prompt(families[family], PARTS)
    plain = load(families[family].text, mode)
    expected, expected_tokens = stock.run_segments(plain, prompt.segments, prompt.next_position, 8)
    plain.close()
    for layer in (None, *families[family].at(1, 4)):
        context = decoders(family, mode)
        stage = None if layer is None else DecoderStage([(layer, [0] * 3)], keep_all)
        state = prefill(context, prompt.segments, prompt.next_position, stage)
        history, tokens = generate(context, state, 8)
        assert tokens == expected_tokens and all(map(np.array_equal, history, expected))


def test_whole_pipeline_equals_stock(families, sizes):
    """Pixels to logits, with nothing between three pictures; and pruned they are in one decode."""
    models, pictures = families["llama"], [random_image(i) for i in range(3)]
    text = f"ab {M}{M}{M} what differs?"
    llama = stock.load(models.text, True, n_threads=1)
    plain = stock.Multimodal(llama, models.mmproj, True)
    expected, _ = plain.ask(text, pictures)
    plain.close()
    llama.close()
    with engine(models, flash_attn=True, encoder="stock") as vlm:
        for config in (None, PruneConfig(decoder_layer=3), PruneConfig(redundancy="auto", decoder_layer=3)):
            state, report = vlm.read_prompt(text, pictures, config, chat=False)
            assert np.array_equal(state.logits, expected[0]) and report.n_decoder_kept == 3 * 49
        sizes.clear()
        _, report = vlm.read_prompt(f"c{text}", pictures, PruneConfig(0.5), chat=False)
        assert sizes[1] == report.n_vision_kept < 3 * 49


# ---- faithful where something is dropped ----


@pytest.mark.parametrize("n_ubatch", [512, 20])
@pytest.mark.parametrize("mode", ["f32", "fa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_decodes_equal_the_reference(families, decoders, decoder_rounding, family, mode, n_ubatch):
    """Logits of the prompt and of the answer, without a decoder stage and with one, whose scores are right too."""
    rounding, reference = decoder_rounding(family, mode), open_decoder(families[family].text)
    prompt = pruned_prompt(families[family])
    inputs = prompt.embed(reference), prompt.positions, prompt.image_of_row
    context = decoders(family, mode, n_ubatch)
    state = prefill(context, prompt.segments, prompt.next_position)
    history, tokens = generate(context, state, 8)
    want = reference.prune(*inputs)
    _, logits = reference.generate(want, 8, prompt.next_position, forced=tokens)
    assert all(bounds.are_close(a, b, rounding) for a, b in zip(history, logits))
    swapped = pruned_prompt(families[family])  # positions of the first image's rows in the second, and otherwise
    first, second = (s.rows for s in images(swapped)[:2])
    first.positions[..., :11], second.positions[...] = second.positions, first.positions[..., :11].copy()
    wrong = reference.prune(swapped.embed(reference), swapped.positions, swapped.image_of_row)
    assert not bounds.are_close(wrong.logits, want.logits, rounding)

    (layer,) = families[family].at(3)
    n_keep, image_rows = [6, 5, 3], [np.flatnonzero(prompt.image_of_row == i) for i in range(3)]
    state = prefill(
        decoders(family, mode, n_ubatch),
        prompt.segments,
        prompt.next_position,
        DecoderStage([(layer, n_keep)], by_score),
    )
    assert state.in_place
    want = reference.prune(*inputs, n_keep=n_keep, K=layer)
    limit = bounds.share(rounding) * want.scores.max()
    assert bounds.distance(np.concatenate(state.scores[0]), want.scores) <= limit
    assert bounds.distance(np.roll(want.scores, 1), want.scores) > limit
    rows = np.concatenate([r[s.kept] for r, s in zip(image_rows, state.selections[0])])
    want = reference.prune(*inputs, K=layer, keep_rows=rows)
    assert bounds.are_close(state.logits, want.logits, rounding)


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_in_shared_decodes(families, decoders, decoder_rounding, family):
    """A row counts for several to the rows of the images after it, within the same decode."""
    reference, (layer,) = open_decoder(families[family].text), families[family].at(3)
    prompt, rng = pruned_prompt(families[family]), np.random.default_rng(3)
    for image in images(prompt):
        image.mass = rng.uniform(1, 6, len(image.rows))
    bias = np.concatenate([np.zeros(len(s.rows)) if s.mass is None else np.log(s.mass) for s in prompt.segments])
    inputs = prompt.embed(reference), prompt.positions, prompt.image_of_row
    context, rounding = decoders(family), decoder_rounding(family)
    state = prefill(context, prompt.segments, prompt.next_position)
    want = reference.prune(*inputs, column_bias=bias)
    assert bounds.are_close(state.logits, want.logits, rounding)
    assert not bounds.are_close(reference.prune(*inputs).logits, want.logits, rounding)
    stage = DecoderStage([(layer, [6, 5, 3])], lambda seen, n: by_share(seen, n, 0.5))
    state = prefill(decoders(family), prompt.segments, prompt.next_position, stage)
    want = reference.prune(*inputs, K=layer, n_keep=[6, 5, 3], column_bias=bias)
    limit = bounds.share(rounding) * want.scores.max()
    assert bounds.distance(np.concatenate(state.scores[0]), want.scores) <= limit
    context.tap.set_cell_bias(None)


def architectures():
    """A text model of each architecture in the fixtures."""
    found = {}
    for path in sorted(FOLDER.glob("*/text.gguf")) + sorted(FOLDER.glob("hybrids/*.gguf")):
        found.setdefault(read_gguf_info(path, ["general.architecture"]).values["general.architecture"], path)
    return found


ARCHITECTURES = architectures()


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture(arch):
    """Images in one decode give stock's logits of decodes of their own. The bound is what stock itself rounds when it
    decodes each image in two halves; with the first image's positions in the second one it is passed.

    All rows are there: stock takes no positions with gaps.
    """
    plain, llama = (load(ARCHITECTURES[arch], "f32") for _ in range(2))
    tap = Tap()
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)
    models = SimpleNamespace(
        mrope=context.mrope, shape=SimpleNamespace(n_vocab=context.n_vocab, n_embd=context.n_embd_inp)
    )
    prompt = random_prompt(models, PARTS)
    expected, tokens = stock.run_segments(plain, prompt.segments, prompt.next_position, 4)
    halves = []
    for s in prompt.segments:
        n, middle = len(s.rows), len(s.rows) // 2 if s.image is not None else 0
        halves += [Segment(s.rows.slice(a, b)) for a, b in ((0, middle), (middle, n)) if b > a]
    stock.clear(plain)
    rounding = bounds.rounding(zip(stock.run_segments(plain, halves, prompt.next_position)[0], expected))
    images(prompt)[0].pruned = True
    state = prefill(context, prompt.segments, prompt.next_position)
    history, same_tokens = generate(context, state, 4)
    assert same_tokens == tokens and all(bounds.are_close(a, b, rounding) for a, b in zip(history, expected))
    if context.owner.has_rope:
        first, second = (s.rows for s in images(prompt)[:2])
        second.positions[..., :42] = first.positions
        context.clear()
        context.tap.set_position_shift(0, 0)
        wrong = prefill(context, prompt.segments, prompt.next_position)
        assert not bounds.are_close(wrong.logits, expected[0], rounding)
    plain.close()
    llama.close()
    tap.close()


# ---- what the next prompt uses of it ----


@pytest.mark.parametrize("n_ubatch", [512, 16])
@pytest.mark.parametrize("has_stage", [False, True], ids=["vision", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_prompt_equals_a_fresh_engine(families, decoders, family, has_stage, n_ubatch):
    """Bit for bit, whatever the two have in common; and what they have in common is used where it came from the same
    decodes.
    """
    models = families[family]
    (layer,) = models.at(3)
    stage = DecoderStage([(layer, [6, 5, 3])], by_score) if has_stage else None

    def prompt(question=0, other=None, apart=False, shorter=0):
        made = pruned_prompt(models)
        made.segments[-1].rows.tokens = np.roll(made.segments[-1].rows.tokens, question)
        if other is not None:
            rows = images(made)[other].rows
            rows.embeddings = rows.embeddings + 1.0
        last = images(made)[-1]
        last.rows = last.rows.slice(0, len(last.rows) - shorter)
        made.segments = alone(made.segments) if apart else made.segments
        return made

    def only_the_first(made):
        made.segments = [*made.segments[:2], made.segments[-1]]
        return made

    steps = [  # with the rows that the one before has from the same decodes, of which pieces of 16 have some
        (prompt(), 0, 0),
        (prompt(1), 49, 49),
        (prompt(1, other=1), 5, 5 + 16),
        (prompt(2, other=1), 49, 49),
        (prompt(2, other=2), 5, 5 + 16),
        (prompt(2, apart=True), 5, 5 + 16),
        (prompt(3, apart=True), 49, 49),
        (prompt(3, other=1, apart=True), 5 + 17, 5 + 17),
        (only_the_first(prompt()), 5 + 17, 5 + 17),
        (only_the_first(prompt(1)), 5 + 17, 5 + 17),
        (prompt(), 5, 5 + 16),
        (prompt(shorter=1), 5, 5 + 32),
        (prompt(), 5, 5 + 32),
    ]
    kept = decoders(family, "fa", n_ubatch)
    llama, tap = load(models.text, "fa"), Tap()
    attach_tap(llama, tap)
    other_context = DecoderContext(llama, tap)
    other_context.n_ubatch = n_ubatch
    n_before = 0
    for i, (case, n_same, n_same_in_pieces) in enumerate(steps):
        got = prefill(kept, case.segments, case.next_position, stage, keep=True)
        other_context.clear()
        want = prefill(other_context, case.segments, case.next_position, stage, keep=True)
        assert np.array_equal(got.logits, want.logits) and got.in_place
        n = n_same if n_ubatch == 512 else n_same_in_pieces
        if kept.is_hybrid and n != n_before:
            n = min(n, 5)  # a state cannot go back into the middle of the images
        assert got.n_reused == n, i
        n_before = sum(len(s.rows) for s in case.segments[:-1])
        if not kept.is_hybrid:  # whose stem does not outlive rows that came past TappedContext.decode
            history = [generate(context, state, 4)[0] for context, state in ((kept, got), (other_context, want))]
            assert all(map(np.array_equal, *history))
        for context in (kept, other_context):
            context.owner.end_prompt()
    llama.close()
    tap.close()


@pytest.mark.parametrize("room", [{}, {"prompt_cache_bytes": 2**28}], ids=["one", "saved"])
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_questions_about_pictures_side_by_side(families, family, room):
    """The same pictures with another question; another second picture, which another conversation may have had; the
    first picture alone; all of it kept.
    """
    models = families[family]
    a, b, c = (random_image(i) for i in range(3))
    half, vision, off = PruneConfig(0.5, 0.25, 3), PruneConfig(0.5, representatives="none"), None
    steps = [  # with whether all up to the last picture is known: from the prompt before, or from any before
        ("one?", [a, b], half, False, False),
        ("where is it?", [a, b], half, True, True),
        ("where is it?", [a, c], half, False, False),
        ("one?", [a, c], half, True, True),
        ("one?", [a, b], half, False, True),
        ("one?", [a], half, False, False),
        ("one?", [a, b], vision, False, False),
        ("two?", [a, b], vision, True, True),
        ("two?", [a, b], off, False, False),
        ("one?", [a, b], off, True, True),
        ("one?", [a, c, b], vision, False, False),
        ("one?", [a, b], vision, False, True),
    ]
    with engine(models, **room) as vlm:
        for i, (question, pictures, config, before, ever) in enumerate(steps):
            request = (f"ab {M * len(pictures)} {question}", pictures, config)
            report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
            n_question = len(vlm.llama.tokenize(f" {question}".encode(), add_bos=False, special=True))
            whole = report.n_text_tokens - n_question + report.n_vision_kept
            assert (report.reused_tokens == whole) == (ever if room else before), i
            if i % 3 == 1:
                got = answers(vlm, request, 6)
                with engine(models) as new:
                    assert np.array_equal(got, answers(new, request, 6))


def test_a_saved_state_of_the_llama(families):
    """Llama.load_state brings other rows into the cache: nothing of before is used, and the answer is right."""
    models, pictures = families["llama"], [random_image(i) for i in range(2)]
    request = (f"ab {M}{M} one?", pictures, PruneConfig(0.5, 0.25, 3))
    want = fresh(models, request)
    with engine(models) as vlm:
        vlm.generate(*request, max_tokens=2, chat=False)
        state = vlm.llama.save_state()
        vlm.generate(f"cd {M} x?", pictures[:1], request[2], max_tokens=2, chat=False)
        vlm.llama.load_state(state)
        assert same(vlm.read_prompt(*request, chat=False), want).reused_tokens == 0
        assert same(vlm.read_prompt(*request, chat=False), want).reused_tokens > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_do_not_come_back(families, decoders, monkeypatch, family):
    """They are decoded again from layer 0, in the decodes that such a prompt has without a decoder stage."""
    prompt, (layer,), run = pruned_prompt(families[family]), families[family].at(3), Windows.run

    def elsewhere(self, segments, first, *rest, **options):
        end = run(self, segments, first, *rest, **options)
        end.cells += first > 0
        return end

    stage = DecoderStage([(layer, [6, 5, 3])], by_score)
    with monkeypatch.context() as patch:
        patch.setattr(Windows, "run", elsewhere)
        state = prefill(decoders(family, "fa"), prompt.segments, prompt.next_position, stage)
    assert not state.in_place
    for image, selection in zip(images(prompt), state.selections[0]):
        image.rows, image.pruned = image.rows.take(selection.kept), True
    again = prefill(decoders(family, "fa"), prompt.segments, prompt.next_position)
    assert np.array_equal(state.logits, again.logits)
