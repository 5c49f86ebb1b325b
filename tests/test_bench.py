"""star-edge bench: sides that are what they say, times that add up, ratios against hand-computed ones. No time is
asserted.
"""

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

from star_edge import StarVLM, refvlm
from star_edge.benchmarking import memory
from star_edge.benchmarking.measure import order, run_sides, time_idle_hook
from star_edge.benchmarking.plots import waterfall
from star_edge.benchmarking.run import make_request, make_specs, run
from star_edge.benchmarking.sides import STAGES, Sample, SideSpec, Workbench, stages_of
from star_edge.benchmarking.summary import summarise, text_table
from star_edge.errors import ContextLengthError
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.io.images import load_image
from star_edge.pruning.config import PruneConfig
from star_edge.pruning.presets import PRESETS
from star_edge.report import PruneReport
from star_edge.synthetic.pictures import blocks

QUESTION = "what color is the triangle?"
FAST = NamedConfig("fast", "presets", PRESETS["fast"])
STOCK, SHIPPED = SideSpec("stock", "stock"), SideSpec("shipped", "stock", None, False)
UNPRUNED, PRUNED = SideSpec("unpruned", "star_edge"), SideSpec("pruned", "star_edge", PRESETS["fast"])


@pytest.fixture(scope="module")
def request_():
    return make_request([load_image(str(refvlm.DEMO_IMAGE))], "", QUESTION, (0.25,))


@pytest.fixture(scope="module")
def bench():
    with Workbench(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as bench:
        yield bench


# ---- sides ----


def test_stock_sides_are_stock(bench, request_):
    """A Llama of its own with its own MTMDChatHandler answers alike, between requests of the pruned side too."""
    handler = MTMDChatHandler(str(refvlm.MMPROJ), verbose=False, use_gpu=False)
    alone = Llama(str(refvlm.TEXT_MODEL), chat_handler=handler, n_ctx=512, flash_attn=True, verbose=False)
    answer = alone.create_chat_completion(request_.messages, max_tokens=4, temperature=0.0, repeat_penalty=1.0)
    want, n_prompt = answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]
    alone.close()
    assert want.strip()  # the shipped model knows the answer, and ends it itself
    for spec in (STOCK, PRUNED, SHIPPED, STOCK):
        sample = bench.ask(spec, request_, 4)
        assert sample.text.startswith(want)
        if spec.kind == "stock":
            assert sample.n_text + sample.n_image == sample.n_cells == n_prompt


def test_contexts_are_what_they_say(bench, request_):
    """Only the star_edge side has a callback, and only the side as shipped no flash attention."""
    for spec in (STOCK, SHIPPED, PRUNED):
        bench.ask(spec, request_, 1)
    callbacks = {s.name: bool(bench.context(s).params.cb_eval) for s in (STOCK, SHIPPED, PRUNED)}
    assert callbacks == {"stock": False, "shipped": False, "pruned": True}
    flash = {s.name: bench.context(s).params.flash_attn_type for s in (STOCK, SHIPPED, PRUNED)}
    assert flash == {
        "stock": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "shipped": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "pruned": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    }
    assert len({s.model.model for s in map(bench.context, (STOCK, SHIPPED, PRUNED))}) == 1  # one copy of the weights


def test_star_edge_sides_are_star_edge(bench, request_):
    """Kept tokens are those of StarVLM for the same messages, and nothing comes from an earlier request."""
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as vlm:
        answer = vlm.generate(QUESTION, [str(refvlm.DEMO_IMAGE)], "fast", max_tokens=4)
    for _ in range(2):
        sample = bench.ask(PRUNED, request_, 4)
        assert sample.text.startswith(answer.text)
        report = sample.report
        assert np.array_equal(report.images[0].decoder_kept, answer.report.images[0].decoder_kept)
        assert not report.images[0].cached and report.reused_tokens == 0
        assert sample.average_tokens == answer.report.average_tokens and sample.n_cells == answer.report.n_kv_cells


@pytest.mark.parametrize("spec", [STOCK, UNPRUNED, PRUNED], ids=lambda s: s.name)
def test_stages_add_up_and_answers_are_long(spec, bench, request_):
    sample = bench.ask(spec, request_, 6)  # the model itself would end after one or two
    assert tuple(sample.stages) == STAGES
    assert sum(sample.stages.values()) == pytest.approx(sample.first_token, rel=1e-9)
    assert min(sample.stages.values()) >= 0 and sample.stages["encode"] > 0 and sample.stages["preprocess"] > 0
    assert len(sample.tokens) == 5 and min(sample.tokens) > 0
    in_decoder = {name for name in ("prefill", "probe", "decoder_stage", "resume") if sample.stages[name]}
    assert in_decoder == ({"prefill", "probe", "decoder_stage", "resume"} if spec is PRUNED else {"prefill"})


def test_cache_bytes_are_of_the_prompt_alone(bench, request_):
    """In proportion to cells: two f16 rows for each layer and cell, and some bytes about each cell."""
    full, pruned = bench.ask(STOCK, request_, 1), bench.ask(PRUNED, request_, 1)
    metadata = bench.llama.metadata
    head = int(metadata["llama.embedding_length"]) // int(metadata["llama.attention.head_count"])
    cell = bench.n_layers * 2 * 2 * head * int(metadata["llama.attention.head_count_kv"])
    for sample in (full, pruned):
        assert sample.n_cells * cell <= sample.cache_bytes <= sample.n_cells * (cell + 64) + 4096
    assert pruned.n_cells < full.n_cells / 2
    assert bench.ask(STOCK, request_, 2).cache_bytes is None


def test_what_does_not_fit(request_):
    with Workbench(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=150) as bench:
        with pytest.raises(ContextLengthError, match="n_ctx"):
            bench.ask(STOCK, request_, 4)
        with pytest.raises(ContextLengthError, match="n_ctx"):
            bench.ask(UNPRUNED, request_, 4)
    with Workbench(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256) as bench:
        with pytest.raises(ContextLengthError, match="no room for 200"):
            bench.ask(UNPRUNED, request_, 200)
        assert len(bench.ask(UNPRUNED, request_, 2).tokens) == 1


def test_stages_of_a_report():
    """Scores are of the decoder stage; the text before the first image is prefill."""
    milliseconds = {
        "preprocess": 1,
        "redundancy": 10,
        "encode": 8,
        "encoder_stage": 11,
        "vision_stage": 2,
        "prefix": 3,
        "probe": 6,
        "decoder_scores": 4,
        "decoder_stage": 1,
        "resume": 7,
        "first_token": 53,
    }
    report = PruneReport(PruneConfig(), [], 8, [(2, 4), (4, 2)], 5, 9, milliseconds)
    stages = {name: round(1e3 * s, 6) for name, s in stages_of(report).items()}
    assert stages == {
        "preprocess": 1,
        "redundancy": 10,
        "encode": 8,
        "encoder_stage": 11,
        "vision_stage": 2,
        "prefill": 3,
        "probe": 6,
        "decoder_stage": 5,
        "resume": 7,
    }


# ---- order ----


class Recorder:
    """Stands for a Workbench: notes who is asked for how much."""

    def __init__(self, refuse=()):
        self.asked, self.refuse = [], refuse

    def ask(self, spec, request, n_generate):
        self.asked.append((spec.name, n_generate))
        if spec.name in self.refuse:
            raise ContextLengthError(f"{spec.name} does not fit")
        n = 36 if spec.image_max_tokens == 36 else 144
        return sample(1.0, 0.5, n_image=n)


def sample(total, prefill, n_text=50, n_image=100, average=None, tokens=(0.1,)):
    stages = dict.fromkeys(STAGES, 0.0) | {"prefill": prefill, "first_token": total - prefill}
    average = n_image if average is None else average
    return Sample(total, stages, list(tokens), n_text, n_image, n_text + n_image, average, 1000, "")


def test_interleaved_in_rotated_order():
    bench = Recorder()
    specs = [STOCK, UNPRUNED, PRUNED]
    samples, cache_bytes, notes = run_sides(bench, specs, None, repeats=4, n_generate=5)
    warm, rest = bench.asked[:3], [name for name, _ in bench.asked[3:]]
    assert warm == [("stock", 1), ("unpruned", 1), ("pruned", 1)]
    assert rest == [
        *("stock", "unpruned", "pruned"),
        *("unpruned", "stock", "pruned"),
        *("pruned", "stock", "unpruned"),
        *("stock", "pruned", "unpruned"),
    ]
    assert {n for _, n in bench.asked[3:]} == {5}
    assert {name: len(s) for name, s in samples.items()} == {"stock": 4, "unpruned": 4, "pruned": 4}
    assert cache_bytes == dict.fromkeys(samples, 1000) and not notes
    assert sorted(order(5, 7)) == list(range(5)) and order(5, 7)[0] == 2


def test_sides_that_cannot_be_are_left_out():
    fewer, useless = SideSpec("fewer", "stock", None, True, 36), SideSpec("useless", "stock", None, True, 40)
    bench = Recorder(refuse=("shipped",))
    samples, _, notes = run_sides(bench, [SHIPPED, STOCK, fewer, useless, PRUNED], None, repeats=1, n_generate=2)
    assert list(samples) == ["stock", "fewer", "pruned"]
    assert notes[0] == "left out shipped: shipped does not fit" and "144 tokens of the smaller picture" in notes[1]
    with pytest.raises(ContextLengthError, match="pruned does not fit"):
        run_sides(Recorder(refuse=("unpruned", "pruned")), [STOCK, PRUNED], None, repeats=1, n_generate=2)


# ---- ratios ----


def test_ratios_against_hand_computed_ones():
    """10 layers, 50 + 100 tokens: 1,500 token-layers. Pruned to 25 for each layer: 750. Of 3 s, 2 are the decoder's."""
    specs = [SHIPPED, STOCK, PRUNED]
    report = PruneReport(PRESETS["fast"], [], 10, [], 50, 75)
    pruned = [sample(t, d, average=25, tokens=(0.05,)) for t, d in ((2.5, 1.6), (2.0, 1.25), (1.0, 0.5))]
    for s in pruned:
        s.report = report
    samples = {"shipped": [sample(4.0, 3.0)], "stock": [sample(t, 2.0) for t in (3.0, 3.5, 2.5, 9.0)], "pruned": pruned}
    result = summarise(specs, samples, dict.fromkeys(samples, 1000), 10)
    assert result["reference"] == "stock"
    shipped, stock, row = result["sides"]
    assert stock["first_token_ms"] == {
        "median": 3250,
        "min": 2500,
        "max": 9000,
        "all": [3000, 3500, 2500, 9000],
    }  # the mean of the two middle ones
    assert row["decoder_ideal"] == pytest.approx(2.0) and row["ideal"] == pytest.approx(3.25 / (1.25 + 1))
    assert row["speed_up"] == pytest.approx(3.25 / 2) and row["decoder_speed_up"] == pytest.approx(2 / 1.25)
    assert row["of_ideal"] == pytest.approx(0.8)
    assert row["tokens_per_s"]["median"] == pytest.approx(20) and stock["tokens_per_s"]["median"] == pytest.approx(10)
    assert stock["ideal"] == stock["speed_up"] == 1 and shipped["speed_up"] == pytest.approx(3.25 / 4)
    assert row["peak_rss_bytes"] is None and stock["peak_rss_bytes"] is None  # to be filled in
    row["peak_rss_bytes"] = 7
    assert stock["n_ctx_needed"] == 256 and stock["kv_bytes_needed"] == round(1000 * 256 / 150)
    assert row["n_ctx_needed"] == report.n_ctx_needed
    for r in result["sides"]:
        assert sum(r["stages_ms"].values()) == pytest.approx(r["first_token_ms"]["median"])
    best, steps = waterfall(result["sides"], "stock")
    assert best == "pruned" and 3250 + sum(change for _, change in steps) == pytest.approx(2000)
    assert dict(steps)["decoder"] == pytest.approx(1250 - 2000)
    header, rows = text_table(result)
    assert all(len(r) == len(header) for r in rows) and "  probe" not in header and "peak RSS, MiB" in header


def test_the_token_layers_of_a_real_run(bench, request_):
    """K layers see n1 image tokens, the others n2: by hand from the report's counts."""
    spec = SideSpec("k", "star_edge", PruneConfig(72, 18, 2))
    samples, cache_bytes, _ = run_sides(bench, [STOCK, spec], request_, repeats=1, n_generate=2)
    row = summarise([STOCK, spec], samples, cache_bytes, bench.n_layers)["sides"][1]
    n, t = bench.n_layers, row["text_tokens"]
    assert row["decoder_ideal"] == pytest.approx(n * (144 + t) / (2 * (72 + t) + (n - 2) * (18 + t)))


# ---- idle hook and memory ----


def test_idle_hook_times_both_contexts(bench, request_):
    bench.ask(STOCK, request_, 1)
    result = time_idle_hook(bench, STOCK, UNPRUNED, 4)
    assert result["tokens"] == 4 and result["ratio"] == pytest.approx(
        result["hook_ms_per_token"] / result["stock_ms_per_token"]
    )
    assert bench.ask(UNPRUNED, request_, 2).n_cells == bench.ask(STOCK, request_, 2).n_cells  # requests go on as before


def test_memory_is_of_a_process_of_its_own(request_):
    used = memory.measure(str(refvlm.TEXT_MODEL), str(refvlm.MMPROJ), {"n_ctx": 512}, PRUNED, request_)
    assert used["peak_rss_bytes"] > 20e6 and set(used) == {"peak_rss_bytes", "device_bytes"}
    ballast = np.ones(2**27, np.uint8)  # 128 MiB here are not 128 MiB there
    again = memory.measure(str(refvlm.TEXT_MODEL), str(refvlm.MMPROJ), {"n_ctx": 512}, PRUNED, request_)
    assert memory.peak_rss() > len(ballast) and abs(again["peak_rss_bytes"] - used["peak_rss_bytes"]) < 2**26


# ---- which sides there are ----


def test_several_smaller_pictures():
    specs = make_specs([OFF], ("fewer",), (0.25, 0.1), 400)
    assert [(s.name, s.image_max_tokens, s.fewer) for s in specs[:2]] == [
        ("stock, 25% of the tokens", 100, 0),
        ("stock, 10% of the tokens", 40, 1),
    ]
    request = make_request([blocks(560, 280)], "", "what?", (0.25, 0.09))
    sizes = [load_image(m[0]["content"][0]["image_url"]["url"]).shape for m in (request.messages, *request.fewer)]
    assert sizes == [(280, 560, 3), (140, 280, 3), (84, 168, 3)]


def test_stock_with_the_converted_file_is_a_side(tmp_path, monkeypatch):
    """Else a table would count the type's gain as pruning's."""
    monkeypatch.setenv("STAR_EDGE_CACHE", str(tmp_path))
    request = make_request([load_image(refvlm.DEMO_IMAGE)], "", QUESTION, (0.25,))
    options = {"n_ctx": 512, "n_threads": 1, "mmproj_type": "bf16"}
    common = {"fewer": (0.25,), "repeats": 1, "n_generate": 2, "with_memory": False}
    files = refvlm.TEXT_MODEL, refvlm.MMPROJ
    result = run(*files, options, [FAST], ("flash", "converted"), request, **common)
    assert [row["name"] for row in result["sides"]] == ["stock, flash attn", "stock, converted mmproj", "fast"]
    assert result["reference"] == "stock, flash attn" and result["model"]["encoder_type"] == "bf16"
    del options["mmproj_type"]
    result = run(*files, options, [FAST], ("flash", "converted"), request, **common)
    assert [row["name"] for row in result["sides"]] == ["stock, flash attn", "fast"]


def test_specs():
    specs = make_specs([OFF, FAST], ("shipped", "flash", "fewer"), (0.25,), 144)
    assert [(s.kind, s.flash_attn, s.image_max_tokens) for s in specs[:3]] == [
        ("stock", False, None),
        ("stock", True, None),
        ("stock", True, 36),
    ]
    assert [(s.kind, s.prune) for s in specs[3:]] == [("star_edge", None), ("star_edge", PRESETS["fast"])]
