"""Tests in processes that may end at any time, and what is said of each test (tools/vulkan.py).

A batch of tests runs in one process. Where that process ends by a signal, the journal (tools/pytest_journal.py) says
during which test; a new process goes on with the tests after it. The test itself is run again in a process of its own.
If that ends too, stock llama.cpp is asked in a third one: the same test, with no callback in any context
(tests/helpers/gpu.py). Where stock crashes as well the test shows nothing of star_edge, and is said to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_journal import read_journal

# verdict on a test -> what is said of it; those of BAD make the run fail
VERDICTS = {
    "passed": "passed",
    "failed": "failed",
    "skipped": "skipped",
    "stock": "ended by stock llama.cpp too",
    "ours": "ended by us, not by stock llama.cpp",
    "timeout": "out of time",
    "not run": "not run for time",
}
BAD = {"failed", "ours", "timeout", "not run"}


@dataclass
class Batch:
    """Tests that share a process.

    Attributes:
        title: for people, and the name of the log.
        tests: ids, as pytest collects them.
        seconds: for all of them together, and as many once more for those that end their process.
        verdicts: id -> key of VERDICTS.
        alone: ids of tests that have ended the process of the batch, and not one of their own.
        at_exit: how often a process ended by a signal after its last test.
        wall: seconds it took.
    """

    title: str
    tests: list[str]
    seconds: float
    verdicts: dict[str, str] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    at_exit: int = 0
    wall: float = 0.0

    @property
    def is_well(self) -> bool:
        return not BAD & set(self.verdicts.values())


def pytest(
    root: Path, variables: dict[str, str], arguments: Sequence[str], log: Path, seconds: float
) -> tuple[int, dict[str, str]]:
    """(status, below 0: the signal that ended it, SIGKILL when the time was up; id -> what `read_journal` says)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    journal = log.with_suffix(".journal")
    journal.unlink(missing_ok=True)
    tools = str(Path(__file__).parent)
    paths = os.pathsep.join(path for path in (tools, variables.get("PYTHONPATH")) if path)
    variables = {**variables, "PYTEST_JOURNAL": str(journal), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_journal", *arguments]
    with open(log, "a") as out:
        # a group of its own, so that what a test has started ends with it
        process = subprocess.Popen(
            command, cwd=root, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, read_journal(journal)


def collect(root: Path, variables: dict[str, str], arguments: Sequence[str], log: Path) -> list[str]:
    """Ids of tests. Raises SystemExit with what pytest says where it finds none."""
    log.unlink(missing_ok=True)
    status, outcomes = pytest(root, variables, ["--collect-only", *arguments], log, 600)
    if status or not outcomes:
        sys.exit(log.read_text())
    return list(outcomes)


def run(root: Path, variables: dict[str, str], batch: Batch, logs: Path) -> None:
    """Fills in what `batch` says of its tests. logs: folder of the output, one file for a batch."""
    start, log = time.monotonic(), logs / f"{batch.title}.log"
    log.unlink(missing_ok=True)
    left = lambda: start + batch.seconds - time.monotonic()
    rest, ended = list(batch.tests), []
    while rest:
        status, outcomes = pytest(root, variables, rest, log, left())
        batch.verdicts.update({test: o for test, o in outcomes.items() if o not in ("began", "collected")})
        under_way = [test for test, outcome in outcomes.items() if outcome == "began"]
        n_before, rest = len(rest), [test for test in rest if outcomes.get(test, "collected") == "collected"]
        if left() <= 0:
            batch.verdicts.update(dict.fromkeys(under_way, "timeout") | dict.fromkeys(rest, "not run"))
            break
        ended += under_way
        if status < 0 and not under_way:
            batch.at_exit += 1
        if len(rest) == n_before:  # no test began: what pytest says is in the log
            batch.verdicts.update(dict.fromkeys(rest, "failed"))
            break
    deadline = time.monotonic() + batch.seconds
    for test in ended:
        batch.verdicts[test] = ask_again(root, variables, test, log, deadline - time.monotonic())
        if batch.verdicts[test] == "passed":
            batch.alone.append(test)
    batch.wall = time.monotonic() - start


def ask_again(root: Path, variables: dict[str, str], test: str, log: Path, seconds: float) -> str:
    """The verdict on a test that has ended a process."""
    start = time.monotonic()
    for stock in ("", "1"):
        left = start + seconds - time.monotonic()
        if left <= 0:
            return "timeout"
        _, outcomes = pytest(root, {**variables, "STAR_EDGE_TEST_STOCK": stock}, [test], log, left)
        outcome = outcomes.get(test, "collected")
        if time.monotonic() - start >= seconds:
            return "timeout"
        if outcome != "began":
            return "ours" if stock else "failed" if outcome == "collected" else outcome
    return "stock"


def counts(batches: Sequence[Batch]) -> str:
    """How many tests have which verdict."""
    found = Counter(verdict for batch in batches for verdict in batch.verdicts.values())
    return ", ".join(f"{found[v]} {text}" for v, text in VERDICTS.items() if found[v] or v in ("passed", "failed"))


def summary(batches: Sequence[Batch]) -> str:
    """A line for each test of which more is to be said than that it passed or was skipped."""
    lines = []
    for batch in batches:
        lines += [f"{test}: {VERDICTS[v]}" for test, v in batch.verdicts.items() if v not in ("passed", "skipped")]
        lines += [f"{test}: passed in a process of its own, after it had ended another" for test in batch.alone]
        if batch.at_exit:
            lines.append(f"{batch.title}: its process ended by a signal after its last test, {batch.at_exit} times")
    return "\n".join(lines)
