"""Helpers of the tests of batches: an engine without a model, tasks for it, the command and its results."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from star_edge import PRESETS
from star_edge.batch import Settings, Task

PICTURES = Path(__file__).parent.parent / "refvlm_questions"
BALANCED = Settings(PRESETS["balanced"])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def command(*args):
    return [sys.executable, "-c", "from star_edge.cli import main; main()", "run", "-t", "1", *args]


class FakeEngine:
    """Stands for StarVLM where only its answers matter. A prompt may ask for an unexpected error, or for the process's
    death.
    """

    def __init__(self, n_threads=None, broken=False):
        self.n_threads = n_threads

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def generate(self, prompt, images, prune, max_tokens, **options):
        if prompt == "die" or (prompt.startswith("die once ") and not Path(prompt[9:]).exists()):
            Path(prompt[9:] or os.devnull).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "fail":
            raise RuntimeError("something\nodd")
        report = SimpleNamespace(
            n_image_tokens=0,
            average_tokens=0.0,
            milliseconds={"first_token": 1.0},
            notes=[],
            n_cached=0,
            reused_tokens=0,
        )
        return SimpleNamespace(text=f"{prompt} {self.n_threads}", finish_reason="stop", report=report)


def make_tasks(*prompts):
    return [Task(i, (), (), prompt, BALANCED) for i, prompt in enumerate(prompts)]
