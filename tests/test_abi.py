"""Another llama.cpp under the same version number is refused at import, with a sentence."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import pytest

from star_edge import errors
from star_edge.llamacpp import native

REAL = mtmd.mtmd_context_params
SIZE = ctypes.sizeof(REAL)


def structure(name, fields):
    return SimpleNamespace(**{name: type(name, (ctypes.Structure,), {"_fields_": fields})})


def without(*names):
    return [field for field in REAL._fields_ if field[0] not in names]


def swapped(first, second):
    order = {first: second, second: first}
    fields = dict(REAL._fields_)
    return [(order.get(name, name), fields[order.get(name, name)]) for name, _ in REAL._fields_]


def test_the_installed_one_fits():
    native.check_layout(native._layouts(), llama_cpp, mtmd)
    names = {name for name, _, _ in native._layouts()}
    assert {
        "llama_batch",
        "llama_context_params",
        "mtmd_context_params",
        "mtmd_input_text",
        "mtmd_decoder_pos",
    } <= names


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            without("progress_callback", "progress_callback_user_data"),
            [f"mtmd_context_params of {SIZE} bytes", f"this {SIZE - 16} bytes"],
        ),
        (without("batch_max_tokens"), ["mtmd_context_params"]),
        (
            [*without("cb_eval_user_data"), ("other", ctypes.c_void_p)],
            ["mtmd_context_params.cb_eval_user_data", "none"],
        ),
        (swapped("cb_eval", "cb_eval_user_data"), ["mtmd_context_params.cb_eval at byte", "this has it at byte"]),
    ],
    ids=["fewer", "one-fewer", "another-name", "another-order"],
)
def test_a_fork_is_refused(fields, words):
    """A fork of llama-cpp-python has its own 0.3.36, with fewer fields."""
    expected = [entry for entry in native._layouts() if entry[0] == "mtmd_context_params"]
    with pytest.raises(errors.VersionMismatchError) as caught:
        native.check_layout(expected, structure("mtmd_context_params", fields))
    message = str(caught.value)
    assert all(word in message for word in words) and "reinstall star-edge" in message and "\n" not in message


def test_a_structure_that_is_gone():
    with pytest.raises(errors.VersionMismatchError, match="llama_batch of .* bytes, and this none"):
        native.check_layout(native._layouts(), SimpleNamespace())


def test_versions():
    native.check_version("0.3.36", "0.3.36+cu128.basic")
    native.check_version("0.3.36+cu128", "0.3.36")
    for installed in ("0.3.35", "0.3.360", "0.3.36.post1"):
        with pytest.raises(errors.VersionMismatchError, match=installed):
            native.check_version("0.3.36", installed)
    native.check_llama("0.5.0", "0.5.0")
    native.check_llama("", "0.6.0")  # unknown at compile time
    for loaded in ("0.6.0", ""):
        with pytest.raises(errors.VersionMismatchError, match="llama.cpp 0.5.0"):
            native.check_llama("0.5.0", loaded)


def test_import_with_another_layout(tmp_path):
    """The check runs at import, before anything is called with the structures."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, llama_cpp.mtmd_cpp as m\n"
        "m.mtmd_context_params = type('mtmd_context_params', (ctypes.Structure,), "
        "{'_fields_': m.mtmd_context_params._fields_[:-2]})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", "import sitecustomize, star_edge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(native.__file__).parent.parent}"},
    )
    assert run.returncode == 1 and "VersionMismatchError: llama-cpp-python" in run.stderr, run.stderr
