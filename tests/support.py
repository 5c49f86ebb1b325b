"""The README's support table, made from what tests/test_families.py showed in this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support table: begin (make support-table) -->\n", "<!-- support table: end -->"

# column -> the tests that a family must have passed, as (function, mode or None for tests without modes)
COLUMNS = {
    "exact": [("test_whole_pipeline_equals_stock", mode) for mode in ("f16", "fa", "q8_0")],
    "vision stage": [("test_features", None), ("test_encoder_scores", "f32"), ("test_both_stages", "f32")],
    "decoder stage": [("test_keep_all_equals_stock", "f16"), ("test_pruned_decoder", "f32"), ("test_both_stages", "f32")],
    "flash attention": [
        ("test_keep_all_equals_stock", "fa"),
        ("test_encoder_scores", "fa"),
        ("test_pruned_decoder", "fa"),
        ("test_both_stages", "fa"),
    ],
    "quantized KV": [("test_keep_all_equals_stock", "q8_0"), ("test_both_stages", "q8_0")],
    "several images": [("test_whole_pipeline_equals_stock", "fa"), ("test_both_stages", "f32")],
}

Results = Mapping[tuple[str, str, str | None], str]  # (family, function, mode) -> outcome of the test


def is_complete(families: Mapping[str, object], results: Results) -> bool:
    """Whether this run had every test of every family that the table speaks of."""
    return all((name, *test) in results for name in families for tests in COLUMNS.values() for test in tests)


def cell(name: str, column: str, problem: str | None, results: Results) -> str:
    """problem: why the family cannot have the stage of this column, or None. A test of a stage that cannot be is skipped."""
    outcomes = [results[(name, *test)] for test in COLUMNS[column]]
    if problem:
        return f"no: {problem}" if all(o in ("passed", "skipped") for o in outcomes) else "fails"
    if column == "vision stage" and outcomes == ["passed", "skipped", "passed"]:
        return "by embeddings"  # a resampler's tokens have no patches whose attention could be read
    if column in ("vision stage", "decoder stage"):
        return "yes" if all(o == "passed" for o in outcomes) else "fails"
    return "yes" if "passed" in outcomes and all(o in ("passed", "skipped") for o in outcomes) else "fails"


def table(families: Mapping[str, object], results: Results) -> str:
    """Markdown; families: name -> tests.families.Fixture."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, fixture in families.items():
        problems = {"vision stage": fixture.vision_problem, "decoder stage": fixture.decoder_problem}
        cells = [cell(name, column, problems.get(column), results) for column in COLUMNS]
        lines.append(f"| {fixture.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read() -> str:
    """The table that the README has."""
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write(new: str) -> None:
    text = README.read_text()
    README.write_text(text[: text.index(BEGIN) + len(BEGIN)] + new + text[text.index(END) :])
