"""star-edge bench as a command: its files, how it is killed, wrong inputs, and the commands of the published tables."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.synthetic_shapes import tiny

from star_edge import refvlm
from star_edge.benchmarking.sides import STAGES
from star_edge.cli import cli
from star_edge.errors import ConfigError, ContextLengthError, EvaluationError, ModelFileError, OutputError
from star_edge.synthetic import SHAPES

_tables = importlib.util.spec_from_file_location("tables", Path(__file__).parent.parent / "benchmarks" / "tables.py")
TABLES = importlib.util.module_from_spec(_tables)
_tables.loader.exec_module(TABLES)

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
