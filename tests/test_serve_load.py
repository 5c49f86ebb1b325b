"""star-edge serve with clients that send slowly, take nothing, or leave; and what it holds of them in memory."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import openai
import psutil
import pytest
import uvicorn
from helpers.serving import COLOR, DEMO, Server, data_url, message

from star_edge import refvlm
from star_edge.server.app import make_app
from star_edge.server.bodies import Bodies, Body, Refusal

QUESTIONS = Path(__file__).parent / "refvlm_questions"
IDLE = {"status": "ok", "receiving": 0, "waiting": 0, "answering": 0}


def health(server):
    return server.request("GET", "/health")[2]


def good(server):
    answer = server.client().chat.completions.create(
        model="m", messages=[message(COLOR, DEMO)], temperature=0, max_tokens=4
    )
    return answer.choices[0].message.content.strip()


@contextlib.contextmanager
def uploads(server, n, sent, length):
    """n requests whose bodies are under way; sent bytes of each have been sent."""
    address = urllib.parse.urlsplit(server.url)
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(n):
            sock = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=20))
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length
            )
            with contextlib.suppress(OSError):  # given up already
                sock.sendall(b" " * sent)
            sockets.append(sock)
        yield sockets


def answer_of(sock):
    """A whole answer in JSON."""
    answer = b""
    while not answer.endswith(b"}"):
        part = sock.recv(10_000)
        assert part, answer
        answer += part
    return answer


# ---- slow uploads ----


def test_slow_uploads_keep_nobody_out():
    server = Server("--max-queue", "2")
    with uploads(server, 65, 10, 1000):
        server.wait(lambda: health(server)["receiving"] == 65)
        assert good(server) == "red"
        assert health(server) == {**IDLE, "receiving": 65}
    server.wait(lambda: health(server) == IDLE)
    assert server.stop() == (0, "")


def test_where_there_is_no_room_the_first_upload_is_given_up():
    server = Server("--max-body-bytes", "1000000", "--max-held-bytes", "3000000")
    with uploads(server, 5, 900_000, 1_000_000) as sockets:
        refused = [answer_of(sock) for sock in sockets[:2]]
        server.wait(lambda: health(server)["receiving"] == 3)
        assert good(server) == "red"
    assert all(
        answer.startswith(b"HTTP/1.1 503") and b"no_room" in answer and b"retry-after: 1" in answer
        for answer in refused
    )
    server.wait(lambda: health(server) == IDLE)
    assert server.stop() == (0, "")


def test_bodies_that_wait_have_a_bound():
    """Whole ones are not given up: whoever comes later is refused, and the room is there again when they are
    answered.
    """
    server = Server("--max-body-bytes", "1000000", "--max-held-bytes", "3000000")
    large = {"messages": [message(COLOR, DEMO)], "metadata": {"x": "y" * 900_000}, "max_tokens": 1}
    answers = []
    with server.client().chat.completions.create(
        model="m",
        messages=[message(COLOR, DEMO)],
        temperature=0,
        max_tokens=600,
        stream=True,
        extra_body={"min_tokens": 600},
    ) as stream:
        next(iter(stream))
        threads = [
            threading.Thread(target=lambda: answers.append(server.request("POST", "/v1/chat/completions", large)[0]))
            for _ in range(3)
        ]
        for i, thread in enumerate(threads):
            thread.start()
            server.wait(lambda i=i: health(server)["waiting"] == i + 1)
        status, _, answer = server.request("POST", "/v1/chat/completions", large)
        assert (
            status == 503 and answer["error"]["code"] == "queue_full" and "bytes already" in answer["error"]["message"]
        )
    [thread.join() for thread in threads]
    assert answers == [200] * 3
    assert server.request("POST", "/v1/chat/completions", large)[0] == 200
    assert server.stop() == (0, "")


def read(bodies, *parts):
    """Begins to read a body of these parts, of which the last does not come."""
    body, come = Body(bodies), asyncio.Event()
    left = list(parts)

    async def receive():
        if not left:
            await come.wait()
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    return body, asyncio.create_task(body.read(receive)), come


def test_bodies():
    async def run():
        bodies = Bodies(max_bytes=10, max_held=20, seconds=100, max_arriving=3)
        _, first_read, _ = read(bodies, b"12345678")
        second, second_read, second_comes = read(bodies, b"1234", b"5678")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bodies.n_held == 16
        third, third_read, third_comes = read(bodies, b"12345")
        for _ in range(3):
            await asyncio.sleep(0)
        assert bodies.n_held == 13 and list(bodies.arriving) == [second, third]
        with pytest.raises(Refusal, match="no room") as caught:
            await first_read
        assert caught.value.status == 503
        third_comes.set()
        assert await third_read and third.data == b"12345" and bodies.n_held == 13
        _, too_large, _ = read(bodies, b"123456", b"78901")
        with pytest.raises(Refusal, match="larger than 10 bytes"):
            await too_large
        assert bodies.n_held == 13
        second_comes.set()
        assert await second_read and second.data == b"12345678"
        _, no_room, _ = read(bodies, b"12345678")  # 13 are of whole ones
        with pytest.raises(Refusal, match="the requests that wait hold 13 bytes"):
            await no_room
        others = [read(bodies) for _ in range(4)]
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(Refusal, match="no room"):
            await others[0][1]
        for body in (second, third, third):
            body.release()
        assert bodies.n_held == 0 and len(bodies.arriving) == 3
        for _, task, come in others[1:]:
            come.set()
            assert await task
        assert not bodies.arriving

    asyncio.run(run())


# ---- clients that leave ----


def test_a_stream_that_yields_nothing_ends_with_its_client():
    """A lone byte of UTF-8 is no text: llama_cpp waits for the rest, and gives out nothing that could be refused."""
    app = make_app(refvlm.TEXT_MODEL, refvlm.MMPROJ, alias="m", n_ctx=512, n_threads=1)
    engine, llama = app.state.engine, app.state.engine.llama
    context, decode, n_decodes = llama._ctx, llama._ctx.decode, 0

    def decode_until_left(batch):
        nonlocal n_decodes
        n_decodes += engine.handler.last_report is not None  # of the answer
        if n_decodes == 5:
            (job,) = engine.jobs
            assert job._stopped.wait(20)
        return decode(batch)

    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        context.decode = decode_until_left
        body = {
            "messages": [message(COLOR, DEMO)],
            "stream": True,
            "max_tokens": 300,
            "min_tokens": 300,
            "logit_bias": {"258": 100},
            "temperature": 0,
        }
        data = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
                + data
            )
            while n_decodes < 5:
                time.sleep(0.01)
            assert engine.answering == 1
        while engine.jobs:
            time.sleep(0.01)
        assert n_decodes == 5 and engine.answering == engine.waiting == 0
        del context.decode
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="m", messages=[message(COLOR, DEMO)], temperature=0, max_tokens=4)
        assert answer.choices[0].message.content.strip() == "red"
    finally:
        running.should_exit = True
        thread.join()


def test_a_process_whose_engine_does_not_stop_ends():
    code = "import time; from star_edge.cli.serve import end_after; end_after(0.1); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and "did not stop within 0.1 s" in ended.stderr


def crowd(server, n, seed):
    """n clients at once, two in five of which leave at some time. Returns the answers of the others, and what they
    should be.
    """
    wanted = [json.loads(line) for line in (QUESTIONS / "questions.jsonl").read_text().splitlines()]
    wanted = [q for q in wanted if q["family"] in ("color", "digit")]
    rng = random.Random(seed)
    plans = [
        (wanted[i % len(wanted)], rng.uniform(0, 0.05 * n) if i % 5 < 2 else None, rng.random() < 0.5) for i in range(n)
    ]

    async def one(client, question, leaves_after, stream):
        options = {"model": "m", "temperature": 0, "max_tokens": 4, "stream": stream}
        request = client.chat.completions.create(
            messages=[message(question["question"], data_url(QUESTIONS / question["image"]))], **options
        )
        if leaves_after is not None:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                answer = await asyncio.wait_for(request, leaves_after)
                if stream:
                    await answer.close()
            return None
        answer = await request
        if not stream:
            return answer.choices[0].message.content.strip()
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer]).strip()

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
                )
                for _ in range(n)
            ]
            return await asyncio.gather(*(one(client, *plan) for client, plan in zip(clients, plans)))

    answers = asyncio.run(run())
    stayed = [i for i, (_, leaves_after, _) in enumerate(plans) if leaves_after is None]
    return [answers[i] for i in stayed], [plans[i][0]["answer"] for i in stayed]


def test_thirty_clients_of_which_twelve_leave():
    server = Server()
    answers, wanted = crowd(server, 30, 1)
    assert answers == wanted and len(wanted) == 18
    server.wait(lambda: health(server) == IDLE)
    assert server.stop() == (0, "")


@pytest.mark.slow
def test_a_hundred_and_twenty_clients_of_which_forty_percent_leave(capsys):
    server = Server("--max-queue", "150")
    process = psutil.Process(server.process.pid)
    good(server)
    before = process.memory_info().rss
    for seed in range(3):
        answers, wanted = crowd(server, 120, seed)
        assert answers == wanted and len(wanted) == 72
    server.wait(lambda: health(server) == IDLE)
    with capsys.disabled():
        print(
            f"\n3 x 120 clients: memory {before / 2**20:.0f} MB before, {process.memory_info().rss / 2**20:.0f} MB "
            "after"
        )
    assert server.stop() == (0, "")


@pytest.mark.slow
def test_large_requests_at_once(capsys):
    """40 requests of 30 MB: what is held of them stays under what --help says, whoever is refused."""
    server = Server()
    good(server)
    process = psutil.Process(server.process.pid)
    before, peak, over = process.memory_info().rss, 0, threading.Event()

    def watch():
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    statuses = []
    body = json.dumps(
        {"messages": [message(COLOR, DEMO)], "metadata": {"x": "y" * 30_000_000}, "max_tokens": 4}
    ).encode()

    def one():
        with contextlib.suppress(OSError):
            statuses.append(server.request("POST", "/v1/chat/completions", body)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=one) for _ in range(40)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    over.set()
    watcher.join()
    with capsys.disabled():
        print(
            f"\n40 x 30 MB at once: {(peak - before) / 2**20:.0f} MB more than before at most; statuses "
            f"{sorted(statuses)}"
        )
    assert set(statuses) <= {200, 503} and 200 in statuses
    assert peak - before <= 2 * 256 * 2**20 + 4 * 32 * 2**20
    assert good(server) == "red"
    assert server.stop(signal.SIGTERM)[0] == 0
