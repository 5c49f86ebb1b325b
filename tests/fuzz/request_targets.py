"""What is fuzzed of requests: grammars, JSON schemas, configs, HTTP; each a function from a seed to a case."""

from __future__ import annotations

import base64
import dataclasses
import json
import random

import numpy as np
from cases import NUMBERS, PICTURE, Case, changed, dumps, in_file, scrambled, typed
from file_targets import PICTURES, VIDEOS
from llama_cpp import Llama, LlamaGrammar

from star_edge import PruneConfig, StarChatHandler, StarVLM, refvlm
from star_edge.io.configs import load_config, resolve_prune

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
                    f"root ::= [a]{{{rng.choice(NUMBERS)}}}",
                    "root ::= root",
                    'root ::= ("a"?)*',
                    "root ::= <[99999999]>",
                )
            )
        payload, is_schema = text.encode("utf-8", "surrogatepass"), False
    else:
        schema = _nested(rng, rng.choice((3, 50, 5000))) if rng.random() < 0.15 else changed(rng, rng.choice(_SCHEMAS))
        payload, is_schema = dumps(schema), True

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
_FIELDS = tuple(field.name for field in dataclasses.fields(PruneConfig))


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


# ---- HTTP ----

_PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/completions",
    "/extras/tokenize",
    "/extras/detokenize",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/image_tokens",
    "/v1/models",
    "/health",
    "/metrics",
    "/",
)
_PNG = "data:image/png;base64," + base64.b64encode(PICTURES["PNG RGB"]).decode()
_GIF = "data:image/gif;base64," + base64.b64encode(VIDEOS["GIF"]).decode()
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
    {
        "model": "m",
        "max_tokens": 2,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": _GIF}, "nframes": 2, "fps": 2.0},
                    {"type": "video", "video": [_PNG, _PNG], "nframes": 2},
                    {"type": "text", "text": "what?"},
                ],
            }
        ],
        "star_edge": {"kept": True, "frames": True, "afresh": False},
        "stream_options": {"include_usage": True},
    },
    {
        "model": "m",
        "max_output_tokens": 2,
        "instructions": "s",
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": _PNG}, {"type": "input_text", "text": "what?"}],
            },
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "truncation": "disabled",
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
        body = rng.choice(_BODIES)
        path = "/v1/responses" if "instructions" in body and rng.random() < 0.8 else rng.choice(_PATHS)
        data = dumps(changed(rng, changed(rng, body)))
        if rng.random() < 0.15:
            data = scrambled(rng, data, 3)
        method = rng.choice(("POST",) * 9 + ("GET",))
        lines.append(json.dumps([method, path, data.decode("latin-1")]))
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
