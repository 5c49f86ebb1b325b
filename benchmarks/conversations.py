"""Measures over the server what a second turn about a picture costs, when requests of other conversations came between.

    python benchmarks/conversations.py [--repeats N] [--json FILE] [--folder DIR]

A random 1.1B Llama with a CLIP-L/336 encoder answers on `star-edge serve`. Two conversations take turns: A1 B1 A2 B2.
Times are the client's, from sending a request to the first event of its stream: HTTP, base64 and decoding the picture
are in them. Turn 2 has the first question and its answer in its prompt, which are read again. Each round has new
pictures, and numbers are medians; ratios are of one conversation. Beside it the same with --prompt-cache-bytes 0.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import llama_cpp
import numpy as np
import PIL.Image
from rich.console import Console
from rich.table import Table

from star_edge import __version__
from star_edge.synthetic import SHAPES, model_files

CONFIGS = {
    "off": None,
    "vision stage, 0.5": {"vision_keep": 0.5},
    "vision stage, 0.25": {"vision_keep": 0.25},
    "balanced": "balanced",
}
LENGTHS = {"short": (16, 8), "long": (60, 60)}  # text tokens of a question, and of an answer
TEMPLATE = (
    "{{ 'a' * 34 }}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else p.image_url if p.image_url is string else p.image_url.url }}{% endfor %}"
    "{% endif %}\n{% endfor %}"
)


def picture(number: int) -> str:
    """A data: URL. The picture is noise, which takes more bytes than photos do."""
    pixels = np.random.default_rng(number).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def first_event(url: str, messages: list[dict], prune: object) -> tuple[float, dict]:
    """Seconds to the first event of a stream, and the report of its last one."""
    body = {"messages": messages, "prune": prune, "stream": True, "max_tokens": 2, "temperature": 0}
    data = json.dumps(body)
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    seconds = time.perf_counter() - start
    if answer.status != 200:
        raise RuntimeError(line.decode())
    events = [json.loads(line[6:]) for line in (line, *answer) if line.startswith(b"data: {")]
    connection.close()
    return seconds, next(event["star_edge"] for event in events if "star_edge" in event)


def conversation(number: int, n_question: int, n_answer: int) -> list[list[dict]]:
    """The messages of two turns."""
    parts = [
        {"type": "image_url", "image_url": {"url": picture(number)}},
        {"type": "text", "text": "b" * n_question},
    ]
    first = [{"role": "user", "content": parts}]
    more = [{"role": "assistant", "content": "c" * n_answer}, {"role": "user", "content": "d" * n_question}]
    return [first, first + more]


def measure(url: str, repeats: int, names: list[str]) -> list[dict]:
    rows = []
    number = 0
    for name in names:
        for length, (n_question, n_answer) in LENGTHS.items():
            first, second, parts = [], [], []
            for repeat in range(repeats + 1):
                turns = [conversation(number + i, n_question, n_answer) for i in range(2)]
                number += 2
                asked = [[first_event(url, turn[i], CONFIGS[name]) for turn in turns] for i in range(2)]
                if repeat:
                    first += [seconds for seconds, _ in asked[0]]
                    second += [seconds for seconds, _ in asked[1]]
                    parts.append(asked[1][0][1])
            rows.append(
                {
                    "config": name,
                    "text": length,
                    "first_s": statistics.median(first),
                    "second_s": statistics.median(second),
                    "share": statistics.median(b / a for a, b in zip(first, second)),
                    "spread": [min(b / a for a, b in zip(first, second)), max(b / a for a, b in zip(first, second))],
                    "reused_tokens": parts[-1]["reused_tokens"],
                    "cached_images": parts[-1]["n_cached"],
                    "milliseconds": parts[-1]["milliseconds"],
                }
            )
    return rows


def serve(files: tuple[Path, Path], template: Path, n_bytes: int, repeats: int, names: list[str]) -> list[dict]:
    command = [sys.executable, "-m", "star_edge", "serve", "-m", *map(str, files[:1]), "--mmproj", str(files[1])]
    options = ["--chat-template", str(template), "-c", "2048", "--port", "0", "--json"]
    server = subprocess.Popen(
        [*command, *options, "--prompt-cache-bytes", str(n_bytes)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        return measure(json.loads(server.stdout.readline())["url"], repeats, names)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", dest="configs", action="append", choices=list(CONFIGS), help="default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the models are kept; default: a temporary folder")
    options = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary, model_files(SHAPES["llava-1.1b"], options.folder) as files:
        template = Path(temporary) / "template.jinja"
        template.write_text(TEMPLATE)
        sides = {
            "1 GiB": serve(files, template, 2**30, options.repeats, options.configs or list(CONFIGS)),
            "0": serve(files, template, 0, 1, ["vision stage, 0.25"]),
        }
    result = {
        "versions": {"star_edge": __version__, "llama-cpp-python": llama_cpp.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "load": [load, os.getloadavg()]},
        "prompt_cache_bytes": sides,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    table = Table("prompt cache", "config", "text", "turn 1, s", "turn 2, s", "share", "spread", "rows not read again")
    for side, rows in sides.items():
        for row in rows:
            low, high = row["spread"]
            times = (f"{row['first_s']:.2f}", f"{row['second_s']:.2f}", f"{100 * row['share']:.1f}%")
            spread = f"{100 * low:.1f} to {100 * high:.1f}%"
            table.add_row(side, row["config"], row["text"], *times, spread, str(row["reused_tokens"]))
    console = Console()
    console.print(table)
    console.print(f"load average before and after: {load[0]:.1f}, {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
