"""A generator of odd HTTP requests, the same for a seed, and what sends them as they are. Only to servers on
loopback.
"""

from __future__ import annotations

import copy
import json
import random
import socket
import urllib.parse

from helpers.serving import DEMO, message

GOOD = {"model": "m", "messages": [message("what color is the star?", DEMO)], "max_tokens": 2, "temperature": 0}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]
TALK = {
    "messages": [
        {"role": "system", "content": "Answer in a word."},
        {"role": "user", "content": [{"type": "text", "text": "what color is the star?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "what color?"},
    ],
    "tools": TOOLS,
    "max_tokens": 2,
    "temperature": 0,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 1,
    "stop": ["x"],
    "n": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repeat_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "min_tokens": 1,
    "user": "u",
    "stream": True,
    "stream_options": {"include_usage": True},
    "prune": {"vision_keep": 0.5},
    "star_edge": {"kept": True},
    "response_format": {"type": "text"},
    "logprobs": False,
    "mirostat_mode": 0,
    "tool_choice": "auto",
    "metadata": {"a": "b"},
}
RULES = [  # what a grammar or a schema may not be
    {"grammar": "root :="},
    {"grammar": 'root ::= "a"{99999999}'},
    {"grammar": "root ::= " + "(" * 20_000},
    {"grammar": ""},
    {"grammar": "root ::= root"},
    {"response_format": {"type": "json_object", "schema": {"type": "string", "maxLength": 20_000}}},
    {"response_format": {"type": "json_object", "schema": {"type": "string", "pattern": "^a{1,100000}$"}}},
    {"response_format": {"type": "json_object", "schema": {"type": "string", "minLength": 10**9}}},
    {"response_format": {"type": "json_object", "schema": {"$ref": "#/x"}}},
    {"response_format": {"type": "json_object", "schema": 5}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    {"tool_choice": {"type": "function", "function": {"name": "look"}}},
    {"tool_choice": "required"},
    {"tool_choice": "none"},
]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    -0.0,
    1e308,
    -1e308,
    10**30,
    2**31,
    2**63,
    -(2**63),
    "",
    "x",
    "null",
    "é",
    "\x00",
    "\u2028",
    "<__media__>",
    "<image>",
    "image-0",
    "data:,",
    "data:image/png;base64,",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "x" * 3000,
    [],
    [[]],
    [None],
    [0],
    {},
    {"": ""},
    {"type": "text"},
    {"type": "image_url"},
    {"type": "image_url", "image_url": "x"},
    {"url": 5},
    {"a": {"b": {"c": [1]}}},
    ["x"] * 70,
    {"role": "user"},
    {"role": "user", "content": "x"},
    "required",
    "off",
    {"vision_keep": 1},
    {"windows": [[1, 2]]},
    {"999999999": 1.0},
    {"x": 1e9},
]
RAW = [
    b"",
    b"{",
    b"}",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"messages": NaN}',
    b'{"temperature": Infinity}',
    b'{"a": 1e999}',
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b"9" * 5000,
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"\\ud800": 1}',
    b"{}",
    b'{"messages": []}',
    b'{"messages": null}',
    b"\x00" * 100,
    b"[" + b"0," * 600_000 + b"0]",
    json.dumps(GOOD).encode("utf-16"),
    json.dumps(GOOD).encode()[:-1],
    b'{"messages": [], "messages": 5}',
]
PATHS = [
    "/v1/chat/completions",
    "/v1/chat/completions/",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/engines/copilot-codex/completions",
    "/extras/detokenize",
    "/extras/tokenize",
    "/extras/tokenize/count",
    "/v1/models",
    "/v1/models/x",
    "/v1/models/%2e%2e/x",
    "/health",
    "/metrics",
    "/",
    "//",
    "/docs",
    "/openapi.json",
    "/page/app.js",
    "/page/..%2f..%2fapp.py",
    "/page/%00",
    "/%ff%fe",
    "/v1/chat/completions?x=%zz",
    "/" + "a" * 3000,
    "/v1/%C3%A9",
    "*",
    "http://x/health",
]
METHODS = ["GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "X" * 100]
HEADERS = [
    ("Origin", "http://["),
    ("Origin", "null"),
    ("Origin", "x" * 2000),
    ("Origin", "http://localhost:99999999"),
    ("Host", "["),
    ("Host", ""),
    ("Host", "[::1"),
    ("Host", "localhost:x"),
    ("Host", "localhost, evil"),
    ("Content-Type", "\xff"),
    ("Content-Type", "multipart/form-data"),
    ("Content-Type", ""),
    ("Authorization", "Bearer \xe9"),
    ("Authorization", "Basic"),
    ("Authorization", ""),
    ("Accept-Encoding", "\x01gzip"),
    ("Cookie", "=" * 500),
    ("X-Request-ID", "\t"),
    ("Content-Encoding", "gzip"),
    ("Expect", "100-continue"),
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Accept", ""),
    ("Content-Length", "-1"),
    ("Content-Length", "1" * 30),
    ("Content-Length", "\xb2"),
    ("Transfer-Encoding", "gzip, chunked"),
    ("Range", "bytes=5-1"),
    ("If-Range", "x"),
    ("Range", "bytes=99999999999999999999-"),
    ("If-None-Match", '"x"'),
    ("If-Modified-Since", "x"),
    ("Forwarded", "for=x"),
    ("X-Forwarded-For", "\xff"),
    ("X-Forwarded-Proto", "x"),
    ("Sec-WebSocket-Key", "x"),
    ("Sec-WebSocket-Version", "13"),
]


def _places(value, at=()):
    """Paths of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from _places(item, (*at, key))


def odd_body(rng):
    """A request with one to three fields changed, taken away, doubled or added."""
    body = copy.deepcopy(rng.choice([GOOD, TALK, TALK]))
    if rng.random() < 0.15:
        return json.dumps(body | rng.choice(RULES)).encode()
    for _ in range(rng.randint(1, 3)):
        places = list(_places(body))
        if not places:
            break
        *way, last = rng.choice(places)
        parent = body
        for key in way:
            parent = parent[key]
        kind = rng.random()
        if kind < 0.7:
            parent[last] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.85:
            del parent[last]
        elif isinstance(parent, dict):
            parent[rng.choice(["pruning", "message", "x", "", str(last) + "s"])] = copy.deepcopy(rng.choice(VALUES))
        else:
            parent.append(copy.deepcopy(parent[last]))
    return json.dumps(body).encode()


def odd_requests(seed, n):
    """Requests as bytes, each with a word about what it is."""
    rng = random.Random(seed)
    for _ in range(n):
        kind = rng.choices(["body", "raw", "path", "header", "bytes"], [6, 2, 2, 3, 1])[0]
        method, path, headers, body = (
            "POST",
            "/v1/chat/completions",
            {"Host": "localhost", "Content-Type": "application/json"},
            json.dumps(GOOD).encode(),
        )
        if kind == "body":
            body = odd_body(rng)
        elif kind == "raw":
            body = rng.choice(RAW)
        elif kind == "path":
            method, path = rng.choice(METHODS), rng.choice(PATHS)
            body = rng.choice([b"", b"{}", b'{"tokens": [-1]}', b'{"input": "x"}', body])
        if kind in ("header", "path") and rng.random() < 0.8:
            headers.update(dict(rng.sample(HEADERS, rng.randint(1, 3))))
        if kind == "bytes":
            yield kind, bytes(rng.randrange(256) for _ in range(rng.randint(1, 200))) + b"\r\n\r\n"
            continue
        headers = {"Content-Length": str(len(body)), **headers, "Connection": "close"}
        head = (
            f"{method} {path} HTTP/1.1\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            + "\r\n"
        )
        data = head.encode("latin-1") + body
        if rng.random() < 0.05:
            data, kind = data[: rng.randrange(len(data))], "cut"
        yield kind, data


def send(url, data, *, whole=True, seconds=20):
    """The answer as bytes: what there is when the server closes. whole: False ends the sending side, which is how a
    client leaves.
    """
    address = urllib.parse.urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as sock:
        answer = b""
        try:
            sock.sendall(data)
            if not whole:
                sock.shutdown(socket.SHUT_WR)
        except OSError:  # refused before it was all sent
            pass
        try:
            while part := sock.recv(65536):
                answer += part
        except ConnectionError:
            pass
        return answer
