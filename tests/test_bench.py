"""star-edge bench: sides that are what they say, times that add up, ratios against hand-computed ones. No time is
asserted.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from helpers.synthetic_shapes import tiny
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

from star_edge import StarVLM, refvlm
from star_edge.benchmarking import memory
from star_edge.benchmarking.measure import order, run_sides, time_idle_hook
from star_edge.benchmarking.plots import waterfall
from star_edge.benchmarking.run import make_request, make_specs, run, shape_context, shape_request
from star_edge.benchmarking.sides import STAGES, Sample, SideSpec, Workbench, stages_of
from star_edge.benchmarking.summary import summarise, text_table
from star_edge.cli import cli
from star_edge.errors import ConfigError, ContextLengthError, EvaluationError, ModelFileError, OutputError
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.io.images import load_image
from star_edge.pruning.config import PRESETS, PruneConfig
from star_edge.report import PruneReport
from star_edge.synthetic import PICTURES, SHAPES, ModelShape, model_files
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


# ---- synthetic shapes ----


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_run(name, tmp_path):
    """Each shape's graphs at a tiny size: stock and pruned answer, and the picture has the tokens that arithmetic
    says.
    """
    shape = tiny(name)
    with model_files(shape, tmp_path) as files:
        request = shape_request(shape, (0.25,))
        result = run(
            *files,
            {"n_ctx": shape_context(shape, 3)},
            [OFF, replace(FAST, prune=replace(PRESETS["fast"], vision_tolerance=None, encoder_tolerance=None))],
            ("flash", "fewer"),
            request,
            fewer=(0.25,),
            repeats=1,
            n_generate=3,
            with_memory=False,
        )
        written = sorted(p.name for p in tmp_path.iterdir())
        with model_files(shape, tmp_path):  # found again
            assert sorted(p.name for p in tmp_path.iterdir()) == written and len(written) == 2
    sides = {row["name"]: row for row in result["sides"]}
    stock, fast = sides["stock, flash attn"], sides["fast"]
    assert stock["image_tokens"] == fast["image_tokens"] == shape.n_image_tokens
    # 35 + 40 and what the encoder puts around: two tokens, or three and one around the overview, two before each tile,
    # one between rows
    extra = {
        "qwen2-vl-2b": 2,
        "qwen2.5-vl-3b": 2,
        "qwen3-vl-4b": 2,
        "qwen3.5-4b": 2,
        "qwen3.5-0.8b": 2,
        "gemma-3-4b": 2,
        "smolvlm-500m": 4 + 4 * 2 + 1,
    }.get(name, 0)
    assert stock["text_tokens"] == fast["text_tokens"] == 75 + extra
    assert (
        fast["average_tokens"] < stock["average_tokens"]
        and fast["kv_cells"] < stock["kv_cells"]
        and fast["kv_bytes"] < stock["kv_bytes"]
    )
    if name in (
        "qwen2-vl-2b",
        "qwen2.5-vl-3b",
        "qwen3-vl-4b",
        "qwen3.5-4b",
        "qwen3.5-0.8b",
        "llava-next-7b",
    ):  # dynamic resolution, and crops: a smaller picture has fewer tokens
        assert sides["stock, fewer tokens"]["image_tokens"] < shape.n_image_tokens
    elif name != "smolvlm-500m":
        assert "stock, fewer tokens" not in sides and any("smaller picture" in note for note in result["notes"])
    has_profile = result["model"]["vision_stage"] == "yes"
    assert has_profile == (fast["vision_kept"] < shape.n_image_tokens)
    assert has_profile or any("no vision stage" in note for note in fast["notes"])
    least = {"smolvlm-500m": 5, "gemma-3-4b": 1}.get(name, 0)  # one token of each image, which is all that so few leave
    assert fast["decoder_kept"] < fast["vision_kept"] or fast["decoder_kept"] == least
    assert fast["decoder_layer"] == 4


@pytest.mark.parametrize(
    "name, n_parameters",
    [
        ("llava-1.1b", 1.10e9),
        ("llava-1.5-7b", 6.74e9),
        ("smolvlm-500m", 362e6),
        ("qwen2-vl-2b", 1.54e9),
        ("qwen2.5-vl-3b", 3.09e9),
        ("qwen3-vl-4b", 4.02e9),
        ("gemma-3-4b", 3.88e9),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, n_parameters):
    """Of the text model, in billions: TinyLlama 1.10, Vicuna-7B 6.74, SmolLM2-360M 0.362, Qwen2.5-3B 3.09,
    Qwen3-4B 4.02, Gemma 3 4B 3.88.
    """
    d = SHAPES[name].decoder
    q, kv = d.n_heads * d.d_head, d.n_heads_kv * d.d_head
    layer = 2 * d.n_embd * q + 2 * d.n_embd * kv + 3 * d.n_embd * d.n_ff
    assert d.n_layers * layer + (1 if d.tied else 2) * d.n_vocab * d.n_embd == pytest.approx(n_parameters, rel=0.01)


def test_temporary_files_go_away_and_half_written_ones_do_not_stay(tmp_path, monkeypatch):
    shape = tiny("llava-1.5-7b")
    with model_files(shape) as files:
        assert all(f.exists() for f in files)
    assert not any(f.exists() or f.parent.exists() for f in files)

    def fail(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("star_edge.synthetic.store.write_encoder", fail)
    with (
        pytest.raises(ConfigError, match="No space left.*GiB are free.*more room"),
        model_files(shape, tmp_path / "new"),
    ):
        pass
    assert [p.name[:11] for p in (tmp_path / "new").iterdir()] == ["random-text"]
    small = ModelShape(shape.decoder, shape.encoder, "f16", (9, 9), 1, "")
    with pytest.raises(ConfigError, match="cannot be written"), model_files(small, refvlm.TEXT_MODEL):
        pass


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


# ---- the command ----

SIDE_KEYS = {
    "name",
    "kind",
    "config",
    "text_tokens",
    "image_tokens",
    "encoder_entered",
    "encoder_kept",
    "encoder_layer",
    "vision_kept",
    "decoder_kept",
    "decoder_layer",
    "average_tokens",
    "first_token_ms",
    "stages_ms",
    "tokens_per_s",
    "decoder_ms",
    "speed_up",
    "ideal",
    "decoder_speed_up",
    "decoder_ideal",
    "of_ideal",
    "selection_share",
    "kv_cells",
    "kv_bytes",
    "n_ctx_needed",
    "kv_bytes_needed",
    "peak_rss_bytes",
    "device_bytes",
    "notes",
}


def star_edge(*args):
    return cli.main(["bench", *map(str, args)], standalone_mode=False)


def test_command(tmp_path, capsys):
    """The reference model without files: table, JSON, picture."""
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    common = ("-r", 2, "-n", 3, "--preset", "fast", "--decoder-keep", "0.25", "--baseline", "flash")
    star_edge(*common, "--out", out, "--plot", plot, "--idle-hook", 4)
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    names = [row["name"] for row in result["sides"]]
    assert names == ["stock, flash attn", "star_edge, unpruned", "fast", "decoder 0.25"]
    assert "peak RSS" in printed and "ideal" in printed and "idle hook" in printed
    svg = plot.read_text()
    assert "waterfall" not in svg and "decoder 0.25" in svg and "encode" in svg
    assert {
        "title",
        "date",
        "versions",
        "machine",
        "model",
        "repeats",
        "generated_tokens",
        "reference",
        "n_layers",
        "sides",
        "idle_hook",
        "notes",
    } <= set(result)
    assert result["repeats"] == 2 and result["generated_tokens"] == 3 and result["command"].startswith("star-edge")
    for row in result["sides"]:
        assert set(row) == SIDE_KEYS and tuple(row["stages_ms"]) == STAGES
        assert len(row["first_token_ms"]["all"]) == 2 and row["peak_rss_bytes"] > 0
        assert sum(row["stages_ms"].values()) == pytest.approx(row["first_token_ms"]["median"])
    star_edge(*common, "--json", "--no-memory", "--no-unpruned")
    again = json.loads(capsys.readouterr().out)
    assert set(again) == set(result) and [row["name"] for row in again["sides"]] == [
        "stock, flash attn",
        "fast",
        "decoder 0.25",
    ]


def test_command_on_a_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", tiny("llava-1.5-7b"))
    args = (
        "--shape",
        "llava-1.5-7b",
        "--folder",
        tmp_path / "models",
        "-r",
        1,
        "-n",
        2,
        "--preset",
        "fast",
        "--baseline",
        "none",
    )
    star_edge(*args, "--no-memory", "--json")
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["sides"]] == ["star_edge, unpruned", "fast"] and result[
        "reference"
    ] == "star_edge, unpruned"
    assert (
        result["shape"] == "llava-1.5-7b"
        and result["model"]["n_ctx"] == 256
        and len(list((tmp_path / "models").iterdir())) == 2
    )


def test_a_link_is_written_through(tmp_path, monkeypatch):
    """As /dev/stdout is one: once, in place, while a file is replaced after each repeat."""
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    target.write_text("old")
    link.symlink_to(target)
    writes, write_text = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, text: writes.append(self.name) or write_text(self, text))
    common = ("-r", 2, "-n", 2, "--preset", "fast", "--baseline", "none", "--no-memory", "--no-unpruned", "--out")
    star_edge(*common, link)
    assert link.is_symlink() and json.loads(target.read_text())["repeats"] == 2 and writes == ["link.json"]
    star_edge(*common, target)
    assert writes[1:] == ["target.json.part"] * 3 and sorted(p.name for p in tmp_path.iterdir()) == [
        "link.json",
        "target.json",
    ]


def test_a_killed_command_keeps_its_finished_repeats(tmp_path):
    """And says in a log how far it is."""
    code = "import sys; from star_edge.cli import main; main()"
    args = [
        "bench",
        "--preset",
        "fast",
        "--baseline",
        "flash",
        "--no-memory",
        "-r",
        "100000",
        "-n",
        "2",
        "--out",
        str(tmp_path / "r.json"),
    ]
    started = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True)
    try:
        lines = [started.stderr.readline().strip() for _ in range(3 + 3 * 3)]
    finally:
        started.kill()
    assert lines[0] == "1 of 300003: warm-up" and lines[-1] == "12 of 300003: measuring"
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["repeats"] >= 2 and all(
        len(row["first_token_ms"]["all"]) == result["repeats"] for row in result["sides"]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_leaves_no_model(number, tmp_path):
    """At a real size, so that there is time to be killed in."""
    code = "import sys; from star_edge.cli import main; main()"
    args = ["bench", "--shape", "llava-1.1b", "--preset", "fast", "--baseline", "none", "--no-memory"]
    started = subprocess.Popen(
        [sys.executable, "-c", code, *args], env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL
    )
    try:
        while not list(
            tmp_path.glob("star-edge-bench-*/random-text-*")
        ):  # it is being written, or the mmproj, or loaded
            assert started.poll() is None
            time.sleep(0.05)
        started.send_signal(number)
        assert started.wait(300) == -number
    finally:
        started.kill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, error, words",
    [
        (("--shape", "gemma-3-4b", "--image", "a.png"), ConfigError, "--image cannot be used with --shape"),
        (("--folder", "x"), ConfigError, "--shape NAME"),
        (("--image", str(refvlm.DEMO_IMAGE), "--image-size", "9x9"), ConfigError, "leave out one"),
        (("--baseline", "none", "--baseline", "flash"), ConfigError, "excludes other"),
        (("--preset", "off", "--no-unpruned"), ConfigError, "--no-unpruned"),
        (("-m", str(refvlm.TEXT_MODEL)), ConfigError, "--mmproj"),
        (("-m", "nowhere.gguf", "--mmproj", str(refvlm.MMPROJ)), ModelFileError, "nowhere.gguf"),
        (("--prompt", "a <__media__>"), ConfigError, "leave it out"),
        (("--preset", "nosuch"), ConfigError, "preset"),
        (("--baseline", "converted"), ConfigError, "add --mmproj-type"),
        (("--picture", "page", "--image", "a.png"), ConfigError, "--picture is for a generated picture"),
        (("--plot", "a.gif"), EvaluationError, "endings"),
        (("--out", "nosuch/a.json"), OutputError, "folder"),
        (("-c", "32", "--preset", "fast"), ContextLengthError, "--ctx-size"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_wrong_inputs(args, error, words):
    with pytest.raises(error, match=words):
        star_edge(*args)


def test_several_smaller_pictures():
    specs = make_specs([OFF], ("fewer",), (0.25, 0.1), 400)
    assert [(s.name, s.image_max_tokens, s.fewer) for s in specs[:2]] == [
        ("stock, 25% of the tokens", 100, 0),
        ("stock, 10% of the tokens", 40, 1),
    ]
    request = make_request([blocks(560, 280)], "", "what?", (0.25, 0.09))
    sizes = [load_image(m[0]["content"][0]["image_url"]["url"]).shape for m in (request.messages, *request.fewer)]
    assert sizes == [(280, 560, 3), (140, 280, 3), (84, 168, 3)]


@pytest.mark.parametrize(("kind", "low", "high"), [("photo", 1, 1), ("page", 0.5, 0.65), ("screenshot", 0.4, 0.6)])
def test_pictures_are_as_redundant_as_such_pictures_are(kind, low, high):
    """Squares of 28 pixels that are no copy of their left or upper neighbour. Of 40 rendered pages it was 0.52."""
    assert all(f(*size).shape == (size[1], size[0], 3) for f in PICTURES.values() for size in ((1, 1), (300, 7)))
    pixels = PICTURES[kind](896, 896)
    assert np.array_equal(pixels, PICTURES[kind](896, 896))
    squares = pixels.reshape(32, 28, 32, 28, 3).swapaxes(1, 2).reshape(32, 32, -1)
    alike = np.zeros((32, 32), bool)
    alike[:, 1:] |= (squares[:, 1:] == squares[:, :-1]).all(axis=-1)
    alike[1:] |= (squares[1:] == squares[:-1]).all(axis=-1)
    assert low <= 1 - alike.mean() <= high


def test_encoder_stages_are_in_the_table(tmp_path):
    """A page on a Qwen2.5-VL: tokens are left out before the encoder, and within it. Stock has smaller pictures too."""
    shape = replace(tiny("qwen2.5-vl-3b"), picture=(448, 448), n_image_tokens=256)
    configs = [
        NamedConfig("redundancy", "redundancy", PruneConfig(0.5, 0.25, redundancy="exact")),
        NamedConfig("encoder", "encoder", PruneConfig(0.25, 0.125, encoder_keep=0.25, encoder_layer=1)),
    ]
    with model_files(shape, tmp_path) as files:
        result = run(
            *files,
            {"n_ctx": shape_context(shape, 2), "n_threads": 1},
            configs,
            ("flash", "fewer"),
            shape_request(shape, (0.25, 0.1), "page"),
            fewer=(0.25, 0.1),
            repeats=1,
            n_generate=2,
            with_memory=False,
        )
    sides = {row["name"]: row for row in result["sides"]}
    assert list(sides)[1:3] == ["stock, 25% of the tokens", "stock, 10% of the tokens"]
    assert 256 > sides["stock, 25% of the tokens"]["image_tokens"] > sides["stock, 10% of the tokens"]["image_tokens"]
    assert sides["redundancy"]["encoder_entered"] < 256 == sides["encoder"]["encoder_entered"]
    assert sides["redundancy"]["stages_ms"]["redundancy"] > 0 == sides["encoder"]["stages_ms"]["redundancy"]
    assert sides["encoder"]["encoder_kept"] == 64 and sides["encoder"]["stages_ms"]["encoder_stage"] > 0
    header, rows = text_table(result)
    assert "tokens into the encoder" in header and "  redundancy" in header and "  encoder stage" in header
    assert all(len(row) == len(header) for row in rows)


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


_tables = importlib.util.spec_from_file_location("tables", Path(__file__).parent.parent / "benchmarks" / "tables.py")
TABLES = importlib.util.module_from_spec(_tables)
_tables.loader.exec_module(TABLES)


# The configs of LLaVA shapes are counts, and more than the tiny ones have
@pytest.mark.parametrize("name", [name for name in TABLES.RUNS if not name.startswith("llava")])
def test_commands_of_the_published_tables(name, tmp_path, monkeypatch, capsys):
    """Each at a tiny size, asked once. Stock with a smaller picture is a side, or a note says why not."""
    monkeypatch.chdir(TABLES.ROOT)
    monkeypatch.setenv("STAR_EDGE_CACHE", str(tmp_path))
    args = TABLES.RUNS[name][0].split()
    shape = args[args.index("--shape") + 1]
    small = tiny(shape)  # with a larger picture: a tenth of its tokens are more than the least that an encoder takes
    small = replace(small, picture=(2 * small.picture[0], 2 * small.picture[1]))
    monkeypatch.setitem(SHAPES, shape, small)
    quick = ("--repeats", 1, "-n", 2, "--idle-hook", 0, "--no-memory", "-t", 1, "-c", 640, "--out", tmp_path / "r.json")
    star_edge(*args, *quick, "--json")
    result = json.loads(capsys.readouterr().out)
    left_out = [note for note in result["notes"] if "left out" in note and "smaller picture" not in note]
    assert left_out == []
    smaller = [row for row in result["sides"] if row["name"].startswith("stock,") and "tokens" in row["name"]]
    assert smaller or any("smaller picture" in note for note in result["notes"])
    TABLES.section(name, json.loads((tmp_path / "r.json").read_text()))
