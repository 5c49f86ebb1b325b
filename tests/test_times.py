"""Times and counts of answers: the engine's time alone, tokens as `usage` counts them, medians. The clock is the test's
own.
"""

from __future__ import annotations

import itertools

import pytest
from llama_cpp import Llama

from star_edge import PruneConfig, StarChatHandler, StarVLM, generation, refvlm
from star_edge.benchmarking.run import _describe, make_request
from star_edge.benchmarking.sides import STAGES, Sample, SideSpec, Workbench
from star_edge.benchmarking.summary import summarise
from star_edge.io.images import load_image
from star_edge.report import PruneReport
from star_edge.vision.profiles import GENERIC

PLATE = "what number is shown?"  # two digits
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": str(refvlm.DEMO_IMAGE)}},
            {"type": "text", "text": PLATE},
        ],
    }
]


class Clock:
    """Stands for perf_counter: a second passes whenever it is looked at, and as many more as the caller says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(generation, "perf_counter", clock)
    return clock


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as engine:
        yield engine


@pytest.fixture(scope="module")
def llm():
    llama = Llama(
        str(refvlm.TEXT_MODEL), chat_handler=StarChatHandler(refvlm.MMPROJ), n_ctx=512, flash_attn=True, verbose=False
    )
    yield llama
    llama.close()


# ---- the engine's time ----


def test_what_the_caller_does_between_pieces_is_no_time_of_the_engine(vlm, clock):
    def milliseconds(pause):
        stream = vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=8, stream=True)
        clock.now += pause  # before the first piece, such as the drawing of an overlay
        for _ in stream:
            clock.now += pause
        return stream.report.milliseconds["generate"]

    assert milliseconds(0) == milliseconds(5000) > 0


def test_so_in_the_handlers_streams(llm, clock):
    def milliseconds(pause):
        chunks = []
        for chunk in llm.create_chat_completion(MESSAGES, max_tokens=8, stream=True):
            clock.now += pause
            chunks.append(chunk)
        return chunks[-1]["star_edge"]["milliseconds"]["generate"]

    assert milliseconds(0) == milliseconds(5000) > 0


def test_time_between_requests_is_none_of_either(vlm, llm, clock):
    vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=2)
    first = llm.create_chat_completion(MESSAGES, max_tokens=8)["star_edge"]["milliseconds"]["generate"]
    clock.now += 5000
    assert llm.create_chat_completion(MESSAGES, max_tokens=8)["star_edge"]["milliseconds"]["generate"] == first == 1000


# ---- tokens ----

ENDS = [
    pytest.param({"max_tokens": 8}, 2, 3, id="end of the answer"),
    pytest.param({"max_tokens": 2}, 2, 2, id="max_tokens"),
    pytest.param({"max_tokens": 1}, 1, 1, id="one token"),
    pytest.param({"max_tokens": 8, "stop": [" 7"]}, 2, 2, id="stop string"),
]


@pytest.mark.parametrize("options, n_generated, n_sampled", ENDS)
def test_tokens_are_counted_as_usage_counts_them(vlm, llm, options, n_generated, n_sampled):
    """A stop string's token is one of the answer, EOS is none; "stop" is the reason for both."""
    response = llm.create_chat_completion(MESSAGES, **options)
    assert response["usage"]["completion_tokens"] == response["star_edge"]["n_generated"] == n_generated
    assert response["star_edge"]["n_sampled"] == n_sampled
    *_, last = llm.create_chat_completion(MESSAGES, stream=True, **options)
    assert (last["star_edge"]["n_generated"], last["star_edge"]["n_sampled"]) == (n_generated, n_sampled)
    report = vlm.generate(PLATE, refvlm.DEMO_IMAGE, **options).report
    assert (report.n_generated, report.n_sampled) == (n_generated, n_sampled)
    assert report.figures()["n_sampled"] == n_sampled


def test_tokens_of_a_stream_grow_with_it(vlm):
    stream = vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=8, stream=True)
    counts = [stream.report.n_generated for _ in stream]
    assert counts == sorted(counts) and counts[0] == 1 and stream.report.n_generated == 2


def test_a_request_that_is_refused_leaves_the_llama_as_it_was(vlm):
    before = dict(vars(vlm.llama))
    vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=8, stream=True)  # never read
    vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=2)
    assert "generate" not in vars(vlm.llama) and "generate" not in before
    own = vlm.llama.generate  # a wrapper of somebody else's survives
    calls = itertools.count()
    vlm.llama.generate = lambda *args, **options: next(calls) >= 0 and own(*args, **options)
    try:
        wrapper = vlm.llama.generate
        vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=2)
        assert vlm.llama.generate is wrapper and next(calls) == 1
    finally:
        del vlm.llama.generate


def test_tokens_per_second_are_of_those_that_took_a_decode():
    """The first token's logits are the prompt's; EOS took a decode like any other."""
    report = PruneReport(PruneConfig(), [], 6, [], 5, 9, {"generate": 2000.0}, n_generated=4, n_sampled=5)
    assert report.tokens_per_s == 2.0 and report.to_dict()["tokens_per_s"] == 2.0
    report.n_generated = report.n_sampled = 1
    assert report.tokens_per_s is None
    assert PruneReport(PruneConfig(), [], 6, [], 5, 9).tokens_per_s is None


# ---- what came from a cache ----


def test_the_report_counts_pictures_from_the_cache(vlm):
    vlm.encoder.cache.clear()
    report = lambda images: vlm.read_prompt(PLATE, images)[1]
    assert report([refvlm.DEMO_IMAGE]).n_cached == 0
    again = report([refvlm.DEMO_IMAGE])
    assert again.n_cached == 1 and again.figures()["n_cached"] == 1
    assert report([]).n_cached == 0


# ---- both sides of a comparison ----


def sample(first_token, **stages):
    all_stages = dict.fromkeys(STAGES, 0.0) | stages
    all_stages["first_token"] = first_token - sum(all_stages.values())
    return Sample(first_token, all_stages, [0.1], 50, 100, 150, 100.0, 1000, "")


def test_the_median_of_an_even_count_is_the_mean_of_the_two_middle_ones():
    """Of every number of the table, and stages still add up to it."""
    sides = [SideSpec("stock", "stock"), SideSpec("pruned", "star_edge")]
    stock = [sample(t, prefill=t / 2) for t in (9.0, 4.0, 6.0, 1.0)]
    pruned = [sample(t, prefill=p) for t, p in ((3.0, 2.0), (2.0, 0.5))]
    pruned[1].tokens = [0.05]
    rows = summarise(sides, {"stock": stock, "pruned": pruned}, {"stock": 1, "pruned": 1}, 10)["sides"]
    assert [row["first_token_ms"]["median"] for row in rows] == [5000, 2500]
    assert rows[1]["speed_up"] == 2.0
    assert rows[1]["stages_ms"]["prefill"] == 1250 and sum(rows[1]["stages_ms"].values()) == 2500
    assert rows[0]["decoder_ms"] == 2500 and rows[1]["decoder_ms"] == 1250
    assert rows[1]["tokens_per_s"]["median"] == 15


@pytest.fixture(scope="module")
def bench():
    with Workbench(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as bench:
        yield bench


def test_bench_says_which_encoders_attention_it_cannot_read(bench, monkeypatch):
    bench.ask(
        SideSpec("pruned", "star_edge", PruneConfig(0.5)),
        make_request([load_image(refvlm.DEMO_IMAGE)], "", PLATE, (0.25,)),
        1,
    )
    assert _describe(bench, refvlm.TEXT_MODEL, {})["vision_stage"] == "yes"
    encoder = bench._star._reader.encoder
    monkeypatch.setattr(encoder, "profile", GENERIC)
    assert _describe(bench, refvlm.TEXT_MODEL, {})["vision_stage"].startswith("by embeddings only")
