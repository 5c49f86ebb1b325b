"""Decoders with recurrent layers beside attention: what is true of them alone.

What holds for every decoder (exact, faithful, windows, reuse) is shown of two of them with all others: the families
"qwen35" and "lfm2" of conftest.py. Here are all architectures with a decoder stage, of which the oracle is stock
llama.cpp, and what would go wrong without a precaution.
"""

from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest
from helpers import stock
from helpers.choosing import by_score, generate, keep_all
from helpers.families import FOLDER, MODES
from helpers.models import random_prompt

from star_edge.decoder.hybrid import HybridCells
from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.context import MAIN, DecoderContext, attach_tap
from star_edge.llamacpp.names import HYBRIDS, KV_TYPES
from star_edge.llamacpp.tap import Tap

FILES = {path.stem: path for path in (FOLDER / "hybrids").glob("*.gguf")} | {
    "qwen35": FOLDER / "qwen3.5" / "text.gguf",
    "qwen35moe": FOLDER / "qwen3.5-moe" / "text.gguf",
    "lfm2": FOLDER / "lfm2-vl" / "text.gguf",
}
ATTENTION = {
    "falcon-h1": [0, 1, 2, 3],
    "granitehybrid": [2, 4],
    "lfm2": [1, 3],
    "lfm2moe": [2, 4],
    "nemotron_h": [3, 6],
    "nemotron_h_moe": [3, 6],
    "qwen35": [3, 7],
    "qwen35moe": [1, 3],
    "qwen3next": [3, 7],
}
THREE, IMAGE_FIRST, ONE_ROW = [5, (6, 7), 4, (9, 5), 3, (4, 4), 11], [(8, 8), 9], [1, (5, 6), 1]
N_GENERATE = 12


def load(arch, mode):
    flash_attn, cache = MODES[mode]
    return stock.load(FILES[arch], flash_attn, n_threads=1, type_k=KV_TYPES[cache], type_v=KV_TYPES[cache])


@pytest.fixture(scope="module")
def tapped():
    """(arch, mode) -> a DecoderContext with an empty cache, kept for the module."""
    made = {}

    def get(arch, mode="fa"):
        if (arch, mode) not in made:
            llama, tap = load(arch, mode), Tap()
            attach_tap(llama, tap)
            made[arch, mode] = DecoderContext(llama, tap), tap
        context, _ = made[arch, mode]
        reset(context)
        return context

    yield get
    for context, tap in made.values():
        context.llama.close()
        tap.close()


@pytest.fixture(scope="module")
def plain():
    """(arch, mode) -> a stock Llama."""
    made = {}

    def get(arch, mode="fa"):
        if (arch, mode) not in made:
            made[arch, mode] = load(arch, mode)
        stock.clear(made[arch, mode])
        return made[arch, mode]

    yield get
    for llama in made.values():
        llama.close()


def reset(context):
    context.tap.set_position_shift(0, 0)
    context.tap.set_cell_bias(None)
    context.clear()


def prompt_for(context, parts, seed=0):
    sizes = SimpleNamespace(n_vocab=context.n_vocab, n_embd=context.n_embd)
    return random_prompt(SimpleNamespace(mrope=context.mrope, shape=sizes), parts, seed)


def in_pieces(prompt, n_ubatch):
    """The segments as stock decodes them with that n_ubatch."""
    return [
        SimpleNamespace(rows=segment.rows.slice(at, min(len(segment.rows), at + n_ubatch)), causal=True)
        for segment in prompt.segments
        for at in range(0, len(segment.rows), n_ubatch)
    ]


def stage(windows, prompt, n_keep=0, choose=keep_all):
    n_images = sum(s.image is not None for s in prompt.segments)
    return DecoderStage([(layer, [n_keep] * n_images) for layer in windows], choose) if windows else None


def read(context, prompt, windows, n_keep=0, choose=keep_all):
    return prefill(context, prompt.segments, prompt.next_position, stage(windows, prompt, n_keep, choose))


def test_every_architecture_with_a_stage_is_tested():
    assert sorted(FILES) == sorted(ATTENTION) == sorted(HYBRIDS)


@pytest.mark.parametrize("arch", sorted(ATTENTION))
def test_layers_with_attention(tapped, arch):
    context = tapped(arch)
    assert context.stage_problem is None and context.is_hybrid
    assert context.attention_layers == ATTENTION[arch]
    assert context.owner.has_rope == (arch not in ("granitehybrid", "nemotron_h", "nemotron_h_moe"))
    usable = [k for k in ATTENTION[arch] if k]
    assert [context.nearest_attention(k) for k in (1, context.n_layers - 1)] == [usable[0], usable[-1]]
    assert llama_cpp.llama_n_seq_max(context.llama.ctx) == 1  # another one would take memory for its state


@pytest.mark.parametrize("mode", ["f16", "fa", "q8_0"])
@pytest.mark.parametrize("arch", sorted(ATTENTION))
def test_keep_all_equals_stock(plain, tapped, arch, mode):
    """Logits of the prompt and of the answer, bit for bit, for every K, for all of them at once, for an image that
    comes first, and with decodes of few rows. The answer matters: what a graph takes for embeddings shows there alone.
    """
    layers = [k for k in ATTENTION[arch] if k]
    for parts, n_ubatch in ((THREE, 512), (THREE, 32), (IMAGE_FIRST, 512), (ONE_ROW, 512)):
        context = tapped(arch, mode)
        prompt = prompt_for(context, parts)
        expected = stock.run_segments(plain(arch, mode), in_pieces(prompt, n_ubatch), prompt.next_position, N_GENERATE)
        context.n_ubatch, before = n_ubatch, context.n_ubatch
        for windows in [*([k] for k in layers), layers]:
            read(context, prompt_for(context, [6, (5, 5), 7], seed=5), [])  # leaves states in all layers
            reset(context)
            state = read(context, prompt, windows)
            history, tokens = generate(context, state, N_GENERATE)
            assert state.in_place and state.n_cells == len(prompt.image_of_row)
            assert tokens == expected[1]
            assert [float(np.abs(a - b).max()) for a, b in zip(history, expected[0])] == [0.0] * (N_GENERATE + 1)
            reset(context)
        context.n_ubatch = before


@pytest.mark.parametrize("arch", sorted(ATTENTION))
def test_an_ordinary_decode_after_a_pruned_one(plain, tapped, arch):
    """Nothing of a pruned prompt is left, neither in flags of graphs nor in states."""
    context = tapped(arch)
    prompt = prompt_for(context, THREE)
    expected, _ = stock.run_segments(plain(arch), prompt.segments, prompt.next_position, 3)
    for windows in ([ATTENTION[arch][-1]], [k for k in ATTENTION[arch] if k]):
        pruned = read(context, prompt, windows, 3, by_score)
        assert pruned.in_place and not np.array_equal(pruned.logits, expected[0])
        assert pruned.n_cells == 5 + 4 + 3 + 11 + 9
        generate(context, pruned, 3)
        assert context.span(MAIN)[1] == pruned.n_cells + pruned.gap + 2
        reset(context)
        history, _ = stock.run_segments(context.llama, prompt.segments, prompt.next_position, 3)
        assert all(np.array_equal(a, b) for a, b in zip(history, expected))
        reset(context)


@pytest.mark.parametrize("arch", ["qwen35", "lfm2", "falcon-h1"])
def test_mixed_prompts_repeat_bit_for_bit(tapped, arch):
    context, rng, seen = tapped(arch), np.random.default_rng(0), {}
    layers = [k for k in ATTENTION[arch] if k]
    for _ in range(60):
        parts, windows, n = rng.integers(3), rng.integers(4), rng.integers(3, 9)
        reset(context)
        prompt = prompt_for(context, ([12, (8, 8), 9], [(6, 6), 5], [3, (4, 4), 2, (7, 5), 30])[parts])
        chosen = ([], layers[:1], layers[-1:], layers)[windows]
        state = read(context, prompt, chosen, n, by_score)
        key = parts, windows, n if chosen else 0
        assert np.array_equal(state.logits, seen.setdefault(key, state.logits)) and state.in_place
    assert len(seen) > 20


# ---- what would go wrong without a precaution ----


@pytest.mark.parametrize("arch", ["qwen35", "lfm2"])
def test_an_image_at_the_start_needs_states_cleared(tapped, monkeypatch, arch):
    context = tapped(arch)
    prompt, other = prompt_for(context, IMAGE_FIRST), prompt_for(context, [6, (5, 5), 7], seed=5)
    layer = ATTENTION[arch][0]
    right = read(context, prompt, [layer]).logits
    monkeypatch.setattr(HybridCells, "begin", lambda self, n_prefix, layer: None)
    reset(context)
    prefill(context, other.segments, other.next_position)
    reset(context)
    assert not np.array_equal(read(context, prompt, [layer]).logits, right)


@pytest.mark.parametrize("arch", ["qwen35", "lfm2"])
def test_what_is_set_aside_must_be_hidden(tapped, monkeypatch, arch):
    """The last row, until another one is decoded, and what was dropped, until the prompt is read."""
    context = tapped(arch)
    prompt, layer = prompt_for(context, [12, (8, 8), 9]), ATTENTION[arch][0]
    right = []
    for n, c in ((0, keep_all), (5, by_score)):
        reset(context)
        right.append(read(context, prompt, [layer], n, c).logits)
    monkeypatch.setattr(HybridCells, "_apply", lambda self: None)
    for (n, c), logits in zip(((0, keep_all), (5, by_score)), right):
        reset(context)
        assert not np.array_equal(read(context, prompt, [layer], n, c).logits, logits)


@pytest.mark.parametrize("arch", ["qwen35", "lfm2", "nemotron_h"])
def test_rows_that_do_not_come_back_are_decoded_again(tapped, monkeypatch, arch):
    """From the start: the state of the text before the image is gone."""
    context = tapped(arch)
    prompt, layer = prompt_for(context, [12, (8, 8), 9]), ATTENTION[arch][0]
    remove, n_calls = DecoderContext.remove, []

    def skips_the_first(self, *args):
        n_calls.append(args)
        if len(n_calls) > 1:
            remove(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DecoderContext, "remove", skips_the_first)
        state = read(context, prompt, [layer], 20, by_score)
    assert not state.in_place and (state.n_cells, state.gap) == (12 + 20 + 9, 0)
    history, _ = generate(context, state, 3)
    reset(context)
    image = prompt.segments[1]
    image.rows = image.rows.take(state.selections[0][0].kept)
    plainly = prefill(context, prompt.segments, prompt.next_position)
    assert all(np.array_equal(a, b) for a, b in zip(history, generate(context, plainly, 3)[0]))
