"""The way of docs/first-steps.md, block by block, in a new environment: install, demo, first answer, server, tune."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import PIL.Image
import pytest
from helpers import pages

pytestmark = pytest.mark.slow
BUILT_FROM = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "bindings", "star_edge")


def blocks(step):
    return "\n".join(pages.executed("docs/first-steps.md", f"newcomer {step}"))


class Newcomer:
    """A checkout, an environment in it, and a folder with the user's files.

    star_edge is compiled and installed there for real. What it depends on, llama-cpp-python above all, is found in the
    environment of the tests: compiling it takes minutes.
    """

    def __init__(self, folder):
        self.checkout, self.work = folder / "star_edge", folder / "work"
        self.checkout.mkdir()
        self.work.mkdir()
        for name in BUILT_FROM:
            source = pages.ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, self.checkout / name)
        pages.with_users_files(self.work)
        self.variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        # pip reads it as build_isolation=0. An isolated build would compile llama-cpp-python again.
        self.variables |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def command(self, script):
        return ["bash", "-ec", f". '{self.checkout}/star-edge-env/bin/activate'\n{script}"]

    def run(self, script):
        """What it printed."""
        done = subprocess.run(
            self.command(script), cwd=self.work, env=self.variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self):
        """What the block printed; between its first line and the others the environment gets what it may borrow."""
        create, install = blocks("install").split("\n", 1)
        subprocess.run(["bash", "-ec", create], cwd=self.checkout, env=self.variables, check=True)
        (site,) = (self.checkout / "star-edge-env").glob("lib/python*/site-packages")
        borrowed = [path for path in map(Path, sys.path) if path.name == "site-packages"]
        (site / "zz_borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
        return self.run(f"cd '{self.checkout}'\n{install}")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    newcomer = Newcomer(tmp_path_factory.mktemp("newcomer"))
    newcomer.installed = newcomer.install()
    return newcomer


def test_install_and_demo(newcomer):
    assert "stock 7 of 7, pruned 7 of 7" in newcomer.installed
    where = Path(newcomer.run("cd /; python -c 'import star_edge; print(star_edge.__file__)'").strip())
    assert where.is_relative_to(newcomer.checkout / "star-edge-env")


def test_what_the_demo_says_to_type_next(newcomer):
    """Its last lines are commands, with a path to the program that is right wherever they are typed."""
    commands = [line.strip() for line in newcomer.installed.splitlines() if "star-edge run" in line]
    assert commands
    for command in commands:
        assert newcomer.run(command).strip()


def test_first_answer(newcomer):
    printed = newcomer.run(blocks("ask"))
    assert "144" in printed
    assert PIL.Image.open(newcomer.work / "kept.png").width > 336


def test_server_and_client(newcomer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = blocks("serve").strip() + f" --port {port}"
    server = subprocess.Popen(
        newcomer.command(command), cwd=newcomer.work, env=newcomer.variables, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < end:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                assert urllib.request.urlopen(f"{url}/health", timeout=60).status == 200
                break
            time.sleep(0.1)
        answer = json.loads(newcomer.run(blocks("client").replace("http://127.0.0.1:8000", url)))
        assert answer["star_edge"]["average_tokens"] == 36.0 and answer["choices"][0]["message"]["content"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def test_tune(newcomer):
    assert newcomer.run(blocks("tune")).strip()
    assert json.loads((newcomer.work / "mine.json").read_text())
