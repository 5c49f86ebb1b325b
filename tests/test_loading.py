"""What is given as a path, and the process that a model is loaded in."""

import os
import subprocess
import sys

import pytest

from star_edge import StarChatHandler, StarVLM, errors, refvlm

LOAD = """
import os, sys
from star_edge import StarVLM, refvlm
{before}
with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256) as vlm:
    answer = vlm.generate("what color is the star?", [refvlm.DEMO_IMAGE], max_tokens=4)
with open({result!r}, "w") as file:
    file.write(answer.text)
"""


@pytest.mark.parametrize("directory", ["\0x", "", " ", 5, b"\0", "\ud800"], ids=repr)
def test_cache_directories_that_are_none(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ConfigError, match="image_cache_dir="):
        StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256, image_cache_dir=directory)
    with pytest.raises(errors.ConfigError, match="image_cache_dir="):
        StarChatHandler(refvlm.MMPROJ, image_cache_dir=directory)
    assert not list(tmp_path.iterdir())


def test_cache_directory_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256, image_cache_dir="~/pictures") as vlm:
        vlm.generate("x", [refvlm.DEMO_IMAGE], max_tokens=1)
    assert list((tmp_path / "pictures").iterdir())


@pytest.mark.parametrize("path", [5, None, "", "a\0b", "\udcff.gguf"], ids=repr)
def test_model_paths_that_are_none(path):
    with pytest.raises(errors.ModelFileError):
        StarVLM(path)
    if path is not None:  # no mmproj is a text model
        with pytest.raises(errors.ModelFileError):
            StarVLM(refvlm.TEXT_MODEL, path)
        with pytest.raises(
            (errors.ModelFileError, errors.ConfigError)
        ):  # another type than Llama's signature has is a ConfigError
            StarVLM(refvlm.TEXT_MODEL, lora_path=path)


def test_paths_as_bytes_and_at_home(monkeypatch):
    monkeypatch.setenv("HOME", str(refvlm.TEXT_MODEL.parent))
    with StarVLM(f"~/{refvlm.TEXT_MODEL.name}", os.fsencode(refvlm.MMPROJ), n_ctx=256) as vlm:
        assert vlm.generate("what color is the star?", [refvlm.DEMO_IMAGE], max_tokens=4).text


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of POSIX")
@pytest.mark.parametrize(
    "closed",
    [
        "os.close(1)",
        "os.close(2)",
        "os.close(1); os.close(2)",
        "sys.stdout.close(); sys.stderr.close()",
        "sys.stdout = sys.stderr = None",
    ],
)
def test_closed_output(closed, tmp_path):
    """A daemon may have closed both streams; what is opened next must not get their numbers, which llama.cpp logs
    to.
    """
    result = tmp_path / "result"
    run = subprocess.run(
        [sys.executable, "-c", LOAD.format(before=closed, result=str(result))], capture_output=True, text=True
    )
    assert result.exists(), run.stderr
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256) as vlm:
        expected = vlm.generate("what color is the star?", [refvlm.DEMO_IMAGE], max_tokens=4).text
    assert result.read_text() == expected


def test_memory_that_runs_out_in_python(monkeypatch):
    """llama_cpp's own arrays are NumPy's, and the encoder's are ours. (Where llama.cpp itself gets none it ends the
    process.)
    """
    from star_edge import engine
    from star_edge.llamacpp import llama_options

    def fail(*args, **kwargs):
        raise MemoryError

    for module, name in ((llama_options, "Llama"), (engine, "PromptReader")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(errors.EngineError, match="not enough memory.*lower n_ctx"):
                StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256) as vlm:
        assert vlm.generate("x", max_tokens=1)
