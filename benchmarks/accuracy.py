"""The configs behind the tables of ACCURACY.md, as a file for `star-edge eval --configs`.

    python benchmarks/accuracy.py methods > methods.json    every method at the same average tokens
    python benchmarks/accuracy.py pages > pages.json        the same on the page model
    python benchmarks/accuracy.py picture > picture.json    the few of them that a picture can hold
    python benchmarks/accuracy.py shapes > shapes.json      how to spend a budget: vision stage, both stages, layer K,
                                                            shares
    python benchmarks/accuracy.py table summary.json        what `star-edge eval --json` printed, as a table in Markdown
    python benchmarks/accuracy.py compare summary.json      the same, methods against budgets

Average tokens are for the reference model: 144 image tokens, 6 decoder layers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

N_LAYERS = 6
BUDGETS = (0.5, 0.25, 0.1)  # average tokens over the image's tokens
PLAIN = {"representatives": "none"}
# Defaults of decoder stages when the table of shapes was taken
THEN = {"decoder_scorer": "text", "decoder_share": 0.5, "seen_below": False}


def both(budget: float, layer: int, n_layers: int = N_LAYERS) -> dict:
    """Vision and decoder keep with n2 = n1 / 2 that average to the budget: (K n1 + (L - K) n2) / L."""
    ratio = 0.5
    vision = budget * n_layers / (layer + (n_layers - layer) * ratio)
    return {"vision_keep": vision, "decoder_keep": vision * ratio, "decoder_layer": layer}


def decoder_only(budget: float, layer: int, n_layers: int = N_LAYERS) -> dict | None:
    """Decoder keep that averages to the budget with all tokens before layer K, or None where there is none."""
    keep = (budget * n_layers - layer) / (n_layers - layer)
    return {"decoder_keep": keep, "decoder_layer": layer} if keep > 0 else None


def methods() -> Iterator[dict]:
    """Every method with today's defaults, published ones as published (dropped tokens are seen below the stage)."""
    for b in BUDGETS:

        def row(method: str, fields: dict, b: float = b) -> dict:
            return {"name": f"{method} {b:g}", "method": method, **fields}

        yield row("random", {"vision_keep": b, "vision_scorer": "random", **PLAIN})
        yield row("uniform", {"vision_keep": b, "vision_scorer": "uniform", **PLAIN})
        yield row("attention received (STAR stage 1)", {"vision_keep": b, **PLAIN})
        yield row("CLS attention (FasterVLM)", {"vision_keep": b, "vision_scorer": "cls", **PLAIN})
        yield row(
            "VisionZip",
            {"vision_keep": b, "vision_scorer": "cls", "representatives": "contextual", "vision_share": 10 / 64},
        )
        yield row("DivPrune", {"vision_keep": b, "vision_scorer": "maxmin", **PLAIN})
        yield row("SCOPE", {"vision_keep": b, "vision_scorer": "scope", **PLAIN})
        for layer in (2, 1):
            stage = decoder_only(b, layer)
            if stage and (layer == 2 or not decoder_only(b, 2)):
                yield row(f"FastV, K={layer}", {**stage, "decoder_scorer": "last", **PLAIN})
                yield row(f"STAR stage 2, K={layer}", {**stage, "decoder_scorer": "text", **PLAIN})
                yield row(f"SparseVLM raters, K={layer}", {**stage, "decoder_scorer": "raters", **PLAIN})
        if b == 0.5:
            yield row("PyramidDrop", {"windows": [[2, 0.5], [3, 0.25], [4, 0.125]], "decoder_scorer": "last", **PLAIN})
        yield row("STAR, K=2", {**both(b, 2), "decoder_scorer": "text", **PLAIN})
        yield row("STAR stage 1, re-numbered", {"vision_keep": b, "positions": "renumbered", **PLAIN})
        yield row("DivPrune + nearest masses", {"vision_keep": b, "vision_scorer": "maxmin", "vision_share": 0.0})
        yield row("attention + nearest masses", {"vision_keep": b, "vision_share": 0.0})
        yield row("clusters", {"vision_keep": b})
        yield row("clusters, re-numbered", {"vision_keep": b, "positions": "renumbered"})
        yield row("clusters, both stages, K=4", both(b, 4))
        yield row("clusters, random in the decoder", {**both(b, 4), "decoder_scorer": "random"})


def pages() -> Iterator[dict]:
    """For the page model (tools/pagevlm), 12 layers: `compare.py ask` takes them, and presets by name."""
    for name in ("quality", "balanced", "fast", "document"):
        yield {"name": name, "preset": name}
    for alike in ("exact", 0.05, 0.1):
        yield {"name": f"redundancy {alike}", "redundancy": alike}
    for share in (0.5, 0.25):
        yield {"name": f"picture {share}", "image_max_tokens": share}
    divprune, nearest = {"vision_scorer": "maxmin", **PLAIN}, {"vision_scorer": "maxmin", "vision_share": 0.0}
    for b in (0.5, 0.25):
        zip_ = {"vision_scorer": "cls", "representatives": "contextual", "vision_share": 10 / 64}
        rows = {
            "random": {"vision_keep": b, "vision_scorer": "random", **PLAIN},
            "uniform": {"vision_keep": b, "vision_scorer": "uniform", **PLAIN},
            "VisionZip": {"vision_keep": b, **zip_},
            "STAR, K=4": {**both(b, 4, 12), "decoder_scorer": "text", **PLAIN},
            "FastV, K=2": {**(decoder_only(b, 2, 12) or {}), **PLAIN},
            "DivPrune": {"vision_keep": b, **divprune},
            "DivPrune + nearest masses": {"vision_keep": b, **nearest},
            "clusters": {"vision_keep": b},
            "DivPrune, then K=8": {**both(b, 8, 12), **divprune},
            "DivPrune + nearest masses, then K=8": {**both(b, 8, 12), **nearest},
            "clusters, then K=8": both(b, 8, 12),
        }
        if b == 0.5:  # four equal parts of the depth average more than a quarter
            rows["PyramidDrop"] = {"windows": [[3, 0.535], [6, 0.286], [9, 0.153]], **PLAIN}
        for method, fields in rows.items():
            yield {"name": f"{method} {b:g}", "method": method, **fields}


def picture() -> Iterator[dict]:
    shown = (
        "clusters, both stages, K=4",
        "STAR, K=2",
        "DivPrune",
        "SCOPE",
        "VisionZip",
        "random",
        "uniform",
    )
    chosen = [config for config in methods() if config["method"] in shown]
    yield from sorted(chosen, key=lambda config: shown.index(config["method"]))


def shapes() -> Iterator[dict]:
    for b in BUDGETS:
        yield {"name": f"vision {b:g}", "method": "vision stage alone", "vision_keep": b}
        for layer in (1, 2, 3, 4):
            for share in (0.25, 0.5, 1.0):
                name = f"K={layer}, share {share:g}"
                yield {"name": f"{name}, {b:g}", "method": name, **THEN, **both(b, layer), "decoder_share": share}


def table(summary: dict) -> None:
    """A row for each config, in falling average tokens; accuracy in %, and of the difference from unpruned its 95%
    interval.
    """
    rows = sorted(summary["configs"], key=lambda row: -round(row["average_tokens"] / 5))
    families = list(rows[0]["accuracy_by_category"])
    print("| config | tokens |", " | ".join(families), "| all | relative | interval | same answer | KL |")
    print("|" + "---|" * (len(families) + 7))
    for row in rows:
        interval = "" if row["interval"] is None else " to ".join(f"{100 * x:+.1f}" for x in row["interval"])
        shares = [row["accuracy_by_category"][f] for f in families] + [row["accuracy"], row["relative_accuracy"]]
        cells = [row["name"], f"{row['average_tokens']:.1f}", *(f"{100 * x:.1f}" for x in shares), interval]
        print("|", " | ".join([*cells, f"{100 * row['agreement']:.1f}", f"{row['kl']:.3f}"]), "|")


def compare(summary: dict) -> None:
    """A row for each method, a column for each budget: accuracy in %, and KL divergence in nats."""
    unpruned = summary["configs"][0]
    cells = {row["method"]: {} for row in summary["configs"][1:]}
    for row in summary["configs"][1:]:
        cells[row["method"]][row["name"].rsplit(" ", 1)[1]] = f"{100 * row['accuracy']:.1f} ({row['kl']:.3f})"
    print(f"| unpruned {100 * unpruned['accuracy']:.1f} |", " | ".join(f"{100 * b:g}%" for b in BUDGETS), "|")
    print("|" + "---|" * (len(BUDGETS) + 1))
    for method, by_budget in cells.items():
        print("|", " | ".join([method, *(by_budget.get(f"{b:g}", "") for b in BUDGETS)]), "|")


if __name__ == "__main__":
    tables = {"methods": methods, "pages": pages, "picture": picture, "shapes": shapes}
    printers = {"table": table, "compare": compare}
    if len(sys.argv) == 3 and sys.argv[1] in printers:
        printers[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    elif len(sys.argv) == 2 and sys.argv[1] in tables:
        print(json.dumps(list(tables[sys.argv[1]]()), indent=1))
    else:
        sys.exit("usage: python benchmarks/accuracy.py methods|pages|picture|shapes, or table|compare SUMMARY.json")
