"""Runs the benchmarks that BENCHMARKS.md shows, and writes its tables from their results.

    python benchmarks/tables.py run [NAME ...] [--folder DIR]    # on a quiet machine; without names all of them
    python benchmarks/tables.py write                            # BENCHMARKS.md from benchmarks/results/*.json
    python benchmarks/tables.py list                             # names, commands, and minutes that each is estimated
    to take

Each result is the JSON of one `star-edge bench`, whose command is in it. Results of another kind lie in folders beside
them: those of benchmarks/gpu.sh, and of benchmarks/openvino_beside.py, which writes its table itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from star_edge.benchmarking.summary import text_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "BENCHMARKS.md"
BEGIN, END = "<!-- begin: written by benchmarks/tables.py -->", "<!-- end -->"

# Smaller pictures that stock is asked with: as many tokens as the presets balanced and fast keep on average. On an
# encoder of one picture size they have as many tokens as the full one, and bench says so in a note.
_SMALLER = "--baseline flash --baseline fewer --fewer-tokens 0.25 --fewer-tokens 0.1"
_PAGE = f"--picture page --configs benchmarks/configs/encoder-page.json --no-unpruned {_SMALLER}"
_PHOTO = f"--picture photo --configs benchmarks/configs/encoder-photo.json --no-unpruned {_SMALLER}"

# Name: options of star-edge bench, and minutes on 2 cores of an AMD EPYC virtual machine, by arithmetic: rows times
# weights at the 120 GFLOP/s that the 1.1B shape's stock prefill (11 s) came to there, and an encoder of 4,096 patches
# at the 53 s that it took
RUNS: dict[str, tuple[str, float]] = {
    "llava-1.1b": ("--shape llava-1.1b --configs benchmarks/configs/llava-1.1b.json --repeats 3 --idle-hook 256", 7),
    "smolvlm-500m": (f"--shape smolvlm-500m {_PHOTO} --repeats 5", 18),
    "gemma-3-4b": (f"--shape gemma-3-4b {_PHOTO} --repeats 5", 35),
    "qwen2-vl-2b": (f"--shape qwen2-vl-2b {_PHOTO} --repeats 5", 6),
    "qwen2-vl-2b-bf16": (f"--shape qwen2-vl-2b {_PHOTO} --baseline converted --mmproj-type bf16 --repeats 5", 6),
    "qwen2.5-vl-3b": (
        "--shape qwen2.5-vl-3b --preset balanced --preset star --baseline flash --baseline fewer --no-unpruned "
        "--repeats 1 --no-memory",
        8,
    ),
    "qwen2.5-vl-3b-page": (f"--shape qwen2.5-vl-3b {_PAGE} --repeats 3 --no-memory", 12),
    "qwen2.5-vl-3b-photo": (f"--shape qwen2.5-vl-3b {_PHOTO} --repeats 5", 17),
    "qwen2.5-vl-3b-screenshot": (
        f"--shape qwen2.5-vl-3b {_PAGE.replace('page --', 'screenshot --')} --repeats 2 --no-memory",
        18,
    ),
    "qwen3-vl-4b": (f"--shape qwen3-vl-4b {_PHOTO} --repeats 3 --no-memory", 24),
    "qwen3.5-4b": (f"--shape qwen3.5-4b {_PHOTO} --repeats 3 --no-memory", 24),
    "llava-1.5-7b": (
        "--shape llava-1.5-7b --configs benchmarks/configs/llava-1.5-7b.json --preset balanced --preset fast "
        "--no-unpruned --repeats 5 --idle-hook 32",
        24,
    ),
    "llava-next-7b": (
        "--shape llava-next-7b --configs benchmarks/configs/llava-next-7b.json --baseline flash --baseline fewer "
        "--no-unpruned --repeats 2 --no-memory",
        28,
    ),
}


def run(names: list[str], folder: str | None) -> None:
    """One after the other, each in a process of its own. A failed one stops the rest."""
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        out, plot = f"benchmarks/results/{name}.json", f"docs/bench-{name}.png"
        command = ["star-edge", "bench", *RUNS[name][0].split(), "--out", out, "--plot", plot]
        print("$", " ".join(command), flush=True)
        start = time.perf_counter()
        kept = ["--folder", folder] if folder else []
        code = "from star_edge.cli import main; main()"
        subprocess.run([sys.executable, "-c", code, *command[1:], *kept], cwd=ROOT, check=True)
        result = json.loads((ROOT / out).read_text())
        result["command"] = " ".join(command)  # where the models were kept is nobody's business
        (ROOT / out).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def write() -> None:
    """BENCHMARKS.md from the results."""
    order = list(RUNS)
    files = sorted(
        RESULTS.glob("*.json"), key=lambda f: (order.index(f.stem) if f.stem in order else len(order), f.stem)
    )
    parts = [section(file.stem, json.loads(file.read_text())) for file in files]
    PAGE.write_text(put(PAGE.read_text(), BEGIN, "\n\n".join(parts or ["No results yet."])))


def put(page: str, begin: str, new: str) -> str:
    """The page with `new` between a mark and the END that follows it."""
    before, mark, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"the page has no {begin} ... {END}")
    return f"{before}{begin}\n\n{new}\n\n{END}{after}"


def section(name: str, result: dict[str, Any]) -> str:
    """Heading, where and how it was measured, table, picture, notes."""
    machine, versions, model = result["machine"], result["versions"], result["model"]
    where = ", ".join([*machine["devices"], machine["processor"], f"{machine['threads']} threads"])
    lines = [
        f"## {name}",
        "",
        f"{result['title']}. {where}; star_edge {versions['star_edge']}, llama-cpp-python "
        f"{versions['llama-cpp-python']}; {result['date']}. n_ctx {model['n_ctx']}, {model['n_gpu_layers']} GPU "
        f"layers, {result['repeats']} repeats, {result['generated_tokens']} generated tokens. "
        f'Speed-ups are over "{result["reference"]}".',
        "",
        f"    {result['command']}",
        "",
    ]
    header, rows = text_table(result)
    # Sides as columns: there are fewer of them than of quantities
    lines.append("| | " + " | ".join(row[0] for row in rows) + " |")
    lines.append("|---|" + "---:|" * len(rows))
    lines += [
        f"| {title.strip()} | " + " | ".join(row[i] for row in rows) + " |" for i, title in enumerate(header) if i
    ]
    hook = result["idle_hook"]
    if hook:
        lines += [
            "",
            f"Idle hook: {hook['hook_ms_per_token']:.2f} ms per token, {hook['stock_ms_per_token']:.2f} without it, "
            f"ratio {hook['ratio']:.3f} (medians of {hook['tokens']} tokens, one on each side in turn).",
        ]
    if (ROOT / "docs" / f"bench-{name}.png").exists():
        lines += ["", f"![Stages of {name}](docs/bench-{name}.png)"]
    notes = result["notes"] + sorted({f"{row['name']}: {note}" for row in result["sides"] for note in row["notes"]})
    return "\n".join(lines + [""] * bool(notes) + [f"- {note}" for note in notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write", "list"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--folder", help="where the models are kept for the next time; default: a temporary folder for each"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(RUNS)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: use {', '.join(RUNS)}")
    if options.what == "list":
        for name, (arguments, minutes) in RUNS.items():
            print(f"{name} (about {minutes:g} minutes): star-edge bench {arguments}")
        return
    if options.what == "run":
        run(options.names or list(RUNS), options.folder)
    write()


if __name__ == "__main__":
    main()
