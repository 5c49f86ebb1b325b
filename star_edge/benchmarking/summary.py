"""The summary of a benchmark's samples: plain data for JSON, and tables of texts."""

from __future__ import annotations

import statistics
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ..evaluation.summary import TextTable
from ..report import round_n_ctx
from .sides import DECODER_STAGES, STAGES, Sample, SideSpec

SELECTION_STAGES = ("redundancy", "encoder_stage", "vision_stage", "decoder_stage")


def summarise(
    specs: Sequence[SideSpec],
    samples: Mapping[str, Sequence[Sample]],
    cache_bytes: Mapping[str, int],
    n_layers: int,
) -> dict[str, Any]:
    """{"reference": name, "n_layers": n, "sides": [...]} for the sides that have samples, in the order of specs.

    The reference is stock with flash attention, or else the first side. Speed-ups are over it. For each side:

    - encoder_entered, encoder_kept: image tokens that enter the encoder, and those that leave it.
    - first_token_ms: median, min and max over the repeats, and all values in order of time.
    - stages_ms: of the median repeat, or the mean of the two middle ones of an even number. They add up to the median.
    - tokens_per_s: of tokens after the first, 1 / (median time of a token); median, min and max over the repeats.
    - decoder_ms: the decoder's stages without choosing what stays, median over the repeats.
    - speed_up, decoder_speed_up: the reference's median time over this side's.
    - decoder_ideal: token-layers of the reference's prompt over this side's. It is the decoder's speed-up if its time
      is proportional to the rows that it computes.
    - ideal: the same for the time to the first token, if the rest takes as long as on the reference:
      T / (T - D + D / decoder_ideal), where D is the decoder's part of the reference's time T.
    - of_ideal: decoder_speed_up / decoder_ideal.
    - selection_share: scoring and choosing in all stages, as a share of the time to the first token. None on stock.
    - kv_cells, kv_bytes: KV cells of the prompt when generation starts (in one layer), and their bytes (in all layers).
    - n_ctx_needed, kv_bytes_needed: the smallest n_ctx that request and answer fit, and the cache's size with it.
    - peak_rss_bytes, device_bytes: None, for `memory.measure` to fill in.
    """
    present = [spec for spec in specs if spec.name in samples]
    reference = next(
        (s for s in present if s.kind == "stock" and s.flash_attn and s.image_max_tokens is None and not s.converted),
        present[0],
    )
    base = samples[reference.name][0]  # for its tokens, which are those of every repeat
    base_time, _ = _median_stages(samples[reference.name])
    rows = []
    for spec in present:
        all_of = samples[spec.name]
        first = all_of[0]
        time, stages = _median_stages(all_of)
        rates = [1 / statistics.median(s.tokens) for s in all_of if s.tokens]
        decoder_ideal = _token_layers(base, n_layers) / _token_layers(first, n_layers)
        decoder, base_decoder = _decoder(all_of), _decoder(samples[reference.name])
        report = first.report
        n_ctx = round_n_ctx(first.n_cells + 1 + len(first.tokens)) if report is None else report.n_ctx_needed
        rows.append(
            {
                "name": spec.name,
                "kind": spec.kind,
                "config": None if spec.prune is None else spec.prune.to_dict(),
                "text_tokens": first.n_text,
                "image_tokens": first.n_image,
                "encoder_entered": first.n_image - report.n_redundant if report else first.n_image,
                "encoder_kept": report.n_encoder_kept if report else first.n_image,
                "encoder_layer": report.encoder_layer if report else None,
                "vision_kept": report.n_vision_kept if report else None,
                "decoder_kept": report.n_decoder_kept if report else None,
                "decoder_layer": report.decoder_layer if report else None,
                "average_tokens": first.average_tokens,
                "first_token_ms": {
                    **_spread([1e3 * s.first_token for s in all_of]),
                    "all": [1e3 * s.first_token for s in all_of],
                },
                "stages_ms": {name: 1e3 * stages[name] for name in STAGES},
                "tokens_per_s": _spread(rates) if rates else None,
                "decoder_ms": 1e3 * decoder,
                "speed_up": base_time / time,
                "ideal": base_time / (base_time - base_decoder * (1 - 1 / decoder_ideal)),
                "decoder_speed_up": base_decoder / decoder,
                "decoder_ideal": decoder_ideal,
                "of_ideal": base_decoder / decoder / decoder_ideal,
                "selection_share": sum(stages[n] for n in SELECTION_STAGES) / time if report else None,
                "kv_cells": first.n_cells,
                "kv_bytes": cache_bytes[spec.name],
                "n_ctx_needed": n_ctx,
                "kv_bytes_needed": round(cache_bytes[spec.name] * n_ctx / first.n_cells),
                "peak_rss_bytes": None,
                "device_bytes": None,
                "notes": list(report.notes) if report else [],
            }
        )
    return {"reference": reference.name, "n_layers": n_layers, "sides": rows}


def _median_stages(samples: Sequence[Sample]) -> tuple[float, dict[str, float]]:
    """The median time to the first token in seconds, and the stages of the one or two repeats behind it."""
    ordered = sorted(samples, key=lambda s: s.first_token)
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    stages = {name: statistics.mean(s.stages[name] for s in middle) for name in STAGES}
    return statistics.median(s.first_token for s in samples), stages


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _decoder(samples: Sequence[Sample]) -> float:
    """The decoder's time in seconds, median over the repeats."""
    stages = [sample.stages for sample in samples]
    return statistics.median([sum(s[name] for name in DECODER_STAGES) - s["decoder_stage"] for s in stages])


def _token_layers(sample: Sample, n_layers: int) -> float:
    return n_layers * (sample.n_text + sample.average_tokens)


def tables(result: Mapping[str, Any]) -> list[TextTable]:
    """What counts, where the time to the first token goes, and memory: the columns of `text_table` in three tables."""
    header, rows = text_table(result)
    memory = {"KV cells", "KV MiB", "n_ctx needed", "KV MiB with it", *_MEMORY.values()}
    stages = set(_TITLES.values())

    def some(title: str, names: Container[str]) -> TextTable:
        places = [0, *(i for i, name in enumerate(header) if name in names)]
        return TextTable(title, [header[i].strip() for i in places], [[row[i] for i in places] for row in rows])

    return [
        some(result.get("title", ""), set(header[1:]) - memory - stages),
        some("Time to the first token, ms", {"first token, ms", *stages, "selection"}),
        some("Memory", memory),
    ]


def text_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header, and one row of texts for each side. Stages that no side has are left out."""
    sides = result["sides"]
    stages = [name for name in STAGES if any(row["stages_ms"].get(name) for row in sides)]
    memory = [key for key in _MEMORY if any(row[key] is not None for row in sides)]
    encoder = [
        key for key in _ENCODER if any(row.get(key, row["image_tokens"]) != row["image_tokens"] for row in sides)
    ]
    header = [
        "side",
        *(_ENCODER[key] for key in encoder),
        "image tokens per layer",
        "first token, ms",
        "min to max",
        *(_TITLES[name] for name in stages),
        "speed-up",
        "ideal",
    ]
    header += [
        "decoder speed-up",
        "of its ideal",
        "selection",
        "tokens/s",
        "KV cells",
        "KV MiB",
        "n_ctx needed",
        "KV MiB with it",
        *(_MEMORY[key] for key in memory),
    ]
    return header, [_cells(row, stages, memory, encoder) for row in sides]


def _cells(row: Mapping[str, Any], stages: Sequence[str], memory: Sequence[str], encoder: Sequence[str]) -> list[str]:
    time, rate, share = row["first_token_ms"], row["tokens_per_s"], row["selection_share"]

    def mib(n: int | None) -> str:
        return "-" if n is None else f"{n / 2**20:.1f}" if n < 100 * 2**20 else f"{n / 2**20:.0f}"

    texts = [row["name"], *(str(row[key]) for key in encoder), f"{row['average_tokens']:.1f}"]
    texts += [_ms(time["median"]), f"{_ms(time['min'])}-{_ms(time['max'])}"]
    texts += [_ms(row["stages_ms"][name]) if row["stages_ms"].get(name) else "-" for name in stages]
    texts += [f"{row[key]:.2f}" for key in ("speed_up", "ideal", "decoder_speed_up", "of_ideal")]
    texts += [
        "-" if share is None else f"{100 * share:.2f}%",
        "-" if rate is None else f"{rate['median']:.1f}",
        str(row["kv_cells"]),
    ]
    texts += [mib(row["kv_bytes"]), str(row["n_ctx_needed"])]
    return texts + [mib(row[key]) for key in ("kv_bytes_needed", *memory)]


_TITLES = {name: f"  {name.replace('_', ' ')}" for name in STAGES} | {"first_token": "  sampling, Python"}
_ENCODER = {"encoder_entered": "tokens into the encoder", "encoder_kept": "tokens out of it"}
_MEMORY = {"peak_rss_bytes": "peak RSS, MiB", "device_bytes": "GPU memory, MiB"}


def _ms(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
