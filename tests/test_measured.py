"""What star-edge doctor --measure says: every setting is measured and named, and the model is as before. No time is
asserted.
"""

import json

import llama_cpp
import pytest
from click.testing import CliRunner

from star_edge import StarVLM, refvlm
from star_edge.benchmarking import encoder as measured
from star_edge.benchmarking.encoder import measure_encoder
from star_edge.benchmarking.threads import measure_tokens
from star_edge.cli import cli
from star_edge.errors import EngineError
from star_edge.llamacpp import devices

QUESTION = "what color is the star?"


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=3) as vlm:
        yield vlm


def test_settings_of_the_encoder(vlm, monkeypatch, tmp_path):
    monkeypatch.setenv("STAR_EDGE_CACHE", str(tmp_path))
    before = vlm.generate(QUESTION, refvlm.DEMO_IMAGE, None, max_tokens=4).text
    monkeypatch.setattr(measured, "fastest_type", lambda info: "f16")
    rows = measure_encoder(vlm)
    assert [(r["flash_attn"], r["type"], r["is_used"]) for r in rows] == [(True, "f16", True), (False, "f16", False)]
    assert all(r["milliseconds"] > 0 and r["n_tokens"] == 144 for r in rows)
    assert vlm.generate(QUESTION, refvlm.DEMO_IMAGE, None, max_tokens=4).text == before


def test_a_faster_type_is_measured_too(vlm, monkeypatch):
    asked = []
    monkeypatch.setattr(measured, "fastest_type", lambda info: "bf16")
    monkeypatch.setattr(measured, "_encode", lambda used, vlm, s: asked.append(s) or (s.mmproj_type, 144, len(asked)))
    rows = measure_encoder(vlm)
    assert [(s.flash_attn, s.mmproj_type) for s in asked[:3]] == [(True, "file"), (False, "file"), (True, "auto")]
    assert asked[3:] == asked[2::-1]  # every other round in reverse
    assert [row["milliseconds"] for row in rows] == [1000, 2000, 3000]  # the shortest of each


def test_tokens_by_threads(vlm):
    rows = measure_tokens(vlm)
    assert [(row["threads"], row["is_used"]) for row in rows] == [(3, True), (1, False)]
    assert llama_cpp.llama_n_threads(vlm.llama.ctx) == 3


def test_a_model_without_an_encoder():
    with StarVLM(refvlm.TEXT_MODEL, n_ctx=512, n_threads=1) as vlm:
        with pytest.raises(EngineError, match="no encoder"):
            measure_encoder(vlm)
        assert [row["threads"] for row in measure_tokens(vlm)] == [1]


def test_the_command(tmp_path):
    ran = CliRunner(env={"STAR_EDGE_CACHE": str(tmp_path)}).invoke(
        cli, ["doctor", "--no-check", "--measure", "-t", "1"]
    )
    assert "flash attention" in ran.stdout and "threads" in ran.stdout and "fastest" in ran.stdout
    ran = CliRunner().invoke(cli, ["doctor", "--no-check", "--json"])
    assert "measured" not in json.loads(ran.stdout) and "threads_wait" in json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "spinning"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "sleeping"),
        ({"OMP_WAIT_POLICY": "active"}, "spinning"),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}, "spinning"),  # libgomp: the count comes first
        ({"GOMP_SPINCOUNT": "0"}, "sleeping"),
    ],
)
def test_how_threads_wait(variables, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "cpu_features", lambda: "CPU : AVX2 = 1 | OPENMP = 1 | REPACK = 1 |")
    assert devices.openmp_waits() == expected
    monkeypatch.setattr(devices, "cpu_features", lambda: "CPU : NEON = 1 |")
    assert devices.openmp_waits() is None
