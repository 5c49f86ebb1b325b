"""Requests a second of `star-edge serve --ray` with one replica and with two, of one thread each.

    python benchmarks/ray_replicas.py [--rounds 5] [--requests 16] [--out FILE]

Both servers run all the time, each on a Ray of its own, and are asked in turn; the idle one computes nothing. A replica
always has one request to answer and one that waits, and twice the replicas get twice the requests. Every picture is
new: no encoder output and no prompt is found again. The model is the one that reads pages (tools/pagevlm/model).
Printed: requests a second of each round, and the ratio of the medians. For a quiet machine with two cores or more.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from star_edge.synthetic.pictures import page

MODEL = Path(__file__).parent.parent / "tools" / "pagevlm" / "model"
COMMAND = (sys.executable, "-c", "from star_edge.cli import main; main()", "serve")
SIZE = (560, 560)
BLANK = page(*SIZE)
AT_ONCE = 2  # requests at a replica: serve_ray._AT_ONCE

numbers = itertools.count()


def body() -> bytes:
    """A request about a picture that no request has had."""
    pixels = BLANK.copy()
    number = next(numbers)
    for bit in range(16):
        pixels[:8, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is the title?"}]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return json.dumps(request).encode()


@contextlib.contextmanager
def server(replicas: int) -> Iterator[str]:
    """Address of a server with so many replicas."""
    (text,), (mmproj,) = MODEL.glob("*-text-*.gguf"), MODEL.glob("*-mmproj-*.gguf")
    process = subprocess.Popen(
        [*COMMAND, "-m", str(text), "--mmproj", str(mmproj), "--port", "0", "--json", "-t", "1"]
        + ["--ray", "--workers", str(replicas)],
        stdout=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit(f"the server with {replicas} replicas did not start: what it says is above")
        yield urllib.parse.urlsplit(json.loads(line)["url"]).netloc
    finally:
        process.terminate()
        process.wait(120)


def ask(address: str, data: bytes) -> None:
    connection = http.client.HTTPConnection(address, timeout=300)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            sys.exit(f"status {answer.status}: {text[:300]!r}")
        if any(image["cached"] for image in json.loads(text)["star_edge"]["images"]):
            sys.exit("a picture was known already: the times would mean nothing")


def rate(address: str, replicas: int, n: int) -> float:
    """Requests a second, of n for each replica."""
    bodies = [body() for _ in range(n * replicas)]
    with ThreadPoolExecutor(AT_ONCE * replicas) as pool:
        start = time.perf_counter()
        list(pool.map(lambda data: ask(address, data), bodies))
        return len(bodies) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="for each replica in a round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    with server(1) as one, server(2) as two:
        addresses = {1: one, 2: two}
        for replicas, address in addresses.items():  # the first requests find nothing warm
            rate(address, replicas, 4)
        for number in range(options.rounds):
            for replicas, address in addresses.items():
                found[replicas].append(rate(address, replicas, options.requests))
            print(f"round {number + 1}: {found[1][-1]:.2f} and {found[2][-1]:.2f} requests a second", flush=True)
    medians = {replicas: statistics.median(rates) for replicas, rates in found.items()}
    ratio = medians[2] / medians[1]
    print(f"medians {medians[1]:.2f} and {medians[2]:.2f}: two replicas answer {ratio:.2f} times as many")
    if options.out:
        options.out.write_text(json.dumps({"requests_per_s": found, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
