"""tools/vulkan.py, as far as it can be run without Vulkan: tests that end their process, and what is said of them."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import vulkan  # noqa: E402

TESTS = """
import os
import pytest

stock, alone = os.environ.get("STAR_EDGE_TEST_STOCK"), "PYTEST_XDIST_WORKER" not in os.environ

def test_passes(): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("no reason")
@pytest.mark.parametrize("text", ["a b"])
def test_ends_in_company(text): alone or os.abort()
def test_ends_with_stock_too(): os.abort()
def test_ends_with_us(): stock == "1" or os.abort()
def test_ends_in_company_and_fails(): alone or os.abort(); assert False
def test_comes_last(): pass
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    (tmp_path / "test_ends.py").write_text(TESTS)
    monkeypatch.setattr(vulkan, "ROOT", tmp_path)
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def test_what_becomes_of_tests_that_end_their_process(suite, tmp_path):
    report = tmp_path / "report.xml"
    status = vulkan.pytest(
        suite, ["-q", "-n", "1", "--max-worker-restart", "9", f"--junitxml={report}", "test_ends.py"]
    )
    passed, failed, skipped, crashed = vulkan.read_report(report)
    assert status == 1 and (passed, failed, skipped) == (2, 1, 1)
    assert {test.partition("::test_")[2]: vulkan.ask_again(suite, test) for test in crashed} == {
        "ends_in_company[a b]": "passed",
        "ends_with_stock_too": "stock",
        "ends_with_us": "ours",
        "ends_in_company_and_fails": "failed",
    }


@pytest.mark.parametrize(
    ("chosen", "is_well"),
    [("passes or stock or (company and not fails)", True), ("passes or us", False), ("and_fails", False)],
)
def test_whether_all_is_well(suite, monkeypatch, capfd, chosen, is_well):
    monkeypatch.setattr(vulkan, "environment", lambda libraries, placement: suite)
    monkeypatch.setattr(vulkan, "device", lambda variables: "a device")
    assert vulkan.run(Path(), "all", 1, ["test_ends.py", "-q", "-k", chosen]) is is_well
    assert f"== all: {1 if 'passes' in chosen else 0} passed, 0 failed" in capfd.readouterr().out
