"""tools/check_llama.py: another llama.cpp shows as an assumption that fails, by its name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from star_edge.llamacpp import native

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_llama  # noqa: E402


def check(*options, **variables):
    path = os.pathsep.join([str(ROOT / "tests"), variables.pop("path", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_llama.py"), "here", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def lines(done, word):
    return [line for line in done.stdout.splitlines() if line.startswith(word)]


def test_a_tensor_with_another_name_is_a_named_failure(tmp_path):
    """A faked graph, in which the hidden state is called otherwise."""
    (tmp_path / "renamed.py").write_text(
        'from helpers import graphs\ngraphs.rename = lambda name: name.replace("l_out-", "layer_out-")\n'
    )
    done = check("-prenamed", "-klayer_n_hands or attn_inp_kq_mask", path=str(tmp_path))
    assert done.returncode == 1, done.stderr
    (failure,) = lines(done, "FAILS")
    assert failure.startswith("FAILS  decoder graphs: layer n hands its state on as l out n")
    assert lines(done, "holds") and "1 of 2 assumptions hold" in done.stdout


def test_nothing_fails_here():
    done = check("-kdecoder_graphs")
    assert done.returncode == 0 and not lines(done, "FAILS") and len(lines(done, "holds")) >= 12


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_header_with_another_name_is_a_named_failure(tmp_path):
    """A copy of llama.h in which a field of the context's parameters is called otherwise."""
    include = Path(native.llama_cpp.__file__).parent.parent / "include"
    for header in include.glob("*.h"):
        text = header.read_text(encoding="utf-8")
        (tmp_path / header.name).write_text(text.replace("kv_unified", "kv_is_one"), encoding="utf-8")
    command = ["cc", "-std=c11", "-fsyntax-only", f"-I{ROOT / 'csrc'}", '-DSTAR_EDGE_LLAMA=""']
    command += ["-isystem", str(tmp_path), str(ROOT / "csrc" / "abi.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "kv_unified" in check_llama.first_error(done.stderr)


def test_a_report_is_read(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.contract.test_numbers" name="test_a_size[x]"/>'
        '<testcase classname="tests.contract.test_numbers" name="test_a_size[y]"><failure message="16 is not 32"/>'
        '</testcase><testcase classname="tests.contract.test_kv_cache" name="test_cells"/></testsuite></testsuites>'
    )
    found = check_llama.assumptions(tmp_path / "report.xml")
    assert found == {"numbers: a size": ["[y] 16 is not 32"], "kv cache: cells": []}
