"""What star-edge serve refuses: requests, callers, and options when it starts. Servers are real ones, in processes of
their own.
"""

import asyncio
import base64
import io
import json
import signal
import socket
import threading
import urllib.parse

import numpy as np
import openai
import pytest
from helpers.presets import kept
from helpers.serving import COLOR, DEMO, Server, ask, busy, message, text_of
from PIL import Image

from star_edge import errors, refvlm
from star_edge.cli.serve import serve
from star_edge.server.app import make_app
from star_edge.server.bodies import Bodies
from star_edge.server.guard import Guard
from star_edge.server.settings import Policy


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    status, stderr = server.stop()
    assert status == 0 and "Traceback" not in stderr and "ERROR" not in stderr


@pytest.fixture(scope="module")
def strict():
    server = Server(
        "--max-queue",
        "2",
        "--allow-remote-images",
        "--max-images",
        "2",
        "--max-image-bytes",
        "50000",
        "--max-image-pixels",
        "40000",
        "--max-body-bytes",
        "250000",
        "--cors-origin",
        "https://friend.example",
        "--preset",
        "fast",
        environment={"STAR_EDGE_API_KEY": "secret", "CONFIG_FILE": "/nowhere", "API_KEY": "other", "N_CTX": "8"},
    )
    yield server
    assert server.stop()[0] == 0


# ---- requests and callers ----


@pytest.fixture
def refused(server):
    def check(words, body=None, url=None, status=400):
        body = (
            body
            if body is not None
            else {"messages": [message(COLOR, *([url] if url is not None else []))], "max_tokens": 2}
        )
        for stream in (False, True):
            got, _, answer = server.request("POST", "/v1/chat/completions", {**body, "stream": stream})
            assert got == status and set(answer["error"]) == {"message", "type", "param", "code"}, answer
            assert words in answer["error"]["message"] and "\n" not in answer["error"]["message"], answer
        assert text_of(ask(server.client())) == "red"

    return check


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("nope", "no preset 'nope': use one of off"),
        ("/etc/passwd.json", "there is no preset"),
        (3, "prune is a int: use"),
        ({"keep": 1}, "prune has no field 'keep': use one of vision_keep"),
        ({"visoin_keep": 0.5}, "prune has no field 'visoin_keep': did you mean vision_keep?"),
        ("Fast", "there is no preset 'Fast': did you mean fast?"),
        ({"vision_keep": 0.5, "encoder_keep": 0.3}, "lower vision_keep, or use 1.0 for no such stage"),
        ({"vision_keep": 0.5, "vision_tolerance": 10**400}, "vision_tolerance=a number of more than 300 digits is nei"),
        ({"budget": "x" * 10**6}, f"budget='{'x' * 59}... is unknown"),
        ({"vision_keep": 1.5}, "not in (0, 1]"),
        ({"vision_keep": []}, "vision_keep=[] is a list"),
        ({"windows": 5}, "windows=5 is not a list of (layer, keep) pairs"),
        ({"decoder_layer": 6}, "outside 1..5"),
        ({"vision_keep": 145}, "over the image's 144 tokens"),
    ],
)
def test_bad_prune(refused, prune, words):
    refused(words, {"messages": [message(COLOR, DEMO)], "prune": prune})


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/a.png", "start the server with --allow-remote-images"),
        ("HTTPS://example.com/a.png", "start the server with --allow-remote-images"),
        ("file:///etc/hostname", "neither a data: nor an http(s) URL"),
        (str(refvlm.DEMO_IMAGE), "neither a data: nor an http(s) URL"),
        ("image-0", "neither a data: nor an http(s) URL"),
        ("ftp://example.com/a", "neither a data: nor an http(s) URL"),
        ("", "neither a data: nor an http(s) URL"),
        ("data:image/png;base64,AAAA", "not an image in a known format"),
        ("data:image/png;base64,A!", "invalid base64"),
    ],
)
def test_bad_image_urls(refused, url, words):
    refused(words, url=url)


def test_bad_requests(refused, server):
    refused("messages", {"messages": 5})
    refused("... has 1000 digits", {"messages": [message(COLOR)], "seed": 10**999})
    refused("star_edge", {"messages": [message(COLOR)], "star_edge": {"keep": True}})
    refused("messages.0.content.0.no", {"messages": [{"role": "user", "content": [{"type": "image", "no": DEMO}]}]})
    refused("the grammar cannot be parsed", {"messages": [message(COLOR)], "grammar": "root :="})
    refused("of a context of 1024", {"messages": [message(COLOR, *[DEMO] * 8)], "prune": "off"})
    refused("at most 8", {"messages": [message(COLOR, *[DEMO] * 9)]})
    status, _, answer = server.request("POST", "/v1/chat/completions", "{")
    assert status == 400 and "cannot be read" in answer["error"]["message"]
    context = server.request(
        "POST", "/v1/chat/completions", {"messages": [message(COLOR, *[DEMO] * 8)], "prune": "off"}
    )
    assert context[2]["error"]["code"] == "context_length_exceeded"


def png(width, height, noise=False):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8) * noise
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_limits(strict):
    client = strict.client("secret")
    for urls, words in (
        ([DEMO] * 3, "at most 2"),
        ([png(201, 200)], "--max-image-pixels"),
        ([png(150, 150, noise=True)], "--max-image-bytes"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, *urls)
    assert ask(client, DEMO, png(200, 200)).star_edge["n_image_tokens"] == 288
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, "data:," + "x" * 250_000)
    assert caught.value.status_code == 413 and "--max-body-bytes" in caught.value.message
    chunked = iter([b"x" * 1000] * 260)  # without a Content-Length
    assert (
        strict.request(
            "POST", "/v1/chat/completions", chunked, {"Authorization": "Bearer secret", "Transfer-Encoding": "chunked"}
        )[0]
        == 413
    )
    assert ask(client).star_edge["average_tokens"] == kept("fast").average


def test_the_queue_is_bounded(strict):
    refused, answered = [], []

    def run():
        try:
            answered.append(text_of(ask(strict.client("secret"))))
        except openai.APIStatusError as error:
            refused.append(error)

    with busy(strict, "secret"):
        threads = [threading.Thread(target=run) for _ in range(5)]
        [t.start() for t in threads]
        strict.wait(lambda: len(refused) == 3)
    [t.join() for t in threads]
    assert answered == ["red", "red"]
    assert {e.status_code for e in refused} == {503} and refused[0].response.headers["Retry-After"] == "1"
    assert refused[0].code == "queue_full" and "2 requests wait already" in refused[0].message


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_no_remote_image_of_this_network(strict, host):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        with pytest.raises(openai.BadRequestError, match="not on a public address"):
            ask(strict.client("secret"), f"http://{host}:{listener.getsockname()[1]}/a.png")
        with pytest.raises(TimeoutError):
            listener.accept()


def test_the_key(strict):
    for key in ("", "Secret", "secretx", "sécret"):
        for path in ("/v1/models", "/metrics", "/docs", "/nothing"):
            status, headers, answer = strict.request("GET", path, headers={"Authorization": f"Bearer {key}".encode()})
            assert (
                status == 401
                and headers["WWW-Authenticate"] == "Bearer"
                and answer["error"]["code"] == "invalid_api_key"
            )
    for path in ("/v1/chat/completions", "/v1/completions", "/extras/tokenize"):
        assert strict.request("POST", path, {})[0] == 401
    with pytest.raises(openai.AuthenticationError):
        ask(strict.client("other"))
    assert strict.client("secret").models.list().data
    for path in ("/", "/health", "/page/setup.json", "/page/app.js"):
        assert strict.request("GET", path)[0] == 200
    assert "refvlm" not in json.dumps(strict.request("GET", "/page/setup.json")[2])


def test_other_sites(server, strict):
    """A page of another site is neither answered nor, where its name points here, taken for our own."""
    body = {"messages": [message(COLOR)], "max_tokens": 1}
    port = urllib.parse.urlsplit(server.url).port
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}, 403),
        ({"Origin": server.url}, 200),
        ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
    ):
        got, answered, _ = server.request("POST", "/v1/chat/completions", body, headers)
        assert got == status and "Access-Control-Allow-Origin" not in answered, headers
    asks = {
        "Origin": "https://friend.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    status, headers, _ = strict.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://friend.example"
    status, headers, _ = strict.request(
        "OPTIONS", "/v1/chat/completions", headers={**asks, "Origin": "https://evil.example"}
    )
    assert "Access-Control-Allow-Origin" not in headers
    key = {"Authorization": "Bearer secret", "Origin": "https://friend.example"}
    assert strict.request("POST", "/v1/chat/completions", body, key)[0] == 200
    assert strict.request("POST", "/v1/chat/completions", body, {**key, "Origin": "https://evil.example"})[0] == 403


def test_a_request_that_arrives_too_slowly():
    sent = []

    async def receive():  # for ever
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    policy = Policy(body_seconds=0.1)
    bodies = Bodies(policy.max_body_bytes, policy.max_held_bytes, policy.body_seconds)
    guard = Guard(None, policy, lambda *_: None, set(), bodies)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 408 and guard.n_waiting == bodies.n_held == len(bodies.arriving) == 0


# ---- options ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--api-key", " "], "the API key is empty"),
        (["--preset", "x"], "there is no preset 'x'"),
        (["--max-images", "0"], "--max-images 0 allows nothing"),
        (["--max-queue", "-1"], "is negative"),
        (["--max-held-bytes", "1000"], "is less than --max-body-bytes"),
        (["--body-seconds", "nan"], "allows nothing"),
        (["--body-seconds", "inf"], "inf is no limit: use a number of seconds"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "k\u00e9y"], "cannot be sent in a header"),
        (["--cors-origin", "foo"], "'foo' is not a site"),
        (["--cors-origin", "https://example.org/"], "is not a site"),
        (["--cors-origin", "https://[::1"], "is not a site"),
        (["-c", "1"], "--ctx-size 1 has no room for a prompt and an answer"),
        (["--max-image-bytes", "0"], "allows nothing"),
        (["-m", "nowhere.gguf", "--mmproj", "x"], "nowhere.gguf does not exist"),
        (["-m", str(refvlm.TEXT_MODEL), "--mmproj", "nowhere.gguf"], "nowhere.gguf does not exist"),
        (["-m", str(refvlm.TEXT_MODEL)], "has no mmproj"),
        (["--host", "203.0.113.1"], "203.0.113.1 port 8000 cannot be used"),
    ],
)
def test_bad_options(monkeypatch, options, words):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(errors.StarEdgeError, match=words):
        serve.main(options, standalone_mode=False)


def test_an_empty_key_in_the_environment(monkeypatch):
    """Who sets the variable wants a key: an open server is not what it asks for."""
    monkeypatch.setenv("STAR_EDGE_API_KEY", "")
    with pytest.raises(errors.ConfigError, match="STAR_EDGE_API_KEY is set, and the API key is empty"):
        serve.main([], standalone_mode=False)


@pytest.mark.parametrize(
    "options", [{"n_ctx": 1}, {"n_ctx": -1}, {"n_ctx": 2**32}, {"n_ubatch": 0}, {"n_gpu_layers": -2}, {"n_threads": 0}]
)
def test_numbers_that_llama_cpp_would_abort_on(options):
    with pytest.raises(errors.ConfigError, match=f"{next(iter(options))}=.* (is out of range: use|has no room)"):
        make_app(refvlm.TEXT_MODEL, refvlm.MMPROJ, alias="m", **options)


def test_a_port_that_is_taken(server, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    port = server.url.rpartition(":")[2]
    with pytest.raises(errors.ConfigError, match=f"port {port} cannot be used"):
        serve.main(["--port", port], standalone_mode=False)
