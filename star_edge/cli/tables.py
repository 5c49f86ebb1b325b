"""Tables that fit the terminal: columns go, and what is in a cell is never cut."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Columns in the order in which they are given up where a terminal is narrow: the last of these goes first. Those that
# are not here, such as categories of questions and stages of a benchmark, go before them, from the right. The first
# column of a table, which has the names, always stays.
STAY_LONGEST = (
    "answer",
    "description",
    "after the encoder",
    "from layer K on",
    "all",
    "accuracy",
    "F1",
    "first token, ms",
    "speed-up",
    "tokens per layer",
    "image tokens per layer",
    "relative accuracy, %",
    "same answer, %",
    "errors",
    "tokens/s",
    "encode",
    "prefill",
    "resume",
    "probe",
    "95% interval of difference",
    "KV MiB",
    "peak RSS, MiB",
    "GPU memory, MiB",
    "truth",
    "n",
    "p",
    "layer K",
    "average per layer",
    "whole groups",
    "min to max",
    "ideal",
    "decoder speed-up",
    "free GiB",
    "total GiB",
)
_UNLIMITED = 100_000  # characters a line


def make_console() -> Console:
    """A console on stdout. Its width is COLUMNS, otherwise the terminal's; a pipe and a file have no width."""
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        return Console(width=width, height=height)  # both: rich takes one alone for a hint
    return Console(width=_UNLIMITED)


def print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    n_left: int = 1,
    styles: Sequence[str | None] = (),
) -> None:
    """Prints a table without the columns that do not fit, and says which those are.

    Args:
        console: See `make_console`.
        title: The line above it.
        header: Titles of the columns, which are broken at spaces where the table would not fit otherwise.
        rows: Cells, as many in each row as there are titles.
        n_left: So many columns are aligned at the left, the others at the right.
        styles: rich's style of each row.
    """
    shown = list(range(len(header)))

    def table(broken: bool) -> Table:
        return _table(console, header, rows, shown, broken, n_left, styles)

    def fits(broken: bool) -> bool:
        options = console.options.update(width=_UNLIMITED)
        return console.measure(table(broken), options=options).maximum <= console.width

    broken = not fits(False)
    while broken and len(shown) > 1 and not fits(True):
        shown.remove(_next_to_go(header, shown))
    console.print(title, markup=False, highlight=False)
    console.print(table(broken))
    left_out = [title for i, title in enumerate(header) if i not in shown]
    if left_out:
        console.print(
            f"Not shown at this width: {'; '.join(left_out)}. A wider terminal, a pipe and --json have all.",
            markup=False,
            highlight=False,
        )


def _next_to_go(header: Sequence[str], shown: Sequence[int]) -> int:
    rank = {title: i for i, title in enumerate(STAY_LONGEST)}
    return max(shown[1:], key=lambda i: (rank.get(header[i], len(rank)), i))


def _table(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    shown: Sequence[int],
    broken: bool,
    n_left: int,
    styles: Sequence[str | None],
) -> Table:
    table = Table()
    for place, i in enumerate(shown):
        cells = max((len(row[i]) for row in rows), default=0)
        words = max((len(word) for word in header[i].split()), default=1)
        title = header[i]
        if broken:
            title = textwrap.fill(title, max(cells, words), break_long_words=False, break_on_hyphens=False)
        # A name longer than half of the width goes on in the next line
        most = None if place else max(console.width // 2, 20)
        table.add_column(escape(title), justify="left" if i < n_left else "right", overflow="fold", max_width=most)
    for row, style in zip(rows, styles or [None] * len(rows)):
        table.add_row(*(escape(row[i]) for i in shown), style=style)
    return table
