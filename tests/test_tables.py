"""Tables of the command at any width, and the legends of its plots."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from star_edge.benchmarking.plots import save as save_bench_plot
from star_edge.benchmarking.sides import STAGES
from star_edge.benchmarking.summary import tables as bench_tables
from star_edge.cli.tables import STAY_LONGEST, make_console, print_table
from star_edge.evaluation import plots
from star_edge.evaluation.configs import OFF
from star_edge.evaluation.summary import tables as eval_tables

NAMES = ["off", "quality", "a name with several words that is longer than half of a narrow terminal", "x" * 70]


# ---- tables ----


def printed(width, table, **options):
    console = Console(width=width, file=io.StringIO(), **options)
    print_table(console, *table)
    return console.file.getvalue()


def eval_summary(names=NAMES, categories=("color", "count", "digit", "exist", "number", "where")):
    row = {
        "accuracy_by_category": dict.fromkeys(categories, 0.5),
        "group_accuracy": None,
        "interval": (-0.125, 0.0625),
        "mcnemar_p": 0.0123,
        "n_scored": 12345,
        "accuracy": 0.75,
        "pope": {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5},
        "average_tokens": 1234.5,
        "relative_accuracy": 0.99,
        "agreement": 0.98,
        "kl": 0.001,
        "first_token_ms": 12345.6,
        "speed_up": 12.34,
        "n_errors": 7,
    }
    rows = [{"name": name, "method": name, **row} for name in names]
    return {"metric": "pope", "n_tasks": 3, "n_images": 2, "configs": rows}


def bench_result(names=NAMES):
    spread = {"median": 12345.6, "min": 11111.1, "max": 22222.2}
    row = {
        "kind": "star_edge",
        "image_tokens": 4096,
        "average_tokens": 1234.5,
        "first_token_ms": spread,
        "stages_ms": dict.fromkeys(STAGES, 1543.2),
        "tokens_per_s": spread,
        "selection_share": 0.001,
        **dict.fromkeys(("speed_up", "ideal", "decoder_speed_up", "of_ideal"), 1.23),
        **dict.fromkeys(("kv_bytes", "kv_bytes_needed", "peak_rss_bytes", "device_bytes"), 2**30),
        **dict.fromkeys(("kv_cells", "n_ctx_needed"), 4096),
    }
    return {"title": "a model", "reference": names[0], "sides": [{"name": name, **row} for name in names]}


TABLES = [
    *((t.title, t.header, t.rows) for t in eval_tables(eval_summary())),
    *((t.title, t.header, t.rows) for t in bench_tables(bench_result())),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table[0][:20])
@pytest.mark.parametrize("width", [40, 80, 100, 200, 100_000])
def test_tables_fit(table, width):
    """No line is wider; names and figures are whole; a figure stands in the row of its name; and what is missing is
    named, in the stated order.
    """
    _, header, rows = table
    out = printed(width, table)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width and "…" not in out
    body = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in body]
    # A long name goes on in further lines, whose other cells are empty
    names = []
    for row in cells:
        if row[1:] and not any(row[1:]):
            names[-1] += row[0]
        else:
            names.append(row[0])
    squeezed = lambda text: text.replace(" ", "")
    assert [squeezed(name) for name in names] == [squeezed(row[0]) for row in rows]
    footer = " ".join(out.split()).partition("Not shown at this width: ")[2].partition(". A wider")[0]
    shown = [i for i, title in enumerate(header) if title not in footer.split("; ")]
    assert len(shown) >= 2 and 0 in shown
    figures = [row[1:] for row in cells if any(row[1:])]
    assert figures == [[row[i] for i in shown[1:]] for row in rows]
    rank = lambda i: STAY_LONGEST.index(header[i]) if header[i] in STAY_LONGEST else len(STAY_LONGEST) + i
    gone = [i for i in range(len(header)) if i not in shown]
    assert not gone or max(map(rank, shown[1:])) < min(map(rank, gone))
    assert (not gone) == (width == 100_000) or width == 200


def test_what_the_table_test_catches():
    """rich alone cuts or wraps cells where a terminal is narrow."""
    table = ("", ["config", *("n" * 9 for _ in range(12))], [["a", *("123456789" for _ in range(12))]])
    assert "Not shown" in printed(80, table) and "Not shown" not in printed(200, table)


def test_columns_are_ranked_once():
    assert len(set(STAY_LONGEST)) == len(STAY_LONGEST)


def test_a_pipe_has_no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width > 10_000
    monkeypatch.setenv("COLUMNS", "72")
    assert make_console().width == 72


@pytest.mark.skipif(sys.platform == "win32", reason="pty")
@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_has_its_width(columns):
    """On a real terminal of that width."""
    import fcntl
    import pty
    import struct
    import termios

    code = (
        "from star_edge.cli.tables import make_console, print_table; "
        "print_table(make_console(), 't', ['name', *('column %d' % i for i in range(30))], [['x', *['12345'] * 30]])"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, env={**env, "TERM": "dumb"}
    ) as process:
        os.close(theirs)
        out = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            out += part
        assert process.wait(60) == 0
    os.close(ours)
    lines = out.decode().splitlines()
    assert columns // 2 < max(map(len, lines)) <= columns and "Not shown at this width" in out.decode()


# ---- plots ----


def legend_of(monkeypatch, draw):
    """(legend's, figure's, its pictures') boxes in pixels, and the legend's texts, when the file is written."""
    import matplotlib.figure

    seen = []
    save = matplotlib.figure.Figure.savefig

    def watched(figure, *args, **options):
        figure.canvas.draw()
        legend = figure.legends[0]
        seen.append(
            (
                legend.get_window_extent(),
                figure.bbox.frozen(),
                [axis.get_tightbbox() for axis in figure.axes],
                [text.get_text() for text in legend.get_texts()],
            )
        )
        return save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    draw()
    return seen[0]


@pytest.mark.parametrize(
    "names",
    [
        ["quality", "fast"],
        [f"grid vision {i / 10} picture 0.{i} vision_scorer=attention decoder_share=0.5" for i in range(9)],
        ["a very long name " * 20, "short"],
    ],
    ids=["two", "nine long", "one very long"],
)
def test_legends_are_whole(monkeypatch, tmp_path, names):
    """The legend lies within the picture and beside the axes, and has every name."""
    pytest.importorskip("matplotlib")
    summary = eval_summary([OFF.name, *names])
    for draw in (
        lambda: plots.save({**summary, "metric": "exact"}, str(tmp_path / "a.png")),
        lambda: save_bench_plot(bench_result([name[:100] for name in names]), str(tmp_path / "b.png")),
    ):
        legend, figure, axes, _ = legend_of(monkeypatch, draw)
        assert figure.x0 <= legend.x0 and legend.x1 <= figure.x1 and figure.y0 <= legend.y0
        assert all(box.y0 >= legend.y1 - 1 and box.height > 100 for box in axes)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_legends_have_all_names(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    names = ["a very long name " * 20, "short"]
    summary = {**eval_summary([OFF.name, *names]), "metric": "exact"}
    *_, texts = legend_of(monkeypatch, lambda: plots.save(summary, str(tmp_path / "a.svg")))
    assert [" ".join(text.split()) for text in texts] == [" ".join(name.split()) for name in names]
