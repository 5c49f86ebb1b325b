"""tools/vulkan.py, as far as it can be run without Vulkan: which tests it chooses, tests that end their process or take
too long, and what is said of them."""

import argparse
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import vulkan  # noqa: E402
import vulkan_runs  # noqa: E402

TESTS = """
import os, time
import pytest

stock = os.environ.get("STAR_EDGE_TEST_STOCK")

def test_passes(): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("no reason")
@pytest.fixture
def broken(): yield; assert False
def test_fails_when_it_is_torn_down(broken): pass
@pytest.mark.parametrize("text", ["a b"])
def test_ends_in_company(text, request): len(request.session.items) == 1 or os.abort()
def test_ends_with_stock_too(): os.abort()
def test_ends_with_us(): stock == "1" or os.abort()
def test_ends_in_company_and_fails(request): len(request.session.items) == 1 or os.abort(); assert False
def test_comes_last(): pass
def test_waits(): time.sleep(600)
def test_comes_after(): pass
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "test_ends.py").write_text(TESTS)
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture
def run(suite, tmp_path):
    """(*names) -> Batch, which has run."""

    def get(*names):
        batch = vulkan_runs.Batch("some", [f"test_ends.py::test_{name}" for name in names], 1000)
        vulkan_runs.run(tmp_path, suite, batch, tmp_path / "logs")
        return batch

    return get


def by_name(batch):
    return {test.partition("::test_")[2]: verdict for test, verdict in batch.verdicts.items()}


def test_what_becomes_of_tests_that_end_their_process(run):
    expected = {
        "passes": "passed",
        "fails": "failed",
        "is_skipped": "skipped",
        "fails_when_it_is_torn_down": "failed",
        "ends_in_company[a b]": "passed",
        "ends_with_stock_too": "stock",
        "ends_with_us": "ours",
        "ends_in_company_and_fails": "failed",
        "comes_last": "passed",
    }
    batch = run(*expected)
    assert by_name(batch) == expected and not batch.is_well
    assert batch.alone == ["test_ends.py::test_ends_in_company[a b]"]
    said = vulkan_runs.summary([batch])
    assert "test_ends_with_us: ended by us, not by stock" in said and "test_ends_with_stock_too: ended by stock" in said
    assert "test_passes" not in said
    assert vulkan_runs.counts([batch]).startswith("3 passed, 3 failed, 1 skipped, 1 ended by stock")


def test_what_becomes_of_tests_when_the_time_is_up(run, monkeypatch):
    """The clock is the test's own: what a process was at when its time was over, and what it had not begun."""
    clock = [0.0]
    outcomes = {"passes": "passed", "waits": "began", "comes_after": "collected"}

    def until_the_end(root, variables, tests, log, seconds):
        clock[0] += seconds
        return -9, {f"test_ends.py::test_{name}": outcome for name, outcome in outcomes.items()}

    monkeypatch.setattr(vulkan_runs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(vulkan_runs, "pytest", until_the_end)
    batch = run(*outcomes)
    assert by_name(batch) == {"passes": "passed", "waits": "timeout", "comes_after": "not run"} and not batch.is_well


def test_a_process_ends_when_its_time_is_up(suite, tmp_path):
    status, _ = vulkan_runs.pytest(tmp_path, suite, ["test_ends.py::test_waits"], tmp_path / "log", 1)
    assert status == -9


@pytest.mark.parametrize(
    ("names", "is_well"),
    [
        (["passes", "is_skipped", "ends_with_stock_too", "ends_in_company[a b]"], True),
        (["passes", "ends_with_us"], False),
        (["nothing_of_that_name"], False),
    ],
)
def test_whether_all_is_well(run, names, is_well):
    assert run(*names).is_well is is_well


def test_tests_are_collected(suite, tmp_path):
    log = tmp_path / "log"
    some = vulkan_runs.collect(tmp_path, suite, ["test_ends.py", "-k", "ends_in"], log)
    assert some == ["test_ends.py::test_ends_in_company[a b]", "test_ends.py::test_ends_in_company_and_fails"]
    with pytest.raises(SystemExit, match="no_such_file"):
        vulkan_runs.collect(tmp_path, suite, ["no_such_file.py"], log)


def test_a_placement(suite, tmp_path, monkeypatch, capfd):
    """Named files: all of their tests, in a batch for each file."""
    monkeypatch.setattr(vulkan, "ROOT", tmp_path)
    monkeypatch.setattr(vulkan, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(vulkan, "environment", lambda libraries, placement, bits: suite)
    monkeypatch.setattr(vulkan, "device", lambda variables: "a device")
    options = argparse.Namespace(all=False, jobs=2, seconds=1000)
    (tmp_path / "test_more.py").write_text("def test_more(): pass\n")
    chosen = ["test_ends.py", "test_more.py", "-k", "passes or more or skipped"]
    assert vulkan.run(Path(), "half", options, chosen)
    out = capfd.readouterr().out
    assert "== half: 3 tests on a device" in out and "half-more-32: 1 passed, 0 failed" in out
    assert "== half: 2 passed, 0 failed, 1 skipped" in out
    assert not vulkan.run(Path(), "half", options, ["test_ends.py", "-k", "fails"])


def test_each_pattern_of_the_selection_is_about_tests(suite):
    """And each family is in it, with everything kept and pruned, in every placement."""
    files = {pattern.partition("::")[0] for patterns in vulkan.SELECTED.values() for pattern in patterns}
    log = ROOT / "build" / "vulkan" / "test.log"
    tests = vulkan_runs.collect(ROOT, suite, [f"tests/test_{file}" for file in sorted(files)], log)
    for pattern in vulkan.BIT_FOR_BIT:
        assert any(vulkan.is_selected(test, [pattern]) for test in tests), pattern
    families = [folder.parent.name for folder in vulkan.FAMILIES.glob("*/expected.json")]
    for placement, patterns in vulkan.SELECTED.items():
        assert {p.partition(".")[0] for p in patterns} <= set(vulkan.SUITES[placement].split())
        for pattern in patterns:
            assert any(vulkan.is_selected(test, [pattern]) for test in tests), pattern
        chosen = [test for test in tests if vulkan.is_selected(test, patterns)]
        for function in ("test_whole_pipeline_equals_stock", "test_both_stages"):
            found = {vulkan.family(test) for test in chosen if test.startswith(f"tests/test_families.py::{function}[")}
            assert found == set(families)


def test_family_of_an_id():
    of = lambda parameters: vulkan.family(f"tests/test_families.py::test_x[{parameters}]")
    assert [of("llava-fa"), of("llava-next-fa"), of("llava-next"), of("no-fa")] == [
        "llava",
        "llava-next",
        "llava-next",
        "",
    ]


def test_a_shader_that_is_not_the_known_one_is_left_alone(tmp_path):
    shader = tmp_path / "rms_norm.comp"
    known = "void rms_norm(uint n) {}\nvoid main() {\n    uint num_blocks = (p.ne00 + 1) / 2;\n"
    copies = ["num_blocks", *"32 16 12 10 8 4 3 2 1".split()]
    shader.write_text(known + "".join(f"    if (x) {{ rms_norm({n}); }}\n" for n in copies) + "}\n")
    for _ in range(2):
        vulkan.shorten(shader)
        assert shader.read_text() == known + "    rms_norm(num_blocks);\n}\n"
    shader.write_text(known + "    rms_norm(32);\n}\n")
    with pytest.raises(SystemExit, match="has changed"):
        vulkan.shorten(shader)
