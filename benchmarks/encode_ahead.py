"""Measures whether encoding the next request's pictures beside an answer pays, on a random 1.1B LLaVA.

    python benchmarks/encode_ahead.py [--rounds N] [--requests N] [--folder DIR] [--json FILE]

Requests arrive at once, each with a picture of its own and an answer of 48 tokens, and are answered in turn by
`star-edge serve`. The time is that from the first request to the last answer. Sides are interleaved, each round with a
new server; numbers are medians. Threads are the decoder's and the encoder's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conversations import TEMPLATE, picture
from rich.console import Console
from rich.table import Table

from star_edge.synthetic import SHAPES, model_files

N_TOKENS = 48


def ask(url: str, number: int) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": picture(number)}}, {"type": "text", "text": "b" * 16}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": N_TOKENS, "min_tokens": N_TOKENS}
    data = json.dumps({**body, "prune": "balanced", "temperature": 0}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["star_edge"]


def measure(files: tuple[Path, Path], template: Path, threads: int, ahead: bool, n: int, first: int) -> dict:
    options = ["--mmproj", str(files[1]), "-c", "2048", "-t", str(threads), "--port", "0", "--json"]
    options += ["--chat-template", str(template), "--encode-ahead" if ahead else "--no-encode-ahead"]
    server = subprocess.Popen(
        [sys.executable, "-m", "star_edge", "serve", "-m", str(files[0]), *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        ask(url, first)  # warm
        start = time.perf_counter()
        with ThreadPoolExecutor(n) as pool:
            reports = list(pool.map(lambda i: ask(url, first + 1 + i), range(n)))
        seconds = time.perf_counter() - start
    finally:
        server.terminate()
        server.wait()
    rates = [report["tokens_per_s"] for report in reports]
    encodes = [report["milliseconds"].get("ahead", report["milliseconds"]["encode"]) for report in reports]
    return {"seconds": seconds, "tokens_per_s": statistics.median(rates), "encode_ms": statistics.median(encodes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the models are kept; default: a temporary folder")
    options = parser.parse_args()
    n_cores = os.cpu_count() or 2
    sides = [(t, ahead) for t in (n_cores, max(1, n_cores // 2)) for ahead in (False, True)]
    found: dict[tuple[int, bool], list[dict]] = {side: [] for side in sides}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary, model_files(SHAPES["llava-1.1b"], options.folder) as files:
        template = Path(temporary) / "template.jinja"
        template.write_text(TEMPLATE)
        number = 0
        for _ in range(options.rounds):
            for side in sides:
                found[side].append(measure(files, template, *side, options.requests, number))
                number += options.requests + 1
    table = Table("threads", "encoded", "seconds", "range", "tokens/s of an answer", "encoding, ms")
    rows = []
    for (threads, ahead), runs in found.items():
        seconds = [run["seconds"] for run in runs]
        rate, encode = (statistics.median(run[name] for run in runs) for name in ("tokens_per_s", "encode_ms"))
        rows.append({"threads": threads, "ahead": ahead, "seconds": seconds, "tokens_per_s": rate, "encode_ms": encode})
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        words = "ahead" if ahead else "in turn"
        table.add_row(str(threads), words, f"{statistics.median(seconds):.1f}", spread, f"{rate:.1f}", f"{encode:.0f}")
    if options.json:
        options.json.write_text(json.dumps({"cores": n_cores, "load": [load, os.getloadavg()[0]], "sides": rows}))
    console = Console()
    console.print(f"{options.requests} requests at once, {N_TOKENS} tokens each, on {n_cores} cores")
    console.print(table)
    console.print(f"load average before and after: {load:.1f}, {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
