"""The README and the pages in docs: their blocks run as they stand, with the reference model under the names of the
user's files.
"""

import base64
import contextlib
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
from helpers import pages
from nbclient import NotebookClient

TESTS = Path(__file__).parent


@pytest.fixture
def folder(tmp_path):
    return pages.with_users_files(tmp_path)


def of_kind(kind):
    return [pages.name(page) for page in pages.PAGES if kind in pages.kinds(page)]


# ---- which blocks are run ----


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_a_page_with_code_has_a_block_that_is_run(page):
    languages = re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert pages.kinds(page) or not {"python", "sh"} & set(languages)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_each_marker_has_a_block_and_a_test(page):
    for kind in dict.fromkeys(pages.kinds(page)):
        assert len(pages.executed(page, kind)) == pages.kinds(page).count(kind)
        runner = pages.KINDS[kind.split()[0]]
        if runner != Path(__file__).name:  # the tests below take every page
            test = (TESTS / runner).read_text(encoding="utf-8")
            assert re.search(rf'executed\("{pages.name(page)}", f?"{kind.split()[0]}', test)


def test_what_the_tests_of_markers_catch(tmp_path, monkeypatch):
    """A marker without a block, and code without a marker."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n")
    with pytest.raises(AssertionError):
        test_a_page_with_code_has_a_block_that_is_run(page)
    page.write_text("<!-- executed: python -->\ntext\n```python\nprint(1)\n```\n")
    with pytest.raises(AssertionError):
        test_each_marker_has_a_block_and_a_test(page)


# ---- running them ----

PRINTED = {
    "README.md": "36 of 144 image tokens",
    "docs/attention.md": "(8, 22, 22)",
    "docs/chat.md": "of 144 image tokens",
    "docs/presets.md": "54.0 of 144",  # (4 x 72 + 2 x 18) / 6
    "docs/python.md": "36 of 144 image tokens",
    "docs/video.md": " 288\n",
}


@pytest.mark.parametrize("page", of_kind("python"))
def test_python(page, folder, monkeypatch):
    """The blocks of a page, one after the other, in one program."""
    monkeypatch.chdir(folder)
    variables = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in pages.executed(page, "python"):
            exec(compile(block, page, "exec"), variables)
    if "vlm" in variables:
        variables["vlm"].close()
    assert PRINTED[page] in printed.getvalue()


@pytest.mark.parametrize("page", of_kind("shell"))
def test_shell(page, folder):
    """The blocks of a page in one shell, which stops at the first command that fails; what they write is there."""
    script = "\n".join(pages.executed(page, "shell"))
    done = subprocess.run(
        ["bash", "-exc", script], cwd=folder, capture_output=True, text=True, env=pages.shell_environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"(?:^|\| )star-edge ", script, re.MULTILINE)
    assert done.stderr.count("+ star-edge ") == len(commands) > 0
    for option, name in re.findall(r"(--overlay|--picture|--plot|--out|-o) ([\w.]+)", script):
        if option in ("--out", "-o"):
            text = (folder / name).read_text()
            assert [json.loads(part) for part in (text.splitlines() if name.endswith(".jsonl") else [text])]
        else:
            assert PIL.Image.open(folder / name).width > 336


@pytest.mark.parametrize("page", of_kind("notebook"))
def test_notebook(page, folder, monkeypatch):
    """Cells of one kernel, that of this Python."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name))
    cells = pages.executed(page, "notebook")
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
