"""Requests a second of `star-edge serve --ray` with one replica and with two, of one thread each.

    python benchmarks/ray_replicas.py [--rounds 5] [--requests 16] [-m TEXT --mmproj MMPROJ] [--side 560] [--out FILE]

Beside them stand one and two servers without Ray: what two processes can do on this machine. All servers run all the
time, each Ray of its own, and are asked in turn; the idle ones compute nothing. A replica, and a server without Ray,
always has one request to answer and one that waits, and twice the replicas get twice the requests. Every picture is
new: no encoder output and no prompt is found again. The model is the one that reads pages (tools/pagevlm/model), or
another (`star-edge bench --shape NAME --folder DIR` leaves models of real shapes in DIR).
Printed: requests a second of each round, and ratios of medians. For a quiet machine with two cores or more.
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

import numpy as np
from PIL import Image

from star_edge.synthetic.pictures import page

MODEL = Path(__file__).parent.parent / "tools" / "pagevlm" / "model"
COMMAND = (sys.executable, "-c", "from star_edge.cli import main; main()", "serve")
AT_ONCE = 2  # requests at a replica: serve_ray._AT_ONCE

numbers = itertools.count()


def body(blank: np.ndarray) -> bytes:
    """A request about a picture that no request has had."""
    pixels = blank.copy()
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
def server(model: list[str], extra: list[str]) -> Iterator[str]:
    """Address of a server of one thread for each replica."""
    process = subprocess.Popen(
        [*COMMAND, *model, "--port", "0", "--json", "-t", "1", *extra],
        stdout=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit(f"the server with {' '.join(extra) or 'one process'} did not start: what it says is above")
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


def rate(addresses: list[str], n_replicas: int, bodies: list[bytes]) -> float:
    """Requests a second."""
    with ThreadPoolExecutor(AT_ONCE * n_replicas) as pool:
        start = time.perf_counter()
        list(pool.map(ask, itertools.cycle(addresses), bodies))
        return len(bodies) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="for each replica in a round")
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--side", type=int, default=560, help="of the pictures, in pixels")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = options.model or next(MODEL.glob("*-text-*.gguf"))
    mmproj = options.mmproj or next(MODEL.glob("*-mmproj-*.gguf"))
    model = ["-m", str(text), "--mmproj", str(mmproj)]
    blank = page(options.side, options.side)
    with contextlib.ExitStack() as stack:
        ray = {n: stack.enter_context(server(model, ["--ray", "--workers", str(n)])) for n in (1, 2)}
        plain = [stack.enter_context(server(model, [])) for _ in range(2)]
        sides = {
            "Ray, one replica": ([ray[1]], 1),
            "Ray, two replicas": ([ray[2]], 2),
            "one server": (plain[:1], 1),
            "two servers": (plain, 2),
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        for addresses, n in sides.values():  # the first requests find nothing warm
            rate(addresses, n, [body(blank) for _ in range(2 * n)])
        for number in range(options.rounds):
            for name, (addresses, n) in sides.items():
                bodies = [body(blank) for _ in range(options.requests * n)]  # not timed
                found[name].append(rate(addresses, n, bodies))
            print(f"round {number + 1}: " + ", ".join(f"{name} {r[-1]:.3f}" for name, r in found.items()), flush=True)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    one, two, alone, both = medians.values()
    print(", ".join(f"{name} {median:.3f} requests/s" for name, median in medians.items()))
    print(f"two replicas answer {two / one:.2f} times as many as one; two servers without Ray {both / alone:.2f} times")
    if options.out:
        result = {"requests_per_s": found, "ray": two / one, "without_ray": both / alone}
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
