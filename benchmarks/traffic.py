"""What a pruned request costs a GPU in copies and waits, by arithmetic (docs/gpu.md).

    python benchmarks/traffic.py [--check]

Counts of each decode are those that tests/test_traffic.py states; bytes follow from the model's sizes. --check compares
them with what the tap counts while the bundled model answers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from star_edge.synthetic.shapes import SHAPES, DecoderShape

MIB = 2.0**20
UBATCH = 512  # rows of a decode at most
KV_PADDING = 256  # the cache is attended to in blocks of so many cells


@dataclass(frozen=True)
class Cost:
    """Waits at nodes, reads, writes, and bytes of both."""

    stops: int = 0
    reads: int = 0
    writes: int = 0
    read_bytes: float = 0
    written_bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder: width, bytes of K in one cell of a layer, bytes of q in one row, RoPE numbers of a row."""

    n_embd: int
    k_bytes: int
    q_bytes: int
    n_positions: int

    @classmethod
    def of(cls, shape: DecoderShape) -> Model:
        head_dim = shape.n_embd // shape.n_heads
        return cls(shape.n_embd, shape.n_heads_kv * head_dim * 2, shape.n_embd * 4, 4 if shape.rope_sections else 1)


def read(n_bytes: float) -> Cost:
    return Cost(0, 1, 0, n_bytes, 0)


def written(n_bytes: float) -> Cost:
    return Cost(0, 0, 1, 0, n_bytes)


def padded(n_cells: int) -> int:
    return -(-n_cells // KV_PADDING) * KV_PADDING


def mask(n_rows: int, n_cells: int) -> Cost:
    """The attention mask with masses: read, and written. Half floats, as flash attention takes it."""
    n_bytes = n_rows * padded(n_cells) * 2
    return read(n_bytes) + written(n_bytes)


def pieces(n: int) -> list[int]:
    return [min(UBATCH, n - at) for at in range(0, n, UBATCH)]


def prefill(model: Model, before: int, images: int, after: int, kept: int) -> dict[str, Cost]:
    """A prompt with a decoder stage and masses.

    images: rows of one image, or of several that have lost tokens and have nothing between them: they share decodes.
    kept: how many of these stay.
    """
    state = model.n_embd * 4
    cost = {"prefix": Cost(), "probe": Cost(), "scores": Cost(), "resume": Cost()}
    for n in pieces(before):
        cost["prefix"] += read(n * 8)
    n_cells = before
    for segment in (images, after):
        for n in pieces(segment):
            n_cells += n
            cost["probe"] += Cost(stops=2) + read(n * 8) + read(n * state)
            cost["probe"] += written(n * model.n_positions * 4) + mask(n, n_cells)
    # The attention of the last row alone scores (decoder_scorer="last"), over all that is in the cache
    cost["scores"] = read(model.q_bytes) + read(padded(n_cells) * model.k_bytes) + read(padded(n_cells) * 2)
    for n in pieces(kept + after):
        cost["resume"] += Cost(stops=1) + read(n * 8) + written(n * state)
        cost["resume"] += written(n * model.n_positions * 4) + mask(n, n_cells)
    return cost


def token(model: Model, n_cells: int, seen_below: bool = True) -> Cost:
    """One token after it: positions; the mask, for each level of what is seen."""
    n_bytes = model.n_positions * 4
    cost = read(n_bytes) + written(n_bytes) + mask(1, n_cells)
    return cost + Cost(stops=1) + written(padded(n_cells) * 2) if seen_below else cost


REQUESTS = (
    ("llava-1.5-7b", "n1=192, n2=94", 192, 94),
    ("llava-next-7b", "n1=1080, n2=540", 1080, 540),
    ("llava-next-7b", "n1=346, n2=173", 346, 173),
    ("qwen2.5-vl-3b", "n1=384, n2=192", 384, 192),
)
TEXT = (35, 40)  # tokens before and after the image


def compare() -> tuple[Cost, Cost]:
    """What the tap counts while the bundled model reads a prompt with two images, and what is reckoned for it."""
    from star_edge import PruneConfig, StarVLM, refvlm

    options = {"n_ctx": 1024, "n_threads": 1, "image_cache_bytes": 0, "reuse": False}
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **options) as vlm:
        vlm.decoder.tap.take_traffic()
        pictures = [refvlm.DEMO_IMAGE, refvlm.DEMO_IMAGE]
        _, report = vlm.read_prompt("what color is the star?", pictures, PruneConfig(0.3, 0.15))
        t = vlm.decoder.tap.take_traffic()
        counted = Cost(t.n_stops, t.n_reads, t.n_writes, t.read_bytes, t.written_bytes)
        n_heads = int(vlm.llama.metadata["llama.attention.head_count"])
        n_heads_kv = int(vlm.llama.metadata["llama.attention.head_count_kv"])
        n_embd = vlm.decoder.n_embd
    model = Model(n_embd, n_embd // n_heads * n_heads_kv * 2, n_embd * 4, 1)
    parts = prefill(model, 2, report.n_vision_kept, report.n_text_tokens - 2, report.windows[0][1])
    return counted, sum(parts.values(), Cost())


def table() -> list[str]:
    """The table of docs/gpu.md, line by line."""
    lines = ["| model | | waits | reads | MiB | writes | MiB |", "|---|---|---:|---:|---:|---:|---:|"]
    for name, tokens, images, kept in REQUESTS:
        model = Model.of(SHAPES[name].decoder)
        prompt = sum(prefill(model, TEXT[0], images, TEXT[1], kept).values(), Cost())
        answer = token(model, sum(TEXT) + images)
        for what, step, c in ((f"{name}, {tokens}", "the prompt", prompt), ("", "a token of the answer", answer)):
            numbers = f"{c.stops} | {c.reads} | {c.read_bytes / MIB:.3f} | {c.writes} | {c.written_bytes / MIB:.3f}"
            lines.append(f"| {what} | {step} | {numbers} |".replace("|  |", "| |"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is counted on the bundled model")
    if parser.parse_args().check:
        print("counted  {}\nreckoned {}".format(*compare()))
    else:
        print("\n".join(table()))


if __name__ == "__main__":
    main()
