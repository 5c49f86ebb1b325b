"""OpenVINO GenAI with CDPruner beside stock llama.cpp and star_edge, in one run, and the table of it in BENCHMARKS.md.

    python -m venv .openvino && .openvino/bin/pip install -r benchmarks/openvino-requirements.txt
    python benchmarks/openvino_beside.py run --openvino .openvino/bin/python [--folder DIR] [--openvino-folder DIR]
    python benchmarks/openvino_beside.py write      # the table, from the result

On a quiet machine: 5 repeats take about 6 minutes, by arithmetic. Both processes together need 15 GiB of memory, most
of it for an encoder of each stock side. Models are random, of the sizes of `star-edge bench --shape qwen2-vl-2b`, and
are made on the spot unless the folders hold them; to make OpenVINO's takes 5 minutes and 17 GiB.

Every side is asked once to warm up, then once in each repeat, in the order of evaluation.runner.order. Two processes
stay alive: this one asks llama.cpp through the Workbench of `star-edge bench`, the other is
benchmarks/openvino_cdpruner.py --serve. Both begin with a PNG in base64 and end at the first token. All requests
have a picture and letters of their own, as many tokens as the others: OpenVINO's pipeline keeps prompts that it has
seen. The process that is not asked sleeps: in a run of one repeat llama.cpp's took 0.01% of a processor meanwhile, and
OpenVINO's less. Each run measures it, and the result has it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import llama_cpp
from other_process import IDLE, OtherProcess
from tables import PAGE, RESULTS, put

from star_edge import __version__
from star_edge.benchmarking.run import LETTERS_AFTER, LETTERS_BEFORE, machine, make_request, shape_context
from star_edge.benchmarking.sides import Request, SideSpec, Workbench
from star_edge.evaluation.configs import file_configs
from star_edge.evaluation.runner import order
from star_edge.synthetic import SHAPES, model_files
from star_edge.synthetic.pictures import photo

HERE = Path(__file__).parent
SHAPE = "qwen2-vl-2b"
RESULT = RESULTS / "openvino" / f"{SHAPE}.json"
BEGIN = "<!-- begin: written by benchmarks/openvino_beside.py -->"
CONFIGS = HERE / "configs" / "encoder-photo.json"
TYPE = "bf16"  # of star_edge's encoder: its file is f16
PAUSE = 0.5  # seconds before each request, in which the threads of the one before go to sleep

# What part of the image tokens: its share, the config that keeps so much on average, per cent that CDPruner drops
STEPS = {"a quarter": (0.25, "balanced, encoder stage", 75), "a tenth": (0.1, "fast", 90)}
_CONVERTED = f", mmproj converted to {TYPE}"
# What is done before the decoder, of star_edge.benchmarking.sides.STAGES
_BEFORE_DECODER = ("preprocess", "redundancy", "encode", "encoder_stage", "vision_stage")
_NAMED = (
    "star_edge",
    "llama-cpp-python",
    "openvino-genai",
    "optimum-intel",
    "transformers",
)  # versions that the page has


@dataclass(frozen=True)
class Side:
    """What is measured.

    Attributes:
        name: Unique name.
        kind: "star_edge", "stock", "converted" (stock with the converted mmproj file) or "openvino".
        step: Which part of the tokens it has, a key of STEPS, or "all".
        spec: For llama.cpp. None: OpenVINO.
        ratio: Per cent that CDPruner drops.
    """

    name: str
    kind: str
    step: str
    spec: SideSpec | None = None
    ratio: int = 0


def make_sides(n_tokens: int, encoder_layer: int | None = None) -> list[Side]:
    """All sides. Those that are compared are neighbours, so that they are asked within a few seconds.

    Args:
        n_tokens: Image tokens of the full picture.
        encoder_layer: Layer M of star_edge's encoder stage. None: the default.
    """
    stage = "" if encoder_layer is None else f", its stage from layer {encoder_layer}"
    configs = {config.name: config.prune for config in file_configs(CONFIGS)}
    stock = "llama.cpp, stock, flash attention"
    sides = [
        Side(stock, "stock", "all", SideSpec("stock", "stock")),
        Side(stock + _CONVERTED, "converted", "all", SideSpec("converted", "stock", converted=True)),
        Side("OpenVINO GenAI, unpruned", "openvino", "all"),
    ]
    for i, (step, (share, config, ratio)) in enumerate(STEPS.items()):
        smaller = f"llama.cpp, stock, {step} of the tokens by a smaller picture"
        spec = SideSpec(smaller, "stock", image_max_tokens=round(share * n_tokens), fewer=i)
        prune = configs[config] if encoder_layer is None else replace(configs[config], encoder_layer=encoder_layer)
        pruned = SideSpec(config, "star_edge", prune)
        sides += [
            Side(f"star_edge, `{config}`{stage}{_CONVERTED}", "star_edge", step, pruned),
            Side(f"OpenVINO GenAI, CDPruner, {ratio}% dropped", "openvino", step, ratio=ratio),
            Side(smaller, "stock", step, spec),
            Side(smaller + _CONVERTED, "converted", step, replace(spec, name=smaller + _CONVERTED, converted=True)),
        ]
    return sides


def make_question(number: int) -> tuple[Request, dict[str, str]]:
    """A request of another picture and other letters than every other number's: for llama.cpp, and for OpenVINO."""
    letters = random.Random(number)
    before, after = ("".join(letters.choices(string.ascii_lowercase, k=n)) for n in (LETTERS_BEFORE, LETTERS_AFTER))
    request = make_request(
        [photo(*SHAPES[SHAPE].picture, number)], before, after, [share for share, *_ in STEPS.values()]
    )
    picture = next(part for part in request.messages[0]["content"] if part["type"] == "image_url")
    return request, {"picture": picture["image_url"]["url"], "before": before, "after": after}


class Engines:
    """Both engines, asked in turn, and the processor time that each took while the other was asked.

    Args:
        bench: llama.cpp.
        openvino: OpenVINO.

    Attributes:
        idle: For each engine the processor seconds, and the seconds, in which the other one was asked.
    """

    def __init__(self, bench: Workbench, openvino: OtherProcess) -> None:
        self._bench, self._openvino, self._number = bench, openvino, 0
        self.idle = {engine: {"cpu_s": 0.0, "seconds": 0.0} for engine in ("llama.cpp", "openvino")}
        self._openvino_since = time.perf_counter()

    def ask(self, side: Side) -> dict[str, float]:
        """Asks a side something new for one token.

        Returns:
            first_token_ms; embeddings_ms: of it, what is done before the decoder; prompt_tokens: of llama.cpp before
            pruning, of OpenVINO after it; of llama.cpp alone average_tokens: image tokens per decoder layer; of
            OpenVINO alone genai_first_token_ms: by its own clock.

        Raises:
            StarEdgeError: llama.cpp could not answer.
            OtherProcessError: OpenVINO could not.
        """
        self._number += 1
        request, question = make_question(self._number)
        if side.spec is None:
            return self._ask_openvino(side.ratio, question)
        time.sleep(PAUSE)
        sample = self._bench.ask(side.spec, request, 1)
        return {
            "first_token_ms": 1e3 * sample.first_token,
            "embeddings_ms": 1e3 * sum(sample.stages[name] for name in _BEFORE_DECODER),
            "prompt_tokens": sample.n_text + sample.n_image,
            "average_tokens": sample.average_tokens,
        }

    def _ask_openvino(self, ratio: int, question: dict[str, str]) -> dict[str, float]:
        cpu, start = time.process_time(), time.perf_counter()
        time.sleep(PAUSE)
        asked = time.perf_counter()
        answer = self._openvino.ask(ratio=ratio, **question)
        self._count("llama.cpp", time.process_time() - cpu, time.perf_counter() - start)
        self._count("openvino", answer.pop(IDLE), asked - self._openvino_since)
        self._openvino_since = time.perf_counter()
        return answer

    def _count(self, engine: str, cpu: float, seconds: float) -> None:
        self.idle[engine]["cpu_s"] += cpu
        self.idle[engine]["seconds"] += seconds


def measure(
    files: tuple[Path, Path],
    openvino: OtherProcess,
    n_threads: int,
    repeats: int,
    encoder_layer: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Asks all sides in turn.

    Args:
        files: Text model and mmproj.
        openvino: OpenVINO, which has loaded its model for as many threads.
        n_threads: Threads of llama.cpp.
        repeats: Requests of each side after one to warm up.
        encoder_layer: As in `make_sides`.
        say: Called with a line on each answer.

    Returns:
        The result, as JSON values.

    Raises:
        StarEdgeError: llama.cpp could not answer.
        OtherProcessError: OpenVINO could not.
        ValueError: The prompts of the two engines have not the same number of tokens.
    """
    shape = SHAPES[SHAPE]
    options: dict[str, Any] = {"n_ctx": shape_context(shape, 1), "n_threads": n_threads, "mmproj_type": TYPE}
    with Workbench(*files, **options) as bench:
        n_image, _ = bench.count_image_tokens(make_question(0)[0])  # loads the encoder, whose file is converted then
        sides = make_sides(n_image, encoder_layer)
        engines = Engines(bench, openvino)
        warm = {}
        for side in sides:
            warm[side.name] = engines.ask(side)
            say(f"warm-up, {side.name}: {warm[side.name]}")
        full = {side.kind: warm[side.name]["prompt_tokens"] for side in sides if side.step == "all"}
        n_stock, n_openvino = full["stock"], full["openvino"]
        if n_stock != n_openvino:
            raise ValueError(f"the prompt has {n_stock} tokens on llama.cpp and {n_openvino} on OpenVINO")
        engines.idle = {engine: dict.fromkeys(counts, 0.0) for engine, counts in engines.idle.items()}
        samples: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for repeat in range(repeats):
            for i in order(len(sides), repeat):
                sample = engines.ask(sides[i])
                samples[sides[i].name].append(sample)
                say(f"repeat {repeat + 1}, {sides[i].name}: {sample['first_token_ms']:.0f} ms")
        about = machine(bench.llama.n_threads_batch)
    rows = [_row(side, samples[side.name], int(n_stock) - n_image) for side in sides]
    return {
        "title": f"{shape.about}, random weights, a photo",
        "date": date.today().isoformat(),
        "versions": {
            "star_edge": __version__,
            "llama-cpp-python": llama_cpp.__version__,
            "python": platform.python_version(),
            **openvino.hello["versions"],
        },
        "machine": about,
        "prompt_tokens": int(n_stock),
        "image_tokens": n_image,
        "repeats": repeats,
        "sides": rows,
        "ratios": {step: _ratios([row for row in rows if row["step"] == step]) for step in STEPS},
        "idle": {
            name: counts | {"share": counts["cpu_s"] / counts["seconds"]} for name, counts in engines.idle.items()
        },
    }


def _row(side: Side, samples: Sequence[dict[str, float]], n_text: int) -> dict[str, Any]:
    times = [sample["first_token_ms"] for sample in samples]
    row = {
        "name": side.name,
        "kind": side.kind,
        "step": side.step,
        "average_tokens": samples[0].get("average_tokens", samples[0]["prompt_tokens"] - n_text),
        "first_token_ms": {"median": statistics.median(times), "min": min(times), "max": max(times), "all": times},
    }
    return row | {
        key: statistics.median(s[key] for s in samples) for key in samples[0] if key.endswith("_ms") and key not in row
    }


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of star_edge over that of each other kind."""
    medians = {row["kind"]: row["first_token_ms"]["median"] for row in rows}
    ours = medians.pop("star_edge")
    return {kind: ours / median for kind, median in medians.items()}


def table(result: dict[str, Any]) -> str:
    """What was measured where, a row for each side, the ratios of medians, and how much the idle engines worked."""
    about, versions, rows = result["machine"], result["versions"], result["sides"]
    stock = next(row for row in rows if row["kind"] == "stock")["first_token_ms"]["median"]
    used = ", ".join(f"{name} {versions[name]}" for name in _NAMED)
    lines = [
        f"{result['title']}; a prompt of {result['prompt_tokens']} tokens. {about['processor']}, {about['threads']} "
        f"threads; {used}; {result['date']}. Medians of {result['repeats']} repeats.",
        "",
        f"    {result['command']}",
        "",
        "| | image tokens per layer | first token, s | min to max | of it, before the decoder | speed-up |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        first = {name: value / 1e3 for name, value in row["first_token_ms"].items() if name != "all"}
        lines.append(
            f"| {row['name']} | {row['average_tokens']:.1f} | {first['median']:.2f} | {first['min']:.2f}-"
            f"{first['max']:.2f} | {row['embeddings_ms'] / 1e3:.2f} | {stock / row['first_token_ms']['median']:.2f} |"
        )
    lines += [
        "",
        "Ratios of medians, star_edge over the other (below 1, star_edge is ahead):",
        "",
        f"| tokens | OpenVINO GenAI, CDPruner | stock with a smaller picture | the same{_CONVERTED} |",
        "|---|---:|---:|---:|",
    ]
    for step, ratios in result["ratios"].items():
        lines.append(
            f"| {step} | " + " | ".join(f"{ratios[kind]:.2f}" for kind in ("openvino", "stock", "converted")) + " |"
        )
    idle = {name: f"{100 * counts['share']:.2f}%" for name, counts in result["idle"].items()}
    lines += [
        "",
        f"While the other engine was asked, llama.cpp's process took {idle['llama.cpp']} of a processor, and "
        f"OpenVINO's {idle['openvino']}.",
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measures, and writes the result."""
    command = [options.openvino, str(HERE / "openvino_cdpruner.py"), "--serve", "--threads", str(options.threads)]
    if options.openvino_folder:
        command += ["--folder", options.openvino_folder]
    with ExitStack() as stack:
        openvino = stack.enter_context(OtherProcess(command))
        files = stack.enter_context(model_files(SHAPES[SHAPE], options.folder))
        result = measure(
            files,
            openvino,
            options.threads,
            options.repeats,
            options.encoder_layer,
            lambda line: print(line, flush=True),
        )
    # Where the models and OpenVINO were is nobody's business
    result["command"] = (
        "python benchmarks/openvino_beside.py run --openvino .openvino/bin/python "
        f"--threads {options.threads} --repeats {options.repeats}"
        + (f" --encoder-layer {options.encoder_layer}" if options.encoder_layer else "")
    )
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("--openvino", help="the Python of an environment with openvino-requirements.txt")
    parser.add_argument("--openvino-folder", help="where its model is kept for the next time; default: it is removed")
    parser.add_argument("--folder", help="the same for the model of llama.cpp")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each engine (%(default)s)")
    parser.add_argument("--encoder-layer", type=int, help="layer M of star_edge's encoder stage; default: its own")
    parser.add_argument("--out", default=RESULT, help="default: where `write` looks")
    options = parser.parse_args()
    if options.what == "run":
        if options.openvino is None:
            parser.error("run needs --openvino, the Python of an environment with openvino-requirements.txt")
        run(options)
    else:
        PAGE.write_text(put(PAGE.read_text(), BEGIN, table(json.loads(RESULT.read_text()))))


if __name__ == "__main__":
    main()
