"""A pytest plugin that writes what a run is at: a line for each test that is collected, that begins, for each outcome
(of a failure with the end of its report), and for each that is over.

    PYTEST_JOURNAL=FILE PYTHONPATH=tools python -m pytest -p pytest_journal ...
    python tools/pytest_journal.py FILE          # counts, and each failure with its reason

A line is on disk before the test goes on, so it outlives a crash, or a machine whose time is up.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read without pytest
    import pytest

_FILES: list[Any] = []
_REPORT_CHARACTERS = 600


def write(test: str, event: str, *more: str) -> None:
    if not _FILES:  # open until the process ends
        _FILES.append(open(os.environ["PYTEST_JOURNAL"], "a", buffering=1))  # noqa: SIM115
    _FILES[0].write(json.dumps([test, event, *more]) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        write(item.nodeid, "collected")


def pytest_runtest_logstart(nodeid: str) -> None:
    write(nodeid, "began")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the three phases of a test: one that is not passed counts, and "passed" is what the call itself says."""
    if report.when == "call" or report.outcome != "passed":
        write(report.nodeid, report.outcome, *[report.longreprtext[-_REPORT_CHARACTERS:]][: report.failed])
    if report.when == "teardown":
        write(report.nodeid, "over")


def read_journal(journal: Path) -> dict[str, str]:
    """id -> "passed", "failed" or "skipped"; "began" for a test that was not over, "collected" for one before that."""
    outcomes: dict[str, str] = {}
    over = set()
    for line in journal.read_text().splitlines() if journal.exists() else ():
        test, event, *_ = json.loads(line)
        if event == "over":
            over.add(test)
        elif outcomes.get(test) != "failed":  # a failure stays one, whatever the teardown says
            outcomes[test] = event
    return {test: outcome if test in over or outcome == "collected" else "began" for test, outcome in outcomes.items()}


def main() -> None:
    journal = Path(sys.argv[1])
    outcomes = read_journal(journal)
    reasons = {line[0]: line[2] for line in map(json.loads, journal.read_text().splitlines()) if len(line) > 2}
    for test, reason in reasons.items():
        print(f"FAILED {test}\n    " + reason.strip().replace("\n", "\n    "))
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(outcomes.values()).items())))


if __name__ == "__main__":
    main()
