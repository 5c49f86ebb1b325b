"""tools/realdec: its generator, its measures, and what its answers see, against the float64 reference. The marker
`realdec` needs the two decoders (tools/realdec/fetch.py): STAR_EDGE_REALDEC=FOLDER pytest -m realdec.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from helpers import bounds
from helpers.models import random_prompt
from helpers.reference import Decoder

TOOL = Path(__file__).parent.parent / "tools" / "realdec"
FILES = ("smollm2-135m-instruct-q4_1.gguf", "gemma-3-270m-q4_k_m.gguf")


@pytest.fixture(scope="module")
def tool():
    """The tool's modules: it is a folder of scripts, which import each other by bare names."""
    sys.path.insert(0, str(TOOL))
    names = ("realdec", "prompts", "tasks", "methods", "rows")
    try:
        modules = {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(TOOL))
        for name in names:
            sys.modules.pop(name, None)
    return modules


# ---- tasks ----


@pytest.mark.parametrize("task", ["facts", "two-facts", "table", "list"])
def test_an_item_is_drawn_from_its_name_alone(tool, task):
    make = tool["tasks"].make
    items = [make("dev", task, i) for i in (0, 1, 2)]
    assert make("dev", task, 2) == items[2]
    assert len({item.context for item in [*items, make("test", task, 0)]}) == 4


@pytest.mark.parametrize("task", ["facts", "two-facts", "table", "list"])
def test_values_are_where_the_item_says_and_inside_its_facts(tool, task):
    for index in range(50):
        item = tool["tasks"].make("dev", task, index)
        assert len(item.answers) == len(item.facts) == len(item.values)
        for answer, fact, value in zip(item.answers, item.facts, item.values):
            assert item.context[slice(*value)] == answer
            assert fact[0] <= value[0] < value[1] <= fact[1]
            assert item.context.count(item.context[slice(*fact)]) == 1
        people = [name for name in tool["tasks"].NAMES if name in item.question]
        assert all(name in item.context for name in people)


def test_an_answer_is_right_if_it_has_the_values_in_order_as_words(tool):
    item = tool["tasks"].make("dev", "two-facts", 0)
    first, second = item.answers
    is_right = tool["realdec"].is_right
    assert is_right(f" {first} keys / {second} keys", item)
    assert not is_right(f" {second} keys / {first} keys", item)
    assert not is_right(f" {first}0 keys / {second} keys", item)
    assert not is_right(f" {first} keys", item)


# ---- measures ----


def test_pooled_is_the_largest_of_the_neighbours(tool):
    scores = np.random.default_rng(0).standard_normal(20)
    right = [scores[max(0, i - 2) : i + 3].max() for i in range(20)]
    assert np.array_equal(tool["methods"].pooled(scores, 5), right)


def test_recall_counts_the_rows_that_are_among_the_best(tool):
    rows = np.zeros(8, bool)
    rows[[1, 6]] = True
    scores = np.array([0, 5, 1, 9, 8, 7, 6, 2.0])
    assert [tool["rows"].recall(scores, rows, keep) for keep in (0.5, 0.625, 0.25)] == [0.5, 1.0, 0.0]


def test_average_counts_each_layer(tool):
    method = tool["methods"].Method("", ((0.5, 0.5), (0.75, 0.25)))
    assert method.average(8, 100) == pytest.approx((4 * 100 + 2 * 50 + 2 * 25) / 800)


# ---- what an answer sees ----


@pytest.fixture(scope="module")
def decoder(tool, families):
    return tool["realdec"].RealDecoder(families["llama"].text)


def forward(decoder, prompt, reply, stages):
    """Logits of the reference for each step of the answer: dropped rows are not seen from the stage on."""
    reference = Decoder(decoder.path)
    rows = np.concatenate(
        [reference.embed(s.rows.tokens) if s.image is None else s.rows.embeddings for s in prompt.segments]
        + [reference.embed(reply.fed)]
    )
    first = len(prompt.segments[0].rows)
    bias = np.zeros((reference.n_layer, len(rows)))
    for layer, selection in stages:
        dropped = np.setdiff1d(np.arange(prompt.n_context), selection.kept)
        bias[layer:, first + dropped] = -np.inf
        if selection.mass is not None:
            bias[layer:, first + selection.kept] = np.log(selection.mass)
    return reference.forward(rows, np.arange(len(rows)), bias)[prompt.n_rows - 1 :]


@pytest.fixture(scope="module")
def asked(tool, families, decoder):
    """A random prompt, its unpruned answer of two sentences, and what the backend rounds there."""
    segments = random_prompt(families["llama"], [6, (5, 8), 7], seed=3).segments
    prompt = tool["realdec"].Prompt(segments, 53, 40, [[300, 301]], [])
    unpruned = decoder.answer(prompt, None)
    right = forward(decoder, prompt, unpruned, [])
    return prompt, unpruned, bounds.rounding(zip(unpruned.logits, right))


def selection(tool, n, step, mass=None):
    kept = np.arange(0, n, step)
    return tool["realdec"].Selection(kept, None if mass is None else np.full(len(kept), mass))


@pytest.mark.parametrize("mass", [None, 3.0])
@pytest.mark.parametrize("layers", [(3,), (2, 5)])
def test_an_answer_sees_dropped_rows_below_their_stage_alone(tool, decoder, asked, layers, mass):
    prompt, _, rounding = asked
    stages = [(layer, selection(tool, prompt.n_context, 2 + 2 * i, mass)) for i, layer in enumerate(layers)]
    reply = decoder.answer_seen_below(prompt, stages)
    right = forward(decoder, prompt, reply, stages)
    assert bounds.rounding(zip(reply.logits, right)) <= bounds.MEAN_FACTOR * rounding
    # what the bound tells apart: another layer, and what the engine's own answer sees
    for wrong in ([(layer + 1, s) for layer, s in stages], [(layer - 1, s) for layer, s in stages]):
        other = forward(decoder, prompt, reply, wrong)
        assert bounds.rounding(zip(reply.logits, other)) > bounds.MEAN_FACTOR * rounding


def test_the_same_answer_has_the_unpruned_text_and_no_divergence(decoder, asked):
    prompt, unpruned, _ = asked
    reply = decoder.answer(prompt, None, unpruned)
    assert reply.text == unpruned.text and reply.fed == unpruned.fed
    assert reply.kl == 0.0  # the first token's logits come from the same decodes


def test_another_answer_goes_on_from_its_own_words(tool, decoder, asked):
    prompt, unpruned, _ = asked
    n = prompt.n_context
    stage = tool["realdec"].DecoderStage([(1, [1])], lambda seen, k: tool["realdec"].Selection(np.arange(n)[:k]))
    alone, beside = decoder.answer(prompt, stage), decoder.answer(prompt, stage, unpruned)
    assert alone.text != unpruned.text  # one row of all is not enough
    assert (beside.text, beside.fed, beside.said) == (alone.text, alone.fed, alone.said)


@pytest.mark.realdec
@pytest.mark.skipif("STAR_EDGE_REALDEC" not in os.environ, reason="STAR_EDGE_REALDEC names no folder of decoders")
@pytest.mark.parametrize("file", FILES)
def test_real_decoders_answer_from_rows_as_from_tokens(tool, file):
    """The context as embeddings gives the logits of its tokens on the same decodes, and most answers are right."""
    decoder = tool["realdec"].RealDecoder(Path(os.environ["STAR_EDGE_REALDEC"]) / file)
    right = 0
    for index in range(6):
        item = tool["tasks"].make("dev", "facts", index)
        prompt = decoder.read(item)
        reply = decoder.answer(prompt, None)
        right += tool["realdec"].is_right(reply.text, item)
        prompt.segments[1].rows.tokens = decoder.tokenize(item.context)
        prompt.segments[1].rows.embeddings = None
        decoder.owner.kv_cache_clear()
        assert np.array_equal(decoder.answer(prompt, None).logits[0], reply.logits[0])
    assert right >= 3
