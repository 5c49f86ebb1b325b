"""star-edge serve: answers, the queue, its page and the end. Servers are real ones, in processes of their own."""

import asyncio
import json
import re
import signal
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import openai
import pytest
import uvicorn
from helpers import pages
from helpers.presets import kept
from helpers.serving import COLOR, DEMO, LONG, Server, ask, busy, data_url, message, text_of

from star_edge import PruneConfig, StarChatHandler, StarVLM, errors, refvlm
from star_edge.pruning.presets import PRESETS
from star_edge.server import remote
from star_edge.server.app import make_app
from star_edge.server.schema import parse_prune
from star_edge.server.settings import Policy

QUESTIONS = Path(__file__).parent / "refvlm_questions"


@pytest.fixture(scope="module")
def server():
    server = Server("--max-queue", "128")
    yield server
    status, stderr = server.stop()
    assert status == 0 and "Traceback" not in stderr and "ERROR" not in stderr


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1) as engine:
        yield engine


def pieces(stream):
    """(text, last chunk)"""
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks).strip(), chunks[-1]


# ---- answers ----


def test_answers_as_the_engine_and_reports(server, vlm):
    config = PruneConfig(vision_keep=0.5, decoder_keep=20, decoder_layer=3)
    expected = vlm.generate(COLOR, [DEMO], config, max_tokens=4)
    extra = {"prune": {"vision_keep": 0.5, "decoder_keep": 20, "decoder_layer": 3}, "star_edge": {"kept": True}}
    client = server.client()
    response = ask(client, extra_body=extra)
    text, last = pieces(ask(client, stream=True, extra_body=extra))
    assert text_of(response) == text == expected.text.strip() == "red"
    assert response.usage.prompt_tokens > 144 and last.choices[0].finish_reason
    for report in (response.star_edge, last.star_edge):
        assert report["average_tokens"] == expected.report.average_tokens
        (kept,), image = report["kept"], expected.report.images[0]
        assert kept["grid"] == [12, 12] and kept["cells"] == image.cells.tolist()
        assert kept["vision_kept"] == image.vision_kept.tolist() and kept["decoder_kept"] == image.decoder_kept.tolist()
        assert report["milliseconds"]["queue"] >= 0
    assert "kept" not in ask(client).star_edge


def test_pictures_keep_their_order(server, vlm):
    urls = [DEMO, data_url(QUESTIONS / "0000.png")]
    got = ask(server.client(), *urls, extra_body={"star_edge": {"kept": True}}).star_edge["kept"]
    images = vlm.generate(COLOR, urls, "balanced", max_tokens=4).report.images
    assert [k["vision_kept"] for k in got] == [image.vision_kept.tolist() for image in images]
    assert got[0]["vision_kept"] != got[1]["vision_kept"]


def test_the_default_is_the_preset_and_off_is_off(server):
    client = server.client()
    assert ask(client).star_edge["average_tokens"] == 36
    assert ask(client, extra_body={"prune": "fast"}).star_edge["average_tokens"] == kept("fast").average
    assert ask(client, extra_body={"prune": "off"}).star_edge["config"] is None
    assert ask(client, extra_body={"prune": None}).star_edge["config"] is None  # as in Python


def test_names_no_file(server):
    status, _, models = server.request("GET", "/v1/models")
    assert status == 200 and [m["id"] for m in models["data"]] == [server.ready["model"]] == ["refvlm-text-q8_0"]
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    assert server.request("POST", "/v1/chat/completions", body)[2]["model"] == "refvlm-text-q8_0"


def test_max_completion_tokens(server):
    assert ask(server.client(), max_tokens=None, max_completion_tokens=1).choices[0].finish_reason == "length"


def test_metrics_count_what_happened(server):
    names = [
        'star_edge_image_tokens_total{point="before"}',
        'star_edge_image_tokens_total{point="after_vision"}',
        'star_edge_image_tokens_total{point="after_decoder"}',
        "star_edge_generated_tokens_total",
        "star_edge_time_to_first_token_seconds_count",
        'star_edge_requests_total{path="/v1/chat/completions",status="200"}',
        'star_edge_requests_total{path="/v1/chat/completions",status="400"}',
        'star_edge_errors_total{error="ConfigError"}',
    ]
    before = [server.metric(name) for name in names]
    response = ask(server.client())
    pieces(ask(server.client(), stream=True))
    with pytest.raises(openai.BadRequestError):
        ask(server.client(), extra_body={"prune": "x"})
    n = 2 * response.star_edge["n_generated"]
    assert [server.metric(name) - b for name, b in zip(names, before)] == [
        288,
        2 * kept("balanced").vision,
        2 * kept("balanced").decoder,
        *(n, 2, 2, 1, 1),
    ]
    assert server.request("GET", "/health")[2] == {"status": "ok", "receiving": 0, "waiting": 0, "answering": 0}


# ---- the queue ----


def test_a_hundred_requests_of_eight_clients(server):
    """All at once, half of them streamed, each about another picture with an answer that is known."""
    wanted = [json.loads(line) for line in (QUESTIONS / "questions.jsonl").read_text().splitlines()]
    wanted = [q for q in wanted if q["family"] in ("color", "digit")][:100]
    presets = {"off": 144, "quality": kept("quality").average}

    async def one(client, i, q):
        preset = list(presets)[i % 2]
        stream = i % 4 < 2
        answer = await ask(
            client,
            data_url(QUESTIONS / q["image"]),
            question=q["question"],
            stream=stream,
            extra_body={"prune": preset},
        )
        if stream:
            chunks = [chunk async for chunk in answer]
            text, report = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].star_edge
        else:
            text, report = answer.choices[0].message.content, answer.star_edge
        return text.strip(), report["average_tokens"], report["milliseconds"]["queue"]

    async def all_of_them():
        clients = [openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) for _ in range(8)]
        try:
            return await asyncio.gather(*(one(clients[i % 8], i, q) for i, q in enumerate(wanted)))
        finally:
            await asyncio.gather(*(c.close() for c in clients))

    answers = asyncio.run(all_of_them())
    assert [text for text, _, _ in answers] == [q["answer"] for q in wanted]
    assert [average for _, average, _ in answers] == [list(presets.values())[i % 2] for i in range(100)]
    assert len({q["image"] for q in wanted}) > 40 and max(waited for _, _, waited in answers) > 500  # they did queue


def test_first_come_first_served(server):
    order, threads = [], []

    def run(i):
        ask(server.client(), stream=False)
        order.append(i)

    with busy(server):
        for i in range(6):
            threads.append(threading.Thread(target=run, args=(i,)))
            threads[-1].start()
            server.wait(lambda i=i: server.request("GET", "/health")[2]["waiting"] == i + 1)
    [t.join() for t in threads]
    assert order == list(range(6))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(server, stream):
    generated, left = (
        server.metric("star_edge_generated_tokens_total"),
        server.metric('star_edge_errors_total{error="ClientLeft"}'),
    )
    body = {
        "messages": [message(COLOR, DEMO)],
        "max_tokens": 800,
        "min_tokens": 800,
        "stream": stream,
        "temperature": 0,
    }
    data = json.dumps(body).encode()
    prompts = server.metric("star_edge_time_to_first_token_seconds_count")
    with socket.create_connection(urllib.parse.urlsplit(server.url).netloc.split(":")) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        sock.sendall(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        if stream:
            assert b"200 OK" in sock.recv(100)
        else:
            time.sleep(0.15)
    server.wait(lambda: server.metric('star_edge_errors_total{error="ClientLeft"}') == left + 1)
    assert text_of(ask(server.client())) == "red"
    n = server.metric("star_edge_generated_tokens_total") - generated
    assert n < 400, n
    assert server.metric("star_edge_time_to_first_token_seconds_count") == prompts + (2 if stream else 1)


def test_one_who_leaves_the_queue_is_not_answered(server):
    prompts = server.metric("star_edge_time_to_first_token_seconds_count")
    with busy(server):
        with pytest.raises(openai.APITimeoutError):
            ask(server.client(timeout=0.3))
        server.wait(lambda: server.request("GET", "/health")[2]["waiting"] == 0)
    assert server.metric("star_edge_time_to_first_token_seconds_count") == prompts + 1


def test_cancellable():
    import llama_cpp

    handler = StarChatHandler(refvlm.MMPROJ, verbose=False)
    llm = llama_cpp.Llama(
        str(refvlm.TEXT_MODEL), chat_handler=handler, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False
    )
    talk = lambda: llm.create_chat_completion([message(COLOR, DEMO)], temperature=0, max_tokens=4)["choices"][0][
        "message"
    ]["content"]
    for n_decodes in (0, 1, 5):  # at once, within the prompt, within the answer
        handler.last_report = None
        asked = iter(range(100))
        with (
            handler.cancellable(lambda asked=asked, n=n_decodes: next(asked) >= n),
            pytest.raises(errors.RequestCancelledError),
        ):
            llm.create_chat_completion([message(COLOR, DEMO)], max_tokens=8, logit_bias={llm.token_eos(): -100.0})
        assert (handler.last_report is None) == (n_decodes < 2)  # there is one when the prompt has been read
        assert talk() == " red"
    llm.close()


def test_slow_downloads_hold_up_nobody(monkeypatch):
    """More of them than there are threads for downloads, and all before the request that is answered first."""
    app = make_app(
        refvlm.TEXT_MODEL, refvlm.MMPROJ, Policy(allow_remote_images=True), alias="m", n_ctx=512, n_threads=1
    )
    go_on = threading.Event()

    def fetch(url, max_bytes):
        assert go_on.wait(300)
        return refvlm.DEMO_IMAGE.read_bytes()

    monkeypatch.setattr(remote, "fetch", fetch)

    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    answers = []
    try:
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        slow = [
            threading.Thread(target=lambda: answers.append(text_of(ask(client, "https://name.test/a.png"))))
            for _ in range(12)
        ]
        [t.start() for t in slow]
        time.sleep(0.3)
        assert text_of(ask(client, timeout=300)) == "red" and not answers
        go_on.set()
        [t.join() for t in slow]
    finally:
        go_on.set()
        running.should_exit = True
        thread.join()
    assert answers == ["red"] * 12


# ---- the clients of the pages, the page and the end ----


def run_client(blocks, server, tmp_path, monkeypatch, capsys):
    """Runs them as they stand, but for the port; the server is that of the module, with the reference model."""
    (code,) = blocks
    assert "http://127.0.0.1:8000" in code
    (tmp_path / "receipt.png").symlink_to(refvlm.DEMO_IMAGE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "page", "exec"), {})
    return capsys.readouterr().out


def test_client_of_the_page(server, tmp_path, monkeypatch, capsys):
    printed = run_client(pages.executed("docs/server.md", "server"), server, tmp_path, monkeypatch, capsys)
    assert "36.0 image tokens per layer" in printed and printed.endswith("54.0 image tokens per layer\n"), printed


def test_client_of_the_readme(server, tmp_path, monkeypatch, capsys):
    assert run_client(pages.executed("README.md", "server"), server, tmp_path, monkeypatch, capsys).strip()


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, html = server.request("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
    scripts = ("app.js", "api.js", "code.js", "draw.js", "media.js", "read.js", "words.js")
    files = {name: server.request("GET", f"/page/{name}") for name in (*scripts, "style.css", "demo.png", "setup.json")}
    assert all(status == 200 for status, _, _ in files.values())
    for text in (html, *(files[name][2] for name in (*scripts, "style.css"))):
        assert text and "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", ""), (
            "a URL of elsewhere"
        )
    assert set(re.findall(r'from "\./([^"]+)"', "".join(files[name][2] for name in scripts))) <= set(scripts)
    assert server.request("GET", "/page/../serve.py")[0] == server.request("GET", "/page/%2e%2e%2fapp.py")[0] == 404
    assert len(files["setup.json"][2]["demo_questions"]) == 7


def test_presets_of_the_page_are_those_of_the_server(server):
    """The page may send the fields of a preset, as JavaScript writes them: it has no 1.0, and 1 is one token."""
    setup = server.request("GET", "/page/setup.json")[2]
    assert setup["default"] == "balanced"
    for name, changes in setup["presets"].items():
        as_javascript = json.loads(
            json.dumps(changes), parse_float=lambda n: int(float(n)) if float(n) % 1 == 0 else float(n)
        )
        assert parse_prune(as_javascript) == PRESETS[name]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_good_order(how):
    server = Server()
    with ask(server.client(), stream=True, **LONG) as stream:
        next(stream)
        assert server.stop(how) == (0, "")
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_another_address_needs_no_local_name():
    """Bound to all addresses, a server has names that it cannot know; without a key it says what that means."""
    assert Policy(host="::1").is_local and Policy(host="localhost").is_local and not Policy(host="0.0.0.0").is_local
    server = Server("--host", "0.0.0.0")
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    assert server.request("GET", "/health", headers={"Host": "box.example"})[0] == 200
    status, stderr = server.stop()
    assert status == 0 and "anyone who can reach this address can use it" in stderr
