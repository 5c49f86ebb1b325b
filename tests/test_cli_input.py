"""The command line's own input: what it refuses and in which words, streams that are closed, and how it sums up a
batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import llama_cpp
import pytest

from star_edge import PRESETS, PruneConfig, refvlm
from star_edge.cli import batch as cli_batch
from star_edge.cli.options import check_picture_path
from star_edge.cli.tune import _check_target
from star_edge.errors import ConfigError
from star_edge.pruning.presets import override

IMAGE = str(refvlm.DEMO_IMAGE)
RUN = [sys.executable, "-c", "from star_edge.cli import main; main()"]


@pytest.fixture
def star_edge(star_edge_here):
    """Runs the command in this process; returns what it printed on stdout and stderr. A refusal is one line."""

    def run(*args, status=2):
        out, err = star_edge_here(*args, status=status)
        if status == 2:
            assert len(err.splitlines()) == 1 and err.startswith("error: "), err
        return out, err

    return run


# ---- words ----


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rnu", "hi"], ["'rnu'", "Did you mean run?", "(see star-edge --help)"]),
        (["zzz"], ["'zzz'", "doctor", "(see star-edge --help)"]),
        (["run", "hi", "--nope"], ["--nope", "(see star-edge run --help)"]),
        (["eval", "--metric", "bleu"], ["bleu", "(see star-edge eval --help)"]),
        (["bench", "--image-size", "x"], ["'x' is not a size", "(see star-edge bench --help)"]),
        (["doctor", "--image-size", "1x"], ["'1x' is not a size", "(see star-edge doctor --help)"]),
        (["run", "hi", "--image", IMAGE, "--vision-keep", "0"], ["--vision-keep 0 keeps nothing"]),
        (
            ["run", "hi", "--image", IMAGE, "--vision-keep", "0.1", "--decoder-keep", "0.5"],
            ["--decoder-keep 0.5", "--vision-keep 0.1"],
        ),
        (["run", "hi", "--image", IMAGE, "--decoder-layer", "99"], ["--decoder-layer 99"]),
        (
            ["run", "hi", "--image", IMAGE, "--vision-keep", "5000"],
            ["--vision-keep 5000 is over the image's 144 tokens"],
        ),
        (["demo", "--vision-keep", "5000"], ["--vision-keep 5000"]),
        (["inspect", "hi", "--image", IMAGE, "--vision-keep", "5000"], ["--vision-keep 5000"]),
        (["run", "hi", "-c", "1"], ["--ctx-size 1"]),
        (
            ["run", "hi", "-ctv", "q8_0", "-no-fa"],
            ["--cache-type-v 'q8_0' needs flash attention", "use --flash-attn or"],
        ),
        (["run", "hi", "--preset", "pyramiddrop", "--decoder-layer", "2"], ["--decoder-layer 2", "--decoder-keep"]),
        (["run", "hi", "--image", IMAGE, "--overlay", "o.xyz"], ["o.xyz", ".png"]),
        (["run", "hi", "--image", IMAGE, "--overlay", ""], ["--overlay", "empty"]),
        (["run", "hi", "-t", "0"], ["--threads", "0"]),
        (["run", "hi", "-t", "100000"], ["--threads", "512"]),
        (["run", "hi", "-ub", "0"], ["--ubatch-size"]),
        (["run", "hi", "-c", str(2**40)], ["--ctx-size"]),
        (["run", "hi", "--temp", "nan"], ["--temp", "nan"]),
        (["run", "hi", "--temp", "inf"], ["--temp", "inf"]),
        (["run", "hi", "--seed", "-1"], ["--seed", "-1"]),
        (["run", "hi", "--image", IMAGE, "--no-cache"], ["--no-cache", "--each"]),
        (["run", "hi", "--image", IMAGE, "--each", "--budget", "prompt"], ["--budget prompt", "--each"]),
        (["eval", "q.jsonl", "--vision-keep", "1,0.5"], ["--vision-keep 1,0.5", "1.0"]),
        (["eval", "q.jsonl", "--vision-keep", "1" * 5000], ["--vision-keep '111"]),
        (
            ["eval", "q.jsonl", "--vision-keep", "0.1", "--decoder-keep", "0.5"],
            ["--decoder-keep 0.5", "--vision-keep 0.1"],
        ),
        (["run", "hi", "--preset", "mine.json"], ["vision_keep=2.0"]),  # the file's words are its own
    ],
    ids=lambda value: " ".join(value)[:40].replace("/", "_") if isinstance(value, list) else "",
)
def test_errors_say_what_was_typed(star_edge, tmp_path, args, words):
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": IMAGE, "question": "?"}) + "\n")
    (tmp_path / "mine.json").write_text('{"config": {"vision_keep": 2.0}}')
    _, err = star_edge(*args)
    assert all(word in err for word in words), err


@pytest.mark.parametrize("n", ["10", "-1"])
def test_layers_for_a_gpu_need_one(star_edge, monkeypatch, n):
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    for command in (["run", "hi"], ["serve"], ["bench"], ["doctor"]):
        _, err = star_edge(*command, "-ngl", n)
        assert "--gpu-layers" in err and "no GPU" in err
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    _, err = star_edge("run", "hi", "-ngl", n, "-m", "nope.gguf")
    assert "nope.gguf" in err


def test_a_count_of_one_says_so(star_edge):
    """1 is one token, as documented; whoever meant 1.0 is told."""
    _, err = star_edge(
        "run", "what color is the triangle?", "--image", IMAGE, "--vision-keep", "1", "-n", "2", status=0
    )
    assert "144 -> 1" in err and "note: --vision-keep 1 keeps one token of each image (1.0 keeps all)" in err
    _, err = star_edge(
        "run", "what color is the triangle?", "--image", IMAGE, "--vision-keep", "1.0", "-n", "2", status=0
    )
    assert "144 -> 144" in err and "note" not in err
    out, _ = star_edge("run", "--help", status=0)
    assert "1 keeps one token" in " ".join(out.split())


# ---- overrides ----

PLAIN = replace(PRESETS["balanced"], decoder_keep=1.0, vision_tolerance=None)


def test_an_override_does_not_collide_with_the_encoder_stage():
    early = PruneConfig(0.4, 0.2, encoder_keep=0.5, encoder_layer=2)
    assert override(early, vision_keep=0.45) == replace(early, vision_keep=0.45)
    assert override(early, vision_keep=0.6) == replace(early, vision_keep=0.6, encoder_keep=1.0, encoder_layer=None)
    assert override(early, encoder_keep=0.3) == replace(early, encoder_keep=0.3, vision_keep=1.0)
    assert override(early, encoder_keep=0.1) == replace(early, encoder_keep=0.1, vision_keep=1.0, decoder_keep=1.0)
    assert override(None, encoder_keep=10).encoder_keep == 10
    with pytest.raises(ConfigError, match="encoder_keep=0.5"):
        override(PRESETS["balanced"], encoder_keep=0.5, vision_keep=0.75)
    assert override(PRESETS["fast"], redundancy=0.0).redundancy == "exact"


def test_an_override_does_not_collide_with_the_preset():
    """A stage of the preset that contradicts what is given is left out; whatever else it says stays."""
    assert override(PRESETS["balanced"], vision_keep=0.1) == replace(PLAIN, vision_keep=0.1)
    assert override(PRESETS["balanced"], vision_keep=0.2) == replace(
        PRESETS["balanced"], vision_keep=0.2, vision_tolerance=None
    )  # 0.15 still fits
    assert override(PRESETS["balanced"], decoder_keep=0.5) == replace(
        PRESETS["balanced"], vision_keep=1.0, decoder_keep=0.5, vision_tolerance=None
    )
    assert override(PRESETS["fastv"], vision_keep=0.2).prunes_in_decoder is False
    drop = PRESETS["pyramiddrop"]
    assert override(drop, vision_keep=0.3).windows == drop.windows[1:]
    assert override(drop, vision_keep=0.1) == replace(drop, vision_keep=0.1, windows=())
    assert override(drop, decoder_keep=0.25) == replace(drop, windows=(), decoder_keep=0.25)
    assert override(PruneConfig(50, 20), vision_keep=10) == PruneConfig(10)
    for changes in ({"vision_keep": 0.1, "decoder_keep": 0.2}, {"vision_keep": 0.0}, {"decoder_keep": 2.0}):
        with pytest.raises(ConfigError):
            override(PRESETS["balanced"], **changes)


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config is not None])
@pytest.mark.parametrize("keep", [1, 20, 0.01, 0.1, 0.3, 0.6, 1.0])
def test_every_preset_takes_every_override(name, keep):
    assert override(PRESETS[name], vision_keep=keep).vision_keep == keep
    assert override(PRESETS[name], decoder_keep=keep).decoder_keep == keep


# ---- streams ----


def test_closed_streams(tmp_path):
    """A result that cannot be printed is an error, and no file gets the number of a closed stream."""
    command = " ".join(
        f"'{part}'" for part in [*RUN, "run", "what color is the triangle?", "--image", IMAGE, "-n", "2"]
    )
    shell = lambda redirect: subprocess.run(
        f"{command} {redirect}", shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    done = shell(">&-")
    assert done.returncode == 2 and "error: output cannot be written" in done.stderr and "Traceback" not in done.stderr
    done = shell("2>&- <&-")
    assert done.returncode == 0 and done.stdout.strip() == "red"


def test_a_prompt_that_is_no_text(tmp_path):
    done = subprocess.run([*RUN, "run"], cwd=tmp_path, capture_output=True, input=b"\xff\xfe", timeout=600)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


def test_characters_that_a_terminal_lacks(tmp_path):
    code = "import sys; from star_edge import cli; cli._open_standard_streams(); print('\\u00e9'); sys.stdout.flush()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii"}, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip() == b"\\xe9"


# ---- a batch's summary ----


def test_a_batch_says_why_requests_failed(capsys):
    progress = cli_batch._Progress(8, 0, shown=False)
    results = [{"id": i, "image": f"a/{i}.png", "error": f"/x/a/{i}.png is not an image: use PNG"} for i in range(3)]
    results += [{"id": 9, "images": ["b.png", "c.png"], "error": "c.png is gone"}, {"id": 10, "text": "yes"}]
    results += [{"id": 11, "error": f"cause {kind}"} for kind in "abc"]
    for result in results:
        progress.step(result)
    progress.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "1 answered, 7 failed",
        "failed (3): /x/a/0.png is not an image: use PNG (the first of them)",
        "failed (1): c.png is gone",
        "failed (1): cause a",
        "failed (2): for 2 other reasons, see the results",
    ]


def test_a_batch_without_a_cache_gives_nobody_a_start(star_edge, tmp_path):
    """Two tasks about one picture: by default the second finds it encoded, and says so; with --no-cache neither
    does.
    """
    lines = [
        {"id": name, "image": IMAGE, "prompt": "what color is the triangle?", "preset": name}
        for name in ("fast", "off")
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for option, cached in (([], [0, 1]), (["--no-cache"], [0, 0])):
        out, _ = star_edge("run", "--tasks", "t.jsonl", "-n", "2", *option, status=0)
        assert [json.loads(line)["cached_images"] for line in out.splitlines()] == cached
        assert not option or [json.loads(line)["reused_tokens"] for line in out.splitlines()] == [0, 0]


# ---- import ----


def test_the_hub_is_there_when_it_is_named():
    """As docs/hub.md has it, in a process that has imported nothing else; and not before."""
    code = (
        "import sys, star_edge; assert 'star_edge.io.hub' not in sys.modules; assert callable(star_edge.hub.fetch); "
        "assert star_edge.refvlm.TEXT_MODEL.exists(); assert not hasattr(star_edge, 'nope')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_neither_side_always_follows_the_other(monkeypatch, star_edge):
    """The demo asks stock and pruned in turn, and in the other order the next time."""
    asked = []

    class Engine(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def generate(self, question, image, prune, max_tokens):
            asked.append("stock" if prune is None else "pruned")
            report = SimpleNamespace(
                milliseconds={"first_token": 1.0}, average_tokens=1.0, n_kv_cells=1, token_layer_ratio=1.0
            )
            return SimpleNamespace(text="x", report=report)

    monkeypatch.setattr("star_edge.cli.demo.load_engine", lambda *args, **options: Engine(image_limits=None))
    monkeypatch.setattr("star_edge.cli.demo.save_overlay", lambda *args: ([], []))
    star_edge("demo", "--repeats", "2", "--json", status=0)
    assert asked[:6] == ["stock", "pruned", "pruned", "stock", "stock", "pruned"]


def test_where_results_go_is_looked_at_first(monkeypatch, tmp_path):
    """A search takes hours: a folder that cannot be written is told before it."""
    checks = ((_check_target, "a.json"), (check_picture_path, "a.png"))
    for check, name in checks:
        check(str(tmp_path / name))
        with pytest.raises(ConfigError, match="there is no such folder"):
            check(str(tmp_path / "no" / name))
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
    (tmp_path / "a.png").write_bytes(b"")  # it is the file that would be written again
    for check, name in checks:
        with pytest.raises(ConfigError, match="no permission to write there"):
            check(str(tmp_path / name))
    assert asked == [str(tmp_path), str(tmp_path / "a.png")]
