"""The README's blocks that are marked as executed: each runs as it stands, with the reference model under the names of
the user's files.

The script's is in test_chat_handler.py, and the client's of the server in test_serve.py.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import PIL.Image
import pytest
from nbclient import NotebookClient

from star_edge import refvlm

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def folder(tmp_path):
    """The files that the README names, in a folder of their own."""
    pictures = ("receipt.png", "receipt.jpg", "a.jpg")
    for name, source in (
        ("text.gguf", refvlm.TEXT_MODEL),
        ("mmproj.gguf", refvlm.MMPROJ),
        *((n, refvlm.DEMO_IMAGE) for n in pictures),
    ):
        (tmp_path / name).symlink_to(source)
    lines = [{"image": "a.jpg", **{key: q[key] for key in ("question", "answer")}} for q in refvlm.demo_questions()[:2]]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_notebook(folder, monkeypatch):
    """Cells of one kernel, that of this Python."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name))
    section = README.split("<!-- executed: notebook -->", 1)[1].split("<!-- executed", 1)[0]
    cells = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(cells) == 3
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in (*cells, "import sys; sys.executable")]
    )
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    answered, pictured, streamed, where = (cell.outputs for cell in notebook.cells)
    assert answered[-1].data["text/plain"].startswith("Answer(text=") and len(answered[-1].data["text/plain"]) < 500
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(pictured[-1].data["image/png"])))
    assert picture.width > 3 * 336 and picture.height >= 336  # the picture and two stages
    assert "".join(
        output.text for output in streamed if output.output_type == "stream" and output.name == "stdout"
    ).strip()
    assert os.path.samefile(where[-1].data["text/plain"].strip("'"), sys.executable)


def test_shell(folder):
    """Every command, in one shell that stops at the first that fails."""
    block = README.split("<!-- executed: shell -->", 1)[1].split("```\n", 1)[1].split("```", 1)[0]
    commands = [line.split()[1] for line in block.splitlines()]
    assert commands == ["run", "run", "inspect", "inspect", "eval", "doctor", "doctor", "demo"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-exc", block], cwd=folder, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("+ star-edge ") == len(commands)
    assert '"average_tokens"' in done.stdout and "Reference model" in done.stdout
    for name in ("kept.png", "attention.png"):
        assert PIL.Image.open(folder / name).width > 336
    assert (folder / "results.jsonl").stat().st_size
