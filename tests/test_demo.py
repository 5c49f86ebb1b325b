"""star-edge demo: what it says to type next."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import pages

from star_edge.cli.demo import program


@pytest.fixture
def off_the_path(monkeypatch):
    """A PATH without the program, as after `make demo`."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "star-edge").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))


def test_the_commands_work_as_they_stand(tmp_path, off_the_path):
    """From a folder with the files that they name, though no shell finds `star-edge`."""
    pages.with_users_files(tmp_path)
    code = "from star_edge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--repeats", "1"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    last = done.stdout.split("\nNext, ", 1)[1]
    commands = [line.strip() for line in last.splitlines() if " run " in line]
    assert len(commands) == 2
    answers = [
        subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True) for command in commands
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers
    assert answers[1].stdout.split()[0] == "2"  # the digit that is green


def test_by_name_where_the_shell_finds_it(monkeypatch, tmp_path):
    own = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", f"{own}{os.pathsep}{os.environ['PATH']}")
    assert program() == "star-edge"
    (tmp_path / "star-edge").write_text("#!/bin/sh\n")  # another installation's, found first
    (tmp_path / "star-edge").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert program() == str(Path(own, "star-edge"))


def test_where_there_is_no_program(monkeypatch, tmp_path, off_the_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert program() == f"{sys.executable} -m star_edge"
