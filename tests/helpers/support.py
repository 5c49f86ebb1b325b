"""The support table of docs/models.md: what must hold of each family on every machine, and which tests of
tests/test_families.py show it.

The table is made of what the fixtures say their families can have, so it does not change with the processor: where
something does not hold on one, its own test fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.vision.composed import GEOMETRIES
from star_edge.vision.row_window import SINGLE, SQUARES

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- support table: begin (make support-table) -->\n", "<!-- support table: end -->"

# column -> the tests that show it, as (function, mode or None for tests without modes)
COLUMNS = {
    "exact": [("test_whole_pipeline_equals_stock", mode) for mode in ("f16", "fa", "q8_0")],
    "redundant tokens": [("test_redundant_tokens", None)],
    "encoder stage": [("test_encoder_stage", None)],
    "vision stage": [("test_features", None), ("test_encoder_scores", "f32"), ("test_both_stages", "f32")],
    "decoder stage": [
        ("test_keep_all_equals_stock", "f16"),
        ("test_pruned_decoder", "f32"),
        ("test_both_stages", "f32"),
    ],
    "flash attention": [
        ("test_keep_all_equals_stock", "fa"),
        ("test_encoder_scores", "fa"),
        ("test_pruned_decoder", "fa"),
        ("test_both_stages", "fa"),
    ],
    "quantized KV": [("test_keep_all_equals_stock", "q8_0"), ("test_both_stages", "q8_0")],
    "several images": [("test_whole_pipeline_equals_stock", "fa"), ("test_both_stages", "f32")],
    "reuse": [("test_reuse", None)],
}

Results = Mapping[tuple[str, str, str | None], str]  # (family, function, mode) -> outcome of the test


def is_complete(families: Mapping[str, object], results: Results) -> bool:
    """Whether this run had every test of every family that the table speaks of."""
    return all((name, *test) in results for name in families for tests in COLUMNS.values() for test in tests)


def has_encoder_stage(fixture: object) -> bool:
    """Whether it runs in two parts: by composed pictures, or by rows that leave. Granite-Vision stacks hidden states of
    several layers.
    """
    return fixture.name != "granite-vision" and fixture.projector in (*GEOMETRIES, *SQUARES, *SINGLE)


def has_sliding_window(fixture: object) -> bool:
    """Whether its decoder's cache forgets what has left a window. No row is kept for a further question then."""
    architecture = read_gguf_info(fixture.text, ("general.architecture",)).values["general.architecture"]
    key = f"{architecture}.attention.sliding_window"
    return bool(read_gguf_info(fixture.text, (key,)).values[key])


def cell(fixture: object, column: str) -> str:
    """fixture: tests.families.Fixture."""
    if column == "reuse" and has_sliding_window(fixture):
        return "encoder outputs"
    if column == "redundant tokens":  # the encoder takes pictures of any size
        return "yes" if fixture.projector in GEOMETRIES else "no"
    if column == "encoder stage":
        return "yes" if has_encoder_stage(fixture) else "no"
    problem = {"vision stage": fixture.vision_problem, "decoder stage": fixture.decoder_problem}.get(column)
    if problem:
        return f"no: {problem}"
    if column == "vision stage" and fixture.prompts[0].encoder_scores is None:
        return "by embeddings"  # a resampler's tokens have no patches whose attention could be read
    return "yes"


def table(families: Mapping[str, object]) -> str:
    """Markdown; families: name -> tests.families.Fixture."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for fixture in families.values():
        lines.append(f"| {fixture.title} | {' | '.join(cell(fixture, column) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def unproven(families: Mapping[str, object], results: Results) -> list[tuple[str, str]]:
    """(family, column) of each "yes" that no test of this run was about. A test that failed was: it says so itself."""
    missing = []
    for name, fixture in families.items():
        for column, tests in COLUMNS.items():
            skipped = [results[(name, *test)] == "skipped" for test in tests]
            # a family without one of the stages skips that stage's tests in the columns that are about both
            needs_all = column in (
                "exact",
                "redundant tokens",
                "encoder stage",
                "vision stage",
                "decoder stage",
            ) or not (fixture.vision_problem or fixture.decoder_problem)
            needs_all &= fixture.prompts[0].encoder_scores is not None or column != "flash attention"
            if cell(fixture, column) == "yes" and (any(skipped) if needs_all else all(skipped)):
                missing.append((name, column))
    return missing


def read() -> str:
    """The table that the page has."""
    text = PAGE.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write(new: str) -> None:
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + new + text[text.index(END) :])
