"""The command line, in processes of its own: output, JSON, files written, and errors of one line with exit status 2."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.presets import kept
from PIL import Image

from star_edge import refvlm
from star_edge.cli import COMMANDS

IMAGE = str(refvlm.DEMO_IMAGE)


def test_help(star_edge):
    text = star_edge("--help").stdout
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        assert command == "completion" or "--json" in star_edge(command, "--help").stdout
    assert "0.1.0" in star_edge("--version").stdout


def test_run(star_edge, tmp_path):
    done = star_edge("run", "what color is the triangle?", "--image", IMAGE, "--overlay", "o.png")
    assert done.stdout.strip() == "red"
    assert f"144 -> {kept('balanced').vision} -> {kept('balanced').decoder} from layer 4" in done.stderr
    picture = Image.open(tmp_path / "o.png")
    assert picture.width > 3 * 336 and picture.height > 336


def test_run_reads_stdin_and_prints_json(star_edge, tmp_path):
    done = star_edge(
        "run",
        "--image",
        IMAGE,
        "--json",
        "--vision-keep",
        "36",
        "--decoder-keep",
        "9",
        "--decoder-layer",
        "3",
        stdin="what digit is green?\n",
    )
    data = json.loads(done.stdout)
    assert (
        data["report"]["n_vision_kept"] == 36
        and data["report"]["n_decoder_kept"] == 9
        and data["report"]["decoder_layer"] == 3
    )
    assert data["report"]["average_tokens"] == 22.5
    assert data["text"].strip() == "2"


def test_run_without_an_image(star_edge):
    assert star_edge("run", "is there a red star?", "-n", "4").stdout.strip()


def test_run_preset_off(star_edge):
    data = json.loads(star_edge("run", "what number is shown?", "--image", IMAGE, "--preset", "off", "--json").stdout)
    assert data["report"]["config"] is None and data["report"]["n_kv_cells"] == 152 and data["text"].strip() == "0 7"


def test_demo(star_edge, tmp_path):
    done = star_edge("demo", "--repeats", "1")
    assert "stock 7 of 7" in done.stdout and (tmp_path / "star-edge-demo.png").exists()
    data = json.loads(star_edge("demo", "--repeats", "2", "--json", "--overlay", "x.png").stdout)
    assert data["n_right"]["stock"] == 7 and len(data["questions"]) == 7
    assert (
        data["questions"][0]["stock"]["kv_cells"] == 153
        and data["questions"][0]["pruned"]["kv_cells"] == 9 + kept("balanced").decoder
    )
    assert data["questions"][0]["pruned"]["first_token_ms"] > 0 and data["token_layer_ratio"] > 3
    assert (tmp_path / "x.png").exists()


def test_inspect(star_edge, tmp_path):
    done = star_edge(
        "inspect",
        "how many stars?",
        "--image",
        IMAGE,
        "-L",
        "1",
        "-L",
        "2",
        "-E",
        "0",
        "-o",
        "a.npz",
        "--picture",
        "p.png",
        "--overlay",
        "k.png",
        "--json",
    )
    data = json.loads(done.stdout)
    assert data["written"] == ["a.npz", "p.png", "k.png"]
    arrays = np.load(tmp_path / "a.npz")
    n = data["n_tokens"]
    assert len(arrays["tokens"]) == n
    assert arrays["decoder_1"].shape == (8, n, n) and arrays["encoder_image_0_layer_0"].shape == (4, 145, 145)
    assert np.allclose(arrays["decoder_2"].sum(axis=-1), 1, atol=1e-4)
    assert (
        len(arrays["kept_vision_0"]) == kept("balanced").vision
        and len(arrays["kept_decoder_0"]) == kept("balanced").decoder
    )
    assert np.allclose(arrays["scores_decoder_0"][:5] >= 0, True) and (arrays["image_of_token"] == 0).sum() == 144
    for name in ("p.png", "k.png"):
        assert Image.open(tmp_path / name).width > 600


def test_inspect_a_text_model(star_edge, tmp_path):
    star_edge("inspect", "is there a red star?", "-o", "t.npz", "--picture", "t.png", "--mean-heads")
    attention = np.load(tmp_path / "t.npz")["decoder_3"]
    assert attention.ndim == 2 and np.allclose(np.triu(attention, 1), 0)
    assert Image.open(tmp_path / "t.png").height > 300


def test_doctor(star_edge):
    data = json.loads(star_edge("doctor", "--json").stdout)
    assert data["versions"]["llama-cpp-python"] == data["versions"]["compiled against llama-cpp-python"]
    assert any(d["name"] == "CPU" for d in data["devices"])
    assert data["model"]["vision_stage"] == data["model"]["decoder_stage"] == "yes"
    assert data["model"]["redundancy"].startswith("no: ") and data["model"]["encoder_stage"].startswith("no: ")
    assert data["model"]["encoder_repairs"] == []  # it was trained on what stock llama.cpp computes
    assert data["plan"]["presets"]["balanced"] == {
        "vision_kept": kept("balanced").vision,
        "windows": [[4, kept("balanced").decoder]],
        "average_tokens": kept("balanced").average,
        "at_least": True,
    }
    assert data["check"] == {"done": True, "layer": 4, "max_logit_difference": 0.0, "same_token": True}
    text = star_edge("doctor", "--no-check").stdout
    assert "balanced" in text and "mlp" in text


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.8, 1.5])
def test_ctrl_c(tmp_path, delay):
    """A real SIGINT, while loading or asking, ends the command at once and quietly."""
    code = "from star_edge.cli import main; print('ready', flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--repeats", "500"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in stderr


def test_bare_command_and_odd_text(star_edge):
    assert "Commands:" in star_edge(status=2).stdout
    assert "surrogates" in star_edge("run", "a\udcffb", status=2).stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "hi", "--image", "nope.png"], ["nope.png"]),
        (["run", "hi", "--preset", "zzz"], ["zzz", "balanced"]),
        (["run", "hi", "--image", IMAGE, "--vision-keep", "0"], ["--vision-keep 0"]),
        (["run", "hi", "--image", IMAGE, "--vision-keep", "nan"], ["--vision-keep nan"]),
        (["run", "hi", "--image", IMAGE, "--decoder-layer", "6"], ["1..5"]),
        (["run", "hi", "-m", "/nope.gguf"], ["/nope.gguf"]),
        (["run", "hi", "--mmproj", "x.gguf"], ["-m"]),
        (["run", "hi", "--image", IMAGE, "--image", IMAGE, "-c", "256", "--preset", "off"], ["256", "--ctx-size"]),
        (["run", "hi", "--image", IMAGE, "-ctv", "q8_0", "-no-fa"], ["flash attention"]),
        (["run"], ["prompt"]),
        (["run", "hi", "--overlay", "o.png"], ["--image"]),
        (["run", "hi", "--image", IMAGE, "--overlay", "no/such/folder/o.png"], ["no/such/folder"]),
        (["run", "hi", "--image", IMAGE, "--overlay", "o.xyz"], ["o.xyz"]),
        (["inspect", "hi", "-L", "9"], ["0..5"]),
        (["inspect", "hi", "-o", "a.txt"], [".npz"]),
        (["inspect", "hi", "-o", "no/such/a.npz"], ["no/such"]),
        (["doctor", "--image-size", "big"], ["672x672"]),
        (["demo", "--vision-keep", "abc"], ["abc"]),
        (["zzz"], ["zzz"]),
        (["run", "--nope"], ["--nope"]),
    ],
    ids=lambda value: " ".join(value)[:40].replace("/", "_") if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_status_2(star_edge, args, words):
    done = star_edge(*args, status=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]
