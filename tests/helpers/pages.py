"""The README and the pages in docs: their blocks of code, and a folder with the files that they name.

A block after the line `<!-- executed: KIND -->` is run by a test as it stands: `python` and `shell` by
tests/test_pages.py, the others by the test that KINDS names.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from star_edge import refvlm

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# kind of block -> the file with the test that runs it
KINDS = {
    "python": "test_pages.py",
    "shell": "test_pages.py",
    "notebook": "test_pages.py",
    "newcomer": "test_newcomer.py",
    "script": "test_chat_handler.py",
    "server": "test_serve.py",
    "conversations": "test_serve_config.py",
    "hub": "test_hub.py",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def executed(page: str | Path, kind: str) -> list[str]:
    """The blocks of a page that are marked as of that kind, in order; page: its path from the root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^<!-- executed: {kind} -->\n+```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def kinds(page: Path) -> list[str]:
    """What the markers of a page say; `newcomer ask` is of the kind `newcomer`."""
    return re.findall(r"^<!-- executed: (.*?) -->$", page.read_text(encoding="utf-8"), re.MULTILINE)


def with_users_files(folder: Path) -> Path:
    """Puts the files that the pages name into a folder: the reference model, its picture, and two of its questions."""
    (folder / "photos").mkdir()
    pictures = ("receipt.png", "receipt.jpg", "a.jpg", "b.jpg", "photos/c.jpg")
    models = (("text.gguf", refvlm.TEXT_MODEL), ("mmproj.gguf", refvlm.MMPROJ))
    for name, source in (*models, *((picture, refvlm.DEMO_IMAGE) for picture in pictures)):
        (folder / name).symlink_to(source)
    questions = refvlm.demo_questions()[:3]
    lines = [
        {"image": image, "question": q["question"], "answer": q["answer"]}
        for q, image in zip(questions, ("a.jpg", "b.jpg", "photos/c.jpg"))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [{"image": line["image"], "prompt": line["question"]} for line in lines]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return folder


def shell_environment() -> dict[str, str]:
    """Variables with the folder of this Python, where `star-edge` is, first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
