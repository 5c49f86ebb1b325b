"""What is fuzzed: for each target a function from a seed to a case. The same seed is the same case everywhere.

A case's `check` runs in a process of its own (forking.run). It returns a line about what happened, where a typed error
is a result; anything else that is raised, a death of the process or a hang is a failure. Lines that begin with "bad"
are failures too.
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf_mutations import mutate
from llama_cpp import Llama, LlamaGrammar
from PIL import Image

import star_edge
from star_edge import PruneConfig, StarChatHandler, StarVLM, batch, refvlm
from star_edge.errors import StarEdgeError
from star_edge.evaluation.results import Records
from star_edge.io.configs import load_config, resolve_prune
from star_edge.io.images import ImageLimits, load_image
from star_edge.io.questions import read_questions

FIXTURES = Path(__file__).parent.parent / "fixtures"
FAMILIES = sorted(p.name for p in FIXTURES.iterdir() if (p / "mmproj.gguf").exists())
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@dataclass
class Case:
    """said: what it is. payload: the bytes that `check` takes. divides: whether a part of them may be enough to
    fail.
    """

    said: str
    payload: bytes
    check: Callable[[bytes], str]
    suffix: str
    divides: bool = True


def typed(function: Callable[[], object]) -> str:
    try:
        return f"done {type(function()).__name__}"
    except StarEdgeError as error:
        message = str(error)
        if "\n" in message or len(message) > 2000:
            return f"bad message of {len(message)} characters: {message[:200]!r}"
        return f"{type(error).__name__}: {message}"


def in_file(payload: bytes, suffix: str, function: Callable[[Path], object]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzz{suffix}"
        path.write_bytes(payload)
        return typed(lambda: function(path))


def scrambled(rng: random.Random, data: bytes, most: int = 8) -> bytes:
    """A few bytes changed, cut out, doubled or put elsewhere."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not out:
            break
        at, n = rng.randrange(len(out)), rng.choice((1, 1, 2, 4, 16, 100))
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + n] = bytes(rng.randrange(256) for _ in range(n))
        elif kind == 1:
            del out[at : at + n]
        elif kind == 2:
            out[at:at] = out[at : at + n]
        elif kind == 3:
            out[at : at + 4] = struct.pack(
                rng.choice(("<I", ">I")), rng.choice((0, 1, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1))
            )
        else:
            other = rng.randrange(len(out))
            out[at : at + n] = out[other : other + n]
    return bytes(out)


# ---- images ----


def _pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = {}
    for kind, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("ICO", "RGBA", {}),
        ("TGA", "RGB", {}),
        ("DDS", "RGB", {}),
        ("PCX", "RGB", {}),
        ("SGI", "RGB", {}),
        ("IM", "RGB", {}),
        ("JPEG2000", "RGB", {}),
    ):
        out = io.BytesIO()
        try:
            (Image.new("I;16", (8, 8), 999) if mode == "I;16" else rgb.convert(mode)).save(out, kind, **options)
        except (OSError, KeyError, ValueError):  # a Pillow that was built without it
            continue
        found[f"{kind} {mode}"] = out.getvalue()
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    found["PNG text"] = (
        found["PNG RGB"][:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))) + found["PNG RGB"][33:]
    )
    return found


PICTURES = _pictures()


def images(seed: int) -> Case:
    rng = random.Random(seed)
    name = rng.choice(sorted(PICTURES))
    data = scrambled(rng, PICTURES[name])
    form = rng.choice(("bytes", "file", "data URL", "str"))

    def check(payload: bytes) -> str:
        limits = ImageLimits(max_pixels=10**6)
        if form == "file":
            return in_file(payload, "", lambda path: _is_image(load_image(path, limits)))
        if form == "str":
            return typed(lambda: _is_image(load_image(payload.decode("latin-1"), limits)))
        url = "data:image/png;base64," + base64.b64encode(payload).decode()
        return typed(lambda: _is_image(load_image(payload if form == "bytes" else url, limits)))

    return Case(f"{name} as {form}", data, check, ".image")


def _is_image(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size
    return array


# ---- GGUF files ----


def gguf(seed: int) -> Case:
    """A text or mmproj file of a family with one or two fields changed, loaded and asked about a picture."""
    rng = random.Random(seed)
    family, which = rng.choice(FAMILIES), rng.choice(("text", "mmproj", "mmproj"))
    data, said = mutate((FIXTURES / family / f"{which}.gguf").read_bytes(), seed)
    prune = rng.choice((None, "balanced", "fast"))

    def ask(path: Path) -> str:
        files = {"text": FIXTURES / family / "text.gguf", "mmproj": FIXTURES / family / "mmproj.gguf", which: path}
        with StarVLM(files["text"], files["mmproj"], n_ctx=512, n_threads=1, image_cache_bytes=0) as vlm:
            return vlm.generate(
                f"a {star_edge.MEDIA_MARKER} b", [PICTURE], prune, max_tokens=2, chat=False
            ).finish_reason

    return Case(
        f"{family} {which}: {said} (prune={prune})",
        data,
        lambda payload: in_file(payload, ".gguf", ask),
        ".gguf",
        divides=False,
    )


def _write_lora() -> bytes:
    """An adapter that fits the fixture `llava`."""
    import gguf as writer_of

    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.gguf"
        writer = writer_of.GGUFWriter(str(path), "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        for name, n_in, n_out in (("blk.0.attn_q.weight", 64, 128), ("blk.1.ffn_down.weight", 80, 64)):
            writer.add_tensor(f"{name}.lora_a", rng.standard_normal((4, n_in)).astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", rng.standard_normal((n_out, 4)).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


LORA = _write_lora()


def lora(seed: int) -> Case:
    data, said = mutate(LORA, seed)

    def ask(path: Path) -> str:
        with StarVLM(FIXTURES / "llava" / "text.gguf", n_ctx=256, n_threads=1, lora_path=str(path)) as vlm:
            return vlm.generate("a", max_tokens=2, chat=False).finish_reason

    return Case(f"LoRA: {said}", data, lambda payload: in_file(payload, ".gguf", ask), ".gguf", divides=False)


# ---- grammars and schemas ----

_GRAMMARS = (
    'root ::= "a" | "b"',
    "root ::= [a-z]+ | ws\nws ::= [ \\t\\n]*",
    'root ::= "x"{2,5} ("y" | "z")?',
    "root ::= [^\\x00-\\x1F]{1,20}",
    'root ::= item ("," item)*\nitem ::= [0-9]{1,3}',
    "root ::= <[12]> .",
    'root ::= "\\u00e9" | root2\nroot2 ::= "a" root2?',
    "",
)
_SCHEMAS = (
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "integer", "minimum": 0}},
        "required": ["a"],
    },
    {"type": "array", "items": {"enum": ["x", 1, None]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[a-z]{1,4}$"},
    {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "number"}}},
    {"type": "string", "format": "date"},
    {},
)
_NUMBERS = (0, -1, 1, 2, 100, 20000, 10**6, 10**9, 2**31, 2**63, 1e308, -0.5)


def _changed(rng: random.Random, value: object) -> object:
    """A JSON value with some of its parts replaced by others."""
    if rng.random() < 0.2:
        return rng.choice(
            (
                None,
                True,
                [],
                {},
                "",
                "x" * 50,
                "\ud800",
                rng.choice(_NUMBERS),
                [[]],
                {"type": "object"},
                "^a{1,100000}$",
            )
        )
    if isinstance(value, dict):
        return {
            (k if rng.random() < 0.9 else rng.choice(("type", "items", "$ref", "pattern", "x"))): _changed(rng, v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_changed(rng, v) for v in value] * rng.choice((1, 1, 1, 2, 0))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice(_NUMBERS)
    return value


def _nested(rng: random.Random, n: int) -> object:
    value: object = {"type": "string"}
    for _ in range(n):
        value = (
            {"type": "array", "items": value} if rng.random() < 0.5 else {"type": "object", "properties": {"a": value}}
        )
    return value


def grammars(seed: int) -> Case:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        text = scrambled(rng, rng.choice(_GRAMMARS).encode(), 4).decode("utf-8", "replace")
        if rng.random() < 0.2:
            text = rng.choice(
                (
                    "root ::= " + "(" * 20000 + '"a"' + ")" * 20000,
                    'root ::= "a"' + ' | "a"' * 10**5,
                    f"root ::= [a]{{{rng.choice(_NUMBERS)}}}",
                    "root ::= root",
                    'root ::= ("a"?)*',
                    "root ::= <[99999999]>",
                )
            )
        payload, is_schema = text.encode("utf-8", "surrogatepass"), False
    else:
        schema = _nested(rng, rng.choice((3, 50, 5000))) if rng.random() < 0.15 else _changed(rng, rng.choice(_SCHEMAS))
        payload, is_schema = _dumps(schema), True

    def check(data: bytes) -> str:
        text = data.decode("utf-8", "replace")
        if is_schema:
            try:
                schema = json.loads(text)
            except (ValueError, RecursionError):
                return "no JSON"
            return _ask_for_json(schema)
        with StarVLM(refvlm.TEXT_MODEL, n_ctx=128, n_threads=1) as vlm:
            return typed(lambda: vlm.generate("x", max_tokens=3, grammar=LlamaGrammar.from_string(text, verbose=False)))

    return Case("schema" if is_schema else "grammar", payload, check, ".json" if is_schema else ".gbnf")


def _ask_for_json(schema: object) -> str:
    """Through the handler, which turns a schema into a grammar."""
    handler = StarChatHandler(refvlm.MMPROJ, verbose=False)
    llama = Llama(str(refvlm.TEXT_MODEL), chat_handler=handler, n_ctx=256, n_threads=1, verbose=False)
    messages = [{"role": "user", "content": "what is red?"}]
    form = {"type": "json_object", "schema": schema}
    return typed(lambda: llama.create_chat_completion(messages, response_format=form, max_tokens=3))


def _dumps(value: object) -> bytes:
    """JSON of any depth: json.dumps gives up at Python's recursion limit."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        closing, out = [], []
        while isinstance(value, dict) and ("items" in value or "properties" in value):
            array = "items" in value
            out.append('{"type": "array", "items": ' if array else '{"type": "object", "properties": {"a": ')
            closing.append("}" if array else "}}")
            value = value["items"] if array else value["properties"]["a"]
        return ("".join(out) + json.dumps(value) + "".join(reversed(closing))).encode()


# ---- configs ----

_ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.0,
    0.5,
    1.0,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "half",
    "\0",
    b"x",
    [],
    (),
    {},
    [1],
    (1, 2),
    object,
    np.int64(3),
    np.float32(0.25),
    np.nan,
    np.array([0.5]),
    1 + 2j,
    "0.5",
    ((2, 0.5),),
    [(0.5, 0.5), (0.6, 0.2)],
    [[0.5]],
    "attention",
    "none",
    "crop",
)
_FIELDS = (
    "vision_keep",
    "decoder_keep",
    "decoder_layer",
    "vision_scorer",
    "decoder_scorer",
    "representatives",
    "vision_share",
    "decoder_share",
    "vision_tolerance",
    "windows",
    "budget",
    "positions",
    "seed",
    "redundancy",
    "encoder_keep",
    "encoder_layer",
)


def configs(seed: int) -> Case:
    """PruneConfig values from Python (drawn again from the payload), and files of `star-edge tune`."""
    rng = random.Random(seed)
    if rng.random() < 0.4:
        text = json.dumps({"vision_keep": 0.5, "decoder_keep": 0.25, "windows": [], "seed": 0, "budget": "image"})
        return Case(
            "file",
            scrambled(rng, text.encode()),
            lambda data: in_file(data, ".json", lambda path: load_config(str(path))),
            ".json",
        )
    names = rng.sample(_FIELDS, rng.randint(1, 4))
    chosen = {name: rng.randrange(len(_ODD)) for name in names}

    def check(data: bytes) -> str:
        values = {name: _ODD[index] for name, index in json.loads(data).items()}

        def use() -> object:
            config = resolve_prune(PruneConfig(**values))
            assert PruneConfig(**json.loads(json.dumps(config.to_dict()))) == config
            with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
                return vlm.generate("x", [PICTURE], config, max_tokens=1)

        return typed(use)

    return Case(
        f"PruneConfig({', '.join(f'{n}={_ODD[i]!r}' for n, i in chosen.items())})",
        json.dumps(chosen).encode(),
        check,
        ".json",
        divides=False,
    )


# ---- files of tasks and results ----

_LINES = (
    b'{"id": 1, "image": "a.jpg", "prompt": "what?", "text": "x", "finish_reason": "stop", "model": "m", '
    b'"task": "t"}\n',
    b'{"image": "a.jpg", "question": "what?", "answer": "a cat", "id": "q1"}\n',
    b'{"star_edge_eval": 1, "model": "m"}\n'
    b'{"task": "q1", "config": "off", "task_fingerprint": "a", "config_fingerprint": "b", "text": "x"}\n',
)


def results(seed: int) -> Case:
    rng = random.Random(seed)
    data = scrambled(rng, b"".join(rng.choice(_LINES) for _ in range(rng.randint(1, 3))))
    if rng.random() < 0.1:
        data = rng.choice(
            (
                b"[" * 100000,
                b'{"id": ' + b"9" * 5000 + b"}",
                '{"id": "\u2028"}\n'.encode(),
                b"\xff\xfe",
                b"\0" * 100,
                b"",
            )
        )
    kind = rng.choice(("results", "tasks", "eval tasks", "eval results"))
    settings = batch.Settings(PruneConfig())

    def use(path: Path) -> object:
        if kind == "tasks":
            return batch.read_tasks(path, "what?", settings)
        if kind == "eval tasks":
            return read_questions(path)
        if kind == "eval results":
            return Records(str(path), {"model": "m"}, [], []).close()
        return batch.open_results(path, [], "m").close()

    return Case(kind, data, lambda payload: in_file(payload, ".jsonl", use), ".jsonl")


# ---- HTTP ----

_PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/completions",
    "/extras/tokenize",
    "/extras/detokenize",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
    "/",
)
_PNG = "data:image/png;base64," + base64.b64encode(PICTURES["PNG RGB"]).decode()
_BODIES = (
    {
        "model": "m",
        "max_tokens": 2,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": _PNG}}, {"type": "text", "text": "what?"}],
            }
        ],
        "prune": "balanced",
        "temperature": 0,
        "stream": False,
    },
    {
        "model": "m",
        "max_tokens": 2,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
        "stop": ["a"],
        "top_p": 0.5,
        "logit_bias": {"5": 1.0},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "auto",
        "seed": 1,
        "response_format": {"type": "json_object", "schema": {"type": "object"}},
    },
    {"model": "m", "prompt": "x", "max_tokens": 2, "grammar": 'root ::= "a"'},
    {"input": "x"},
    {"tokens": [1, 2]},
)


def http(seed: int) -> Case:
    """20 requests one after another to an app of the reference model; then it must still answer a good one."""
    rng = random.Random(seed)
    lines = []
    for _ in range(20):
        body = _changed(rng, _changed(rng, rng.choice(_BODIES)))
        data = _dumps(body)
        if rng.random() < 0.15:
            data = scrambled(rng, data, 3)
        method = rng.choice(("POST",) * 9 + ("GET",))
        lines.append(json.dumps([method, rng.choice(_PATHS), data.decode("latin-1")]))
    return Case("20 requests", "\n".join(lines).encode(), _serve, ".jsonl")


def _serve(payload: bytes) -> str:
    from fastapi.testclient import TestClient

    from star_edge.server.app import make_app

    app = make_app(refvlm.TEXT_MODEL, refvlm.MMPROJ, alias="m", n_ctx=512, n_threads=1)
    answers: dict[int, int] = {}
    with TestClient(app, raise_server_exceptions=False, base_url="http://127.0.0.1:8000") as client:
        for line in payload.decode("utf-8", "replace").split("\n"):
            try:
                method, path, body = json.loads(line)
            except ValueError:
                continue
            answer = client.request(
                method, path, content=body.encode("latin-1", "replace"), headers={"Content-Type": "application/json"}
            )
            answers[answer.status_code] = answers.get(answer.status_code, 0) + 1
            if answer.status_code >= 500 and answer.status_code != 503:
                return f"bad answer {answer.status_code} of {method} {path}: {answer.text[:200]} to {body[:300]}"
        good = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "what is red?"}]}
        answer = client.post("/v1/chat/completions", json=good)
        if answer.status_code != 200:
            return f"bad answer {answer.status_code} to a good request at the end: {answer.text[:200]}"
    return f"answers {sorted(answers.items())}"


TARGETS: dict[str, Callable[[int], Case]] = {
    "gguf": gguf,
    "lora": lora,
    "images": images,
    "grammars": grammars,
    "configs": configs,
    "results": results,
    "http": http,
}
