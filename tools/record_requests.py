"""Records what some 300 requests answer, so that a change of the code's shape can be compared with the code before it.

    python tools/record_requests.py record FILE     asks, and writes one JSON line for each request
    python tools/record_requests.py compare A B     prints what differs; the status is 1 if anything does

The models are the tests' fixtures and the reference model. Every front answers: StarVLM, its streams, StarChatHandler,
the server and the command. All run greedily or with fixed seeds, on one thread. Times and random ids are left out.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama
from PIL import Image

from star_edge import MEDIA_MARKER, PRESETS, PruneConfig, StarChatHandler, StarVLM, refvlm

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
TEXT = "USER: is there a red star? is there a blue square? what number is shown? ASSISTANT:"
COLOR = "what color is the triangle?"
PLATE = "what number is shown?"
_TIMES = {"tokens_per_s", "seconds", "first_token_ms", "encode_ms"}
_LEFT_OUT = {"id", "created", "system_fingerprint"}

Record = Callable[..., None]


def picture(seed: int, height: int = 98, width: int = 98) -> np.ndarray:
    """(height, width, 3) uint8 with structure at several scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for n in (3, 7, 14):
        block = rng.integers(0, 256, (n, n, 3))
        image += block[np.arange(height)[:, None] * n // height, np.arange(width)[None] * n // width]
    return np.ascontiguousarray((image / 3).astype(np.uint8))


def data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


DEMO = "data:image/png;base64," + base64.b64encode(refvlm.DEMO_IMAGE.read_bytes()).decode()
OTHER = data_url(picture(3, 168, 168))


def plain(value: Any) -> Any:
    """JSON without times and ids; long lists of numbers as a digest."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _LEFT_OUT}
        return {k: sorted(v) if k == "milliseconds" else None if k in _TIMES else plain(v) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(v) for v in value]
        text = json.dumps(items)
        return (
            items if len(text) < 400 or not all(isinstance(v, (int, float)) for v in items) else digest(text.encode())
        )
    if hasattr(value, "__dict__"):
        return plain(vars(value))
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), digest(np.ascontiguousarray(value).tobytes())]
    return value.item() if isinstance(value, np.generic) else value


def error_of(ask: Callable[[], Any]) -> Any:
    """What a call raises, or returns."""
    try:
        return plain(ask())
    except Exception as error:
        message = re.sub(r"0x[0-9a-f]+|/tmp/[^ :]*/", "...", str(error))
        return {"error": type(error).__name__, "message": message}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def message(*parts: str) -> dict[str, Any]:
    """A message of the user: strings that begin with "data:" are images."""
    content = [
        {"type": "image_url", "image_url": {"url": p}} if p.startswith("data:") else {"type": "text", "text": p}
        for p in parts
    ]
    return {"role": "user", "content": content}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# ---- StarVLM ----


def answer(vlm: StarVLM, *args: Any, **options: Any) -> Any:
    result = vlm.generate(*args, **{"max_tokens": 6, **options})
    if options.get("stream"):
        pieces = list(result)
        return [pieces, result.text, result.finish_reason, result.report.to_dict()]
    return [result.text, result.finish_reason, result.report.to_dict()]


def record_families(record: Record) -> None:
    names = [name for name in PRESETS if name not in ("off", "balanced")]
    for number, folder in enumerate(sorted(path.parent for path in FIXTURES.glob("*/text.gguf"))):
        options: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "flash_attn": number % 2 == 0}
        with StarVLM(folder / "text.gguf", folder / "mmproj.gguf", **options) as vlm:

            def ask(what: str, *args: Any, vlm: StarVLM = vlm, name: str = folder.name, **options: Any) -> None:
                record(f"{name}: {what}", lambda: answer(vlm, *args, **options))

            chat = vlm.has_chat_template
            one, two = picture(number, 112, 112), picture(number + 100, 112, 140)
            ask("off", "What is this?", one, None, chat=chat)
            ask("balanced", "What is this?", one, "balanced", chat=chat)
            ask("preset", "And this?", one, names[number % len(names)], chat=chat)
            config = PruneConfig(0.5, 0.25, 1, representatives="none", decoder_share=0, vision_share=0)
            ask("explicit", "What is this?", two, config, chat=chat)
            shared = PruneConfig(0.5, 0.3, budget="prompt", positions="renumbered" if number % 2 else "original")
            ask("two, streamed", f"a {MEDIA_MARKER} b {MEDIA_MARKER} c", [one, two], shared, stream=True, chat=chat)
            ask("sampled", "What is this?", two, "fast", chat=chat, temperature=0.8, seed=number, top_p=0.9)


def record_engine(record: Record) -> None:
    demo = str(refvlm.DEMO_IMAGE)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1) as vlm:

        def ask(what: str, *args: Any, **options: Any) -> None:
            record(f"engine: {what}", lambda: answer(vlm, *args, **options))

        ask("demo", PLATE, demo)
        ask("follow-up", COLOR, demo)
        ask("again, another config", COLOR, demo, "fast")
        ask("text alone", "hello")
        ask("raw", f"USER: {MEDIA_MARKER} {PLATE} ASSISTANT:", demo, chat=False)
        ask("placeholder", "<image> what color is the triangle?", demo)
        ask("bytes", PLATE, refvlm.DEMO_IMAGE.read_bytes())
        ask("data URL", PLATE, DEMO)
        ask("PIL", PLATE, Image.open(refvlm.DEMO_IMAGE))
        ask("three frames", PLATE, [picture(i) for i in range(3)], PruneConfig(0.4, budget="prompt"))
        ask("crop budget", PLATE, [demo, demo], PruneConfig(20, budget="crop"))
        ask("windows", COLOR, demo, PruneConfig(0.5, windows=((2, 0.4), (4, 0.2))))
        ask("counts", COLOR, demo, PruneConfig(40, 10, 2))
        ask("maxmin", COLOR, demo, PruneConfig(0.3, vision_scorer="maxmin", representatives="none"))
        ask("no max_tokens", PLATE, demo, max_tokens=None)
        ask("stop", PLATE, demo, stop=[" 7"])
        ask("seed", COLOR, demo, temperature=1.5, seed=7, top_k=20)
        ask("bias", COLOR, demo, logit_bias={5: 3.0})
        for what, args, options in (
            ("prune", (PLATE, demo, "nothing"), {}),
            ("temperature", (PLATE, demo), {"temperature": float("nan")}),
            ("max_tokens", (PLATE, demo), {"max_tokens": 0}),
            ("option", (PLATE, demo), {"echo": True}),
            ("markers", (f"{MEDIA_MARKER}{MEDIA_MARKER}", demo), {}),
            ("surrogate", ("\ud800", demo), {}),
            ("prompt", (3, demo), {}),
            ("image", (PLATE, "missing.png"), {}),
            ("source", (PLATE, 3.5), {}),
            ("keep", (PLATE, demo, PruneConfig(1000)), {}),
            ("layer", (PLATE, demo, PruneConfig(0.5, 0.2, 99)), {}),
            ("context", ("word " * 5000, demo), {}),
            ("empty", ("", ()), {"chat": False}),
            ("stream", (PLATE, demo), {"stream": "yes"}),
        ):
            ask(f"error: {what}", *args, **options)
        ask("after the errors", PLATE, demo)

        def dropped() -> Any:
            first = vlm.generate(PLATE, demo, stream=True, max_tokens=6)
            piece = next(first)
            second = answer(vlm, COLOR, demo)
            return [piece, second, error_of(lambda: next(first))]

        record("engine: a stream that a newer request ends", dropped)

        def closed() -> Any:
            stream = vlm.generate(PLATE, demo, stream=True, max_tokens=6)
            piece = next(stream)
            stream.close()
            return [piece, stream.text, stream.finish_reason, stream.report.to_dict(), error_of(lambda: list(stream))]

        record("engine: a stream that is closed", closed)

        def inspected() -> Any:
            found = vlm.inspect(PLATE, demo, decoder_layers=(0, 3), encoder_layers=(1,), mean_heads=True)
            return vars(found)

        record("engine: inspect", inspected)
        record("engine: inspect, error", lambda: repr(vlm.inspect(PLATE, demo, decoder_layers=(99,))))
        stream = vlm.generate(PLATE, demo, stream=True)
    record("engine: closed", lambda: answer(vlm, PLATE, demo))
    record("engine: closed, its stream", lambda: next(stream))
    for what, options in (
        ("type_k", {"type_k": "f8"}),
        ("type_v", {"type_v": "q8_0", "flash_attn": False}),
        ("n_ctx", {"n_ctx": 1}),
        ("n_ctx is a str", {"n_ctx": "many"}),
        ("encoder", {"encoder": "mended"}),
        ("cache", {"image_cache_bytes": -1}),
        ("directory", {"image_cache_dir": "\0"}),
        ("tokens", {"image_min_tokens": 9, "image_max_tokens": 3}),
        ("tokens out of range", {"image_min_tokens": -2}),
        ("template", {"chat_template": "nothing"}),
        ("unknown", {"n_gpu": 3}),
        ("format", {"chat_format": "llama-2"}),
        ("taken", {"n_threads_batch": 3}),
        ("mmproj", {"mmproj": refvlm.TEXT_MODEL}),
    ):
        files = {"model": refvlm.TEXT_MODEL, "mmproj": refvlm.MMPROJ, "n_threads": 1, **options}
        record(f"loading: {what}", lambda files=files: repr(StarVLM(**files)))
    with StarVLM(refvlm.TEXT_MODEL, n_threads=1, n_ctx=256, type_k="q8_0", type_v="q8_0") as vlm:
        record("text model: text", lambda: answer(vlm, "hello there"))
        record("text model: image", lambda: answer(vlm, PLATE, demo))
    options = {"encoder": "stock", "image_cache_bytes": 0, "reuse": False, "encoder_flash_attn": False, "n_threads": 1}
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **options) as vlm:
        for turn in (1, 2):
            record(f"stock encoder, nothing kept: {turn}", lambda: answer(vlm, PLATE, demo))
    fixture = FIXTURES / "qwen2-vl"
    options = {"image_min_tokens": 4, "image_max_tokens": 9, "n_threads": 1, "n_ctx": 512}
    with StarVLM(fixture / "text.gguf", fixture / "mmproj.gguf", **options) as vlm:
        record("few image tokens", lambda: answer(vlm, "What?", picture(1, 200, 300), chat=vlm.has_chat_template))


# ---- StarChatHandler ----


def record_handler(record: Record) -> None:
    handler = StarChatHandler(refvlm.MMPROJ, verbose=False)
    llm = Llama(str(refvlm.TEXT_MODEL), chat_handler=handler, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)

    def create(*messages: Any, **options: Any) -> Any:
        options = {"temperature": 0.0, "max_tokens": 5, **options}
        result: Any = llm.create_chat_completion(list(messages) or [message(DEMO, COLOR)], **options)
        return list(result) if options.get("stream") else result

    def ask(what: str, *messages: Any, **options: Any) -> None:
        record(f"handler: {what}", lambda: [create(*messages, **options), handler.last_report.to_dict()])

    tool = {
        "type": "function",
        "function": {"name": "report", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
    ask("plain")
    ask("stream", stream=True)
    ask("follow-up", message(DEMO, COLOR), said("red"), message(PLATE))
    ask("two images", message(DEMO, OTHER, PLATE))
    ask("text alone", message("hello"))
    ask("seed", temperature=1.2, seed=4, top_k=30)
    ask("stop", message(DEMO, PLATE), stop=[" 7"])
    ask("format", response_format={"type": "json_object"}, max_tokens=12)
    ask("schema", response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["red", "blue"]}}})
    ask("tool", tools=[tool], tool_choice={"type": "function", "function": {"name": "report"}}, max_tokens=12)
    ask("tool, streamed", tools=[tool], tool_choice="required", max_tokens=12, stream=True)
    ask("system", {"role": "system", "content": "Be brief."}, message(DEMO, COLOR))
    for name in ("off", "fast", "star", "pyramiddrop", "visionzip"):
        with handler.pruning(name):
            ask(f"pruning {name}")
    ask("error: image", message("data:image/png;base64,AAAA", COLOR))
    ask("error: scheme", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ftp://a/b"}}]})
    ask("error: messages", {"role": "nobody"})
    ask("error: temperature", temperature=-1)
    ask("error: option", wine="red")
    ask("error: logprobs", logprobs=True)
    ask("error: tool", tools=[tool], tool_choice={"type": "function", "function": {"name": "other"}})
    ask("error: context", message(DEMO, "word " * 3000))
    ask("error: two grammars", response_format={"type": "json_object"}, tools=[tool], tool_choice="required")
    ask("after the errors")

    def cancelled() -> Any:
        with handler.cancellable(lambda: True):
            return create()

    record("handler: cancelled", cancelled)

    def ended() -> Any:
        first: Any = llm.create_chat_completion([message(DEMO, PLATE)], stream=True, max_tokens=5, temperature=0.0)
        chunks = [next(first), next(first)]
        return [chunks, create(), error_of(lambda: next(first))]

    record("handler: a stream that a newer request ends", ended)

    def dropped() -> Any:
        stream: Any = llm.create_chat_completion([message(DEMO, PLATE)], stream=True, max_tokens=5, temperature=0.0)
        chunk = next(stream)
        stream.close()
        return [chunk, create()]

    record("handler: a stream that is dropped", dropped)
    stream: Any = llm.create_chat_completion([message(DEMO, PLATE)], stream=True, max_tokens=5, temperature=0.0)
    llm.close()
    record("handler: closed, its stream", lambda: next(stream))
    record("handler: closed", create)
    for what, options in (
        ("encoder", {"encoder": "mended"}),
        ("cache", {"image_cache_bytes": 1.5}),
        ("tokens", {"image_min_tokens": 9, "image_max_tokens": 3}),
        ("flash", {"encoder_flash_attn": 3}),
        ("prune", {"prune": "nothing"}),
        ("file", {"clip_model_path": refvlm.TEXT_MODEL}),
        ("limits", {"image_limits": 3}),
    ):
        given = {"clip_model_path": refvlm.MMPROJ, **options}
        record(f"handler, loading: {what}", lambda given=given: StarChatHandler(**given).prune.to_dict())


# ---- the server and the command ----

COMMAND = (sys.executable, "-c", "from star_edge.cli import main; main()")


@contextlib.contextmanager
def serving(*options: str) -> Iterator[str]:
    """A server, and its address."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--json", "-t", "1", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def record_server(record: Record) -> None:
    with serving("--max-images", "3") as url:

        def request(method: str, path: str, body: Any = None) -> Any:
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=120)
            data = body if body is None or isinstance(body, str) else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text, kind = reply.read().decode(), reply.headers.get("Content-Type", "")
            connection.close()
            if "event-stream" in kind:
                events = re.findall(r"^data: (.*)$", text, re.MULTILINE)
                return [reply.status, [json.loads(e) if e.startswith("{") else e for e in events]]
            return [reply.status, json.loads(text) if "json" in kind else text]

        def post(what: str, **body: Any) -> None:
            body = {"messages": [message(DEMO, COLOR)], "max_tokens": 4, "temperature": 0, **body}
            record(f"server: {what}", lambda: request("POST", "/v1/chat/completions", body))

        post("plain")
        post("kept", star_edge={"kept": True})
        post("stream", stream=True)
        post("stream with usage", stream=True, stream_options={"include_usage": True})
        post("prune null", prune=None)
        post("prune preset", prune="fast")
        post("prune object", prune={"vision_keep": 0.5, "decoder_keep": 0.2, "decoder_layer": 2})
        post("two images", messages=[message(DEMO, OTHER, PLATE)])
        post("follow-up", messages=[message(DEMO, COLOR), said("red"), message(PLATE)])
        post("afresh", star_edge={"afresh": True})
        post("bias", logit_bias={"5": 3})
        post("min_tokens", min_tokens=3)
        post("grammar", grammar='root ::= "red" | "blue"')
        post("seed", temperature=1, seed=3)
        post("error: prune", prune="nothing")
        post("error: field", temperature="warm")
        post("error: images", messages=[message(DEMO, DEMO, DEMO, DEMO, PLATE)])
        post("error: URL", messages=[message("data:image/png;base64,AAAA", PLATE)])
        post("error: no messages", messages=[])
        post("error: context", messages=[message("word " * 3000)])
        post("error: in a stream", messages=[message("data:,x", PLATE)], stream=True)
        record("server: no JSON", lambda: request("POST", "/v1/chat/completions", "{"))
        for path in ("/v1/models", "/v1/models/other", "/health", "/nothing"):
            record(f"server: {path}", lambda path=path: request("GET", path))


def record_command(record: Record, folder: Path) -> None:
    demo = folder / "demo.png"
    demo.write_bytes(refvlm.DEMO_IMAGE.read_bytes())
    Image.fromarray(picture(3, 168, 168)).save(folder / "other.png")
    tasks = [
        {"id": "a", "image": "demo.png", "prompt": PLATE},
        {"id": "b", "images": ["demo.png", "other.png"], "prompt": COLOR, "preset": "fast", "max_tokens": 3},
        {"id": "c", "image": "missing.png", "prompt": PLATE},
        {"id": "d", "prompt": "hello", "vision_keep": 0.5},
    ]
    (folder / "tasks.jsonl").write_text("\n".join(json.dumps(task) for task in tasks) + "\n")

    def command(what: str, *args: str) -> None:
        def call() -> Any:
            done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, cwd=folder)
            text = done.stdout.replace(str(folder), "...")
            try:
                out: Any = json.loads(text)
            except ValueError:
                lines = text.splitlines()
                out = [json.loads(line) if line.startswith("{") else line for line in lines]
            error = re.sub(r"\d+(\.\d+)? (ms|tokens/s)|" + re.escape(str(folder)), "...", done.stderr)
            return [done.returncode, out, error]

        record(f"command: {what}", call)

    run = ("run", "-t", "1", "-n", "5")
    command("run", *run, "--image", "demo.png", PLATE)
    command("run --json", *run, "--image", "demo.png", "--json", PLATE)
    command(
        "run, explicit", *run, "--image", "demo.png", "--json", "--vision-keep", "0.5", "--decoder-keep", "9", COLOR
    )
    command("run, no pruning", *run, "--image", "demo.png", "--json", "--preset", "off", PLATE)
    command("run, seed", *run, "--image", "demo.png", "--json", "--temp", "1", "--seed", "3", PLATE)
    command("run, two", *run, "--image", "demo.png", "--image", "other.png", "--json", PLATE)
    command("run --each", *run, "--each", "--image", "demo.png", "--image", "other.png", PLATE)
    command("run --tasks", *run, "--tasks", "tasks.jsonl")
    command("run --tasks --out", *run, "--tasks", "tasks.jsonl", "--out", "results.jsonl", "--no-cache")
    command("run --tasks --out, again", *run, "--tasks", "tasks.jsonl", "--out", "results.jsonl", "--no-cache")
    command("inspect", "inspect", "-t", "1", "--image", "demo.png", "--json", PLATE)
    command("error: keep", *run, "--image", "demo.png", "--vision-keep", "2.5", PLATE)
    command("error: image", *run, "--image", "missing.png", PLATE)
    command("error: type", *run, "-ctv", "q8_0", "-no-fa", "--image", "demo.png", PLATE)
    command("error: context", *run, "-c", "64", "--image", "demo.png", "--preset", "off", PLATE)
    command("error: template", *run, "--chat-template", "nothing", "--image", "demo.png", PLATE)
    command("error: mmproj", *run, "--mmproj", "missing.gguf", PLATE)


# ---- both ends ----


def record_all(path: str) -> None:
    n = 0
    with open(path, "w", encoding="utf-8") as file:

        def record(name: str, ask: Callable[[], Any]) -> None:
            nonlocal n
            file.write(json.dumps({"name": name, "result": error_of(ask)}, sort_keys=True) + "\n")
            file.flush()
            n += 1

        record_families(record)
        record_engine(record)
        record_handler(record)
        record_server(record)
        with tempfile.TemporaryDirectory() as folder:
            record_command(record, Path(folder))
    print(f"{n} requests recorded in {path}")


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(set(a) | set(b)):
            if key not in a or key not in b:
                yield f"{where}.{key}: only in {'the second' if key in b else 'the first'}"
            else:
                yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{where}[{i}]")
    elif a != b:
        yield f"{where}: {json.dumps(a)[:300]} -> {json.dumps(b)[:300]}"


def compare(first: str, second: str) -> int:
    a, b = (
        {(r := json.loads(line))["name"]: r["result"] for line in Path(path).read_text().splitlines()}
        for path in (first, second)
    )
    found = [line for name in a.keys() & b.keys() for line in differences(a[name], b[name], name)]
    found += [f"{name}: only in one file" for name in a.keys() ^ b.keys()]
    print("\n".join(sorted(found)))
    print(f"{len(a)} and {len(b)} requests, {len(found)} differences")
    return 1 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, files in (("record", ["file"]), ("compare", ["first", "second"])):
        sub = commands.add_parser(name)
        for file in files:
            sub.add_argument(file)
        sub.set_defaults(what=name)
    args = parser.parse_args()
    os.environ["COLUMNS"] = "200"
    if args.what == "record":
        record_all(args.file)
    else:
        sys.exit(compare(args.first, args.second))


if __name__ == "__main__":
    main()
