"""How long encoding, prefill and a token take beside other work, by how llama.cpp's threads wait for each other.

    python benchmarks/contention.py [--busy 2] [--rounds 2] [--threads 2]

Each setting is a process of its own, since libgomp reads its variables when it is loaded; settings take turns. --busy
starts so many endless loops beside them. The model is random: SmolLM2-360M's sizes (Q8_0) with CLIP-L/336 (f16), and
one picture of 576 tokens.
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
from dataclasses import replace
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_THREAD_LIMIT")
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
ONE_THREAD = "one thread"


def ask(folder: str, n_threads: int) -> None:
    """Prints milliseconds of the encoder, of the prefill and of a token, as JSON."""
    from star_edge import StarVLM
    from star_edge.synthetic.pictures import photo

    files = (Path(folder) / name for name in ("text.gguf", "mmproj.gguf"))
    with StarVLM(*files, n_ctx=1024, n_threads=n_threads, image_cache_bytes=0, reuse=False) as vlm:
        vlm.generate("a", prune="off", max_tokens=2)
        steps = vlm.generate("b", [photo(336, 336)], "off", max_tokens=2).report.milliseconds
        times, since = [], None
        for _ in vlm.generate("c", prune="off", max_tokens=24, stream=True):
            now = time.perf_counter()
            if since is not None:
                times.append(1e3 * (now - since))
            since = now
    print(json.dumps([steps["encode"], steps["prefill"], statistics.median(times)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1, help="endless loops beside it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each setting (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        ask(options.child, options.threads)
        return
    from star_edge.synthetic import model_files
    from star_edge.synthetic.shapes import CLIP_L_336, SHAPES, SMOLLM2_360M

    shape = replace(SHAPES["llava-1.1b"], decoder=SMOLLM2_360M, encoder=CLIP_L_336, dtype="q8_0")
    runs = [(name, options.threads, variables) for name, variables in SETTINGS.items()] + [(ONE_THREAD, 1, {})]
    found: dict[str, list[list[float]]] = {name: [] for name, _, _ in runs}
    with model_files(shape) as files, tempfile.TemporaryDirectory() as folder:
        for name, path in zip(("text.gguf", "mmproj.gguf"), files):
            (Path(folder) / name).symlink_to(path)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
        try:
            for turn in range(options.rounds):
                for name, n_threads, variables in runs if turn % 2 == 0 else runs[::-1]:
                    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
                    command = [sys.executable, __file__, "--child", folder, "--threads", str(n_threads)]
                    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
                    print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(f"| {options.threads} threads, {options.busy} loops beside them | encode, s | prefill, s | a token, ms |")
    print("|---|---:|---:|---:|")
    for name, values in found.items():
        encode, prefill, token = (statistics.median(column) for column in zip(*values))
        print(f"| {name} | {encode / 1e3:.1f} | {prefill / 1e3:.1f} | {token:.0f} |")


if __name__ == "__main__":
    main()
