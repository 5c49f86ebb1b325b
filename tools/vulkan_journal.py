"""What a process of tools/vulkan.py was at when it ended: a pytest plugin that writes a line for each test that is
collected, that begins, for each outcome, and for each that is over.

A line is on disk before the test goes on, so it outlives a crash. The file is VULKAN_JOURNAL.
"""

from __future__ import annotations

import json
import os

import pytest

FILE = open(os.environ["VULKAN_JOURNAL"], "a", buffering=1)  # noqa: SIM115 - open until the process ends


def write(test: str, event: str) -> None:
    FILE.write(json.dumps([test, event]) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        write(item.nodeid, "collected")


def pytest_runtest_logstart(nodeid: str) -> None:
    write(nodeid, "began")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the three phases of a test: one that is not passed counts, and "passed" is what the call itself says."""
    if report.when == "call" or report.outcome != "passed":
        write(report.nodeid, report.outcome)
    if report.when == "teardown":
        write(report.nodeid, "over")
