"""The targets of `make fuzz`, a few cases each, always the same."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz" / "run.py"
sys.path.insert(0, str(RUN.parent))

import forking  # noqa: E402
from gguf_mutations import mutate, parse  # noqa: E402

FIXTURE = Path(__file__).parent / "fixtures" / "llava" / "mmproj.gguf"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forked processes")


@pytest.mark.parametrize(("target", "cases"), [("gguf", 60), ("lora", 30), ("images", 40), ("configs", 20)])
def test_target(target, cases, tmp_path):
    command = [
        sys.executable,
        str(RUN),
        "--target",
        target,
        "--first",
        "0",
        "--cases",
        str(cases),
        "--save",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{target}: {cases} cases, 0 bad" in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "result"),
    [
        (lambda: "done", "done"),
        (os.abort, "death: SIGABRT"),
        (lambda: ctypes.string_at(0), "death: SIGSEGV"),
        (lambda: 1 / 0, "untyped: ZeroDivisionError"),
        (lambda: time.sleep(60), "hang"),
        (lambda: bytearray(2**40), "untyped: MemoryError"),
    ],
)
def test_what_is_seen(case, result):
    """Otherwise a run of the fuzzer would show nothing."""
    assert forking.run(case, 2 if result == "hang" else 30).startswith(result)


def test_mutations_are_the_same_everywhere_and_change_the_header():
    data = FIXTURE.read_bytes()
    made = [mutate(data, seed) for seed in range(200)]
    assert made == [mutate(data, seed) for seed in range(200)]
    assert sum(out != data for out, _ in made) > 180
    kinds = {said.split(";")[0].split()[1] if said else "" for _, said in made}
    assert len(kinds) >= 5, kinds
    header = parse(data)
    assert len(header.tensors) == 57 and {f.name for f in header.fields} >= {
        "clip.projector_type",
        "clip.vision.patch_size",
    }
