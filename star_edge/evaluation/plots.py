"""Pictures of a summary: accuracy against image tokens and against time, one line for each method."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .configs import OFF
from .summary import METRIC_TITLES

_ENDINGS = (".png", ".svg")
# Distinct for colour-blind readers too (Okabe and Ito, 2008), each with its own marker for prints in grey
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", ":", "-.")  # after seven methods the colours repeat
_GREY = "#555555"


def check(path: str) -> None:
    """Checks that a picture can be written, before anything is computed for it.

    Raises:
        EvaluationError: matplotlib is not installed, the ending is unknown, or the folder does not exist.
    """
    pyplot_module()
    if Path(path).suffix.lower() not in _ENDINGS:
        raise EvaluationError(f"{path} ends in neither {' nor '.join(_ENDINGS)}", "use one of these endings")
    if not Path(path).parent.is_dir():
        raise EvaluationError(f"the folder of {path} does not exist", "use an existing folder")


def save(summary: Mapping[str, Any], path: str) -> None:
    """Draws accuracy against average tokens per layer (left) and the median time to the first token (right).

    Without answers, agreement with the unpruned model takes the place of accuracy. Configs of one method are joined by
    a line. The unpruned model is a dashed line.

    Raises:
        EvaluationError: See `check`; or the file cannot be written.
    """
    key = "agreement" if summary["metric"] is None else "accuracy"
    off = next(row for row in summary["configs"] if row["name"] == OFF.name)
    methods = defaultdict(list)
    for row in summary["configs"]:
        if row is not off and row[key] is not None:
            methods[row["method"]].append(row)
    with drawing(path, 10, figsize=(10, 4.4), sharey=True) as (figure, axes):
        for axis, x, label in (
            (axes[0], "average_tokens", "image tokens per decoder layer, average"),
            (axes[1], "first_token_ms", "time to first token, ms (median)"),
        ):
            _draw(axis, methods, off, x, key)
            axis.set_xlabel(label)
        what = "same answer as unpruned" if summary["metric"] is None else METRIC_TITLES[summary["metric"]]
        axes[0].set_ylabel(f"{what}, %")
        set_title(figure, f"{summary['n_tasks']} questions, {summary['n_images']} images")
        if len(methods) > 1:
            set_legend(figure, axes[0])


@contextmanager
def drawing(path: str, font_size: float, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """Yields a figure of two pictures side by side and its axes, and writes it to a file.

    Raises:
        EvaluationError: See `check`; or the file cannot be written.
    """
    pyplot = pyplot_module()
    style = {"font.size": font_size, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, layout="constrained", **subplots)
        try:
            yield figure, axes
            figure.savefig(path, dpi=150, facecolor="white")
        except OSError as error:
            raise EvaluationError(
                f"{path} cannot be written ({error.strerror or error})", "use another place"
            ) from error
        finally:
            pyplot.close(figure)


def set_title(figure: Any, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_GREY)


def set_legend(figure: Any, axis: Any) -> None:
    """One legend below all, of what the axis shows: as many columns as fit the figure, which grows by their height.

    Names too long for a line are continued on the next one.
    """
    handles, labels = axis.get_legend_handles_labels()
    width = figure.bbox.width
    for ncols in range(min(4, len(labels)), 0, -1):
        legend = _legend(figure, handles, labels, ncols)
        if legend.get_window_extent().width <= width or ncols == 1:
            break
        legend.remove()
    for longest in (100, 70, 50, 35):
        if legend.get_window_extent().width <= width:
            break
        legend.remove()
        legend = _legend(figure, handles, [textwrap.fill(label, longest) for label in labels], 1)
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def _legend(figure: Any, handles: Any, labels: list[str], ncols: int) -> Any:
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    figure.canvas.draw()  # before that it has no size
    return legend


def _draw(axis: Any, methods: Mapping[str, list[dict[str, Any]]], off: Mapping[str, Any], x: str, key: str) -> None:
    axis.grid(axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    if off[key] is not None:
        axis.axhline(100 * off[key], color=_GREY, linestyle="--", linewidth=1)
        axis.plot([off[x]], [100 * off[key]], marker="*", markersize=11, color=_GREY, linestyle="none")
        axis.annotate("unpruned", (off[x], 100 * off[key]), (0, 7), textcoords="offset points", ha="right", color=_GREY)
    for i, (method, rows) in enumerate(methods.items()):
        rows = sorted(rows, key=lambda row: row[x])
        turn, place = divmod(i, len(_COLORS))
        style = {"color": _COLORS[place], "marker": _MARKERS[place], "linestyle": _LINES[turn % len(_LINES)]}
        axis.plot(
            [row[x] for row in rows],
            [100 * row[key] for row in rows],
            label=method,
            markersize=5,
            linewidth=1.6,
            **style,
        )
        if len(methods) == 1:
            for row in rows:
                axis.annotate(row["name"], (row[x], 100 * row[key]), (6, -11), textcoords="offset points", fontsize=8)
    axis.margins(y=0.12)  # room for the names below the lowest points
    right = max(
        [row[x] for rows in methods.values() for row in rows] + ([off[x]] if off[x] is not None else []), default=1
    )
    axis.set_xlim(0, right * (1.12 if len(methods) == 1 else 1.05))


def pyplot_module() -> Any:
    """matplotlib.pyplot without a window system. It is imported here because it is an optional dependency."""
    try:
        import matplotlib
    except ImportError as error:
        raise EvaluationError(
            "pictures of results need matplotlib, which is not installed", "pip install 'star-edge[plot]'"
        ) from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
