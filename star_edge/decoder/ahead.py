"""The question looks ahead: attention of layers above K over rows that have stopped at layer K.

In early layers a question does not know yet which rows it will read, so a stage there would choose blindly. What it
will read can be seen before the rows are computed any further: a row that has stopped at layer K gets, in each layer
above it, keys and values of the state in which it stopped, and the text after the last image goes on over these. The
values are not those that the layers will have, and an answer read from them is wrong; which rows are attended to is
mostly right (ACCURACY.md, "Looking ahead"). So it ranks, and nothing else is taken from it.

    rows up to the last image    a decode of the window [l, l) for each layer l after K: its keys and values, alone
    text after the last image    one decode of the window [K, last), whose attention is read on the way

Keys and values of stopped rows by an early state are SwiftKV's (arXiv 2410.03960) and CALM's (arXiv 2207.07061, section
3.2.1), which answer with them and are trained for it or exit late.

All rows come back to their own cells, as in cells.py. In layers from K on the resume writes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..llamacpp.tap import Plan
from ..rows import Segment
from .cells import Cells
from .windows import ReceivedAttention, WindowEnd, Windows

LAST_ROWS = 4


def look_ahead(
    windows: Windows,
    cells: Cells,
    segments: Sequence[Segment],
    n_after: int,
    start: int,
    layer: int,
    layers: tuple[int, int],
    end: WindowEnd,
    text_rows: str,
) -> tuple[WindowEnd, bool]:
    """Ranks by what the text after the last image will attend to.

    Args:
        windows: The prompt's windows.
        cells: Its KV cells.
        segments: All rows that layer K sees, from the first image on.
        n_after: Segments of text after the last image.
        start: Rows before them in the cache.
        layer: Layer K.
        layers: The first and the last layer whose attention counts. The last one is after K.
        end: What the window before layer K has left.
        text_rows: As in DecoderStage.

    Returns:
        `end` with that attention, its mean over the layers; and whether all rows came back to their cells.
    """
    n_layers = windows.context.n_layers
    stem, text = segments[: len(segments) - n_after], segments[len(segments) - n_after :]
    n_stem = sum(len(s.rows) for s in stem)
    states = end.hidden
    assert states is not None  # of a window that ends below the last layer
    found = np.empty(len(states), np.int64)

    def decode(part: Sequence[Segment], at: int, plan: Plan, received: ReceivedAttention | None = None) -> None:
        for rows, causal in windows.decodes(part):
            n = len(rows)
            plan = replace(plan, inject=states[at : at + n], want_cells=True)
            if received is not None:
                plan.attention = received.read(at + n, n, counted)
            outcome = windows.decode(rows, plan, "look ahead", causal)
            if received is not None:
                received.add(outcome)
            assert outcome.cells is not None  # want_cells
            found[at : at + n] = outcome.cells
            at += n

    for stopped in range(layer + 1, layers[1] + 1):
        cells.rewind(start)
        decode(stem, 0, Plan(window=(stopped, stopped, n_layers)))
    counted = list(range(max(layer, layers[0]), layers[1] + 1))
    received = ReceivedAttention(windows, len(states), text_rows, _last_rows(windows.n_scoring))
    decode(text, n_stem, Plan(window=(layer, layers[1], n_layers)), received)
    attention, row_attention = received.at(found)
    return replace(end, attention=attention, row_attention=row_attention), bool(np.array_equal(found, end.cells))


def _last_rows(n_text: int) -> list[float]:
    """What each row counts of those that "last" stands for: the mean of the last row and of the last four.

    Either alone, and the mean of all rows, is behind that on one picture model or the other (ACCURACY.md, "Looking
    ahead"). n_text: rows of text after the last image.
    """
    n = min(LAST_ROWS, n_text)
    return [1 / n] * (n - 1) + [1 + 1 / n]
