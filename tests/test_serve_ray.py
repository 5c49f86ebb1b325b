"""star-edge serve --ray: the front of several servers; replicas on a local Ray, of which one is killed under load."""

import asyncio
import collections
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from helpers.serving import Server, data_url, message
from starlette.testclient import TestClient

from star_edge.serve_ray import messages_of
from star_edge.server.front import ServerLostError, make_front, picture_name
from star_edge.server.request_log import RECORD
from star_edge.server.settings import Policy

QUESTIONS = Path(__file__).parent / "refvlm_questions"
HEADERS = {"json": [(b"content-type", b"application/json")], "stream": [(b"content-type", b"text/event-stream")]}


def body_of(*urls, **fields):
    return json.dumps({"messages": [message("what?", *urls)], **fields}).encode()


# ---- the front, with servers that are scripts ----


def client(*scripts):
    """A client of a front whose n-th ask is answered by the n-th script; and what was asked."""
    asked = []

    async def ask(scope, body, picture):
        asked.append((scope["path"], bytes(body), picture))
        for item in scripts[len(asked) - 1]:
            if isinstance(item, Exception):
                raise item
            yield item

    app = make_front(Policy(host="testserver"), ask, lambda: 2)
    return TestClient(app, base_url="http://testserver"), asked


def start(kind, status=200):
    return {"type": "http.response.start", "status": status, "headers": HEADERS[kind]}


def part(text, more=True):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


@pytest.mark.parametrize(
    "lost",
    [
        [ServerLostError("dead")],
        [start("json"), ServerLostError("dead")],
        [start("json"), part('{"a"'), ServerLostError("dead")],
        [start("stream"), ServerLostError("dead")],
        [],
    ],
)
def test_a_request_whose_server_is_lost_before_it_is_sent_is_asked_again(lost):
    web, asked = client(lost, [start("json", 201), part('{"a": '), part("1}", more=False)])
    data = body_of()
    answer = web.post("/v1/chat/completions", content=data)
    assert (answer.status_code, answer.json()) == (201, {"a": 1})
    assert [body for _, body, _ in asked] == [data, data]


def test_a_stream_that_is_cut_off_ends_with_an_error():
    web, asked = client([start("stream"), part("data: 1\n\n"), ServerLostError("dead")])
    answer = web.post("/v1/chat/completions", content=body_of(stream=True))
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: 1" and json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert len(asked) == 1


def test_the_front_logs_what_the_server_says(tmp_path):
    log = tmp_path / "requests.jsonl"
    facts = {"image_tokens": 144, "finish_reason": "stop"}

    async def ask(scope, body, picture):
        yield start("stream")
        yield part("data: 1\n\n", more=False)
        yield {"type": RECORD, "facts": facts}

    policy = Policy(host="testserver", request_log=str(log), request_log_format="json")
    web = TestClient(make_front(policy, ask, lambda: 2), base_url="http://testserver")
    answer = web.post("/v1/chat/completions", content=body_of(stream=True))
    assert answer.text == "data: 1\n\n"
    line = json.loads(log.read_text())
    assert line["id"] == answer.headers["x-request-id"] and line["status"] == 200
    assert {name: line[name] for name in facts} == facts


def test_three_servers_are_tried():
    web, asked = client(*[[ServerLostError("dead")]] * 3)
    answer = web.post("/v1/chat/completions", content=body_of())
    assert answer.status_code == 503 and "ask again" in answer.json()["error"]["message"] and len(asked) == 3


def test_other_paths():
    web, asked = client([start("json"), part("[]", more=False)])
    assert web.get("/v1/models").json() == [] and asked == [("/v1/models", b"", "")]
    assert web.get("/health").json() == {"status": "ok", "receiving": 0, "replicas": 2}
    assert web.get("/nothing").status_code == 404


def test_a_picture_has_one_name():
    a, b = data_url(QUESTIONS / "0000.png"), data_url(QUESTIONS / "0001.png")
    name = picture_name(body_of(a, temperature=0))
    assert name and name == picture_name(body_of(a, b, stream=True)) != picture_name(body_of(b))
    for odd in (b"", b"[" * 10**5, b"{}", b'{"messages": 1}', body_of(), body_of(a, unknown=1)):
        assert picture_name(odd) == ""


def test_an_app_is_told_that_the_client_has_left():
    heard = []

    async def app(scope, receive, send):
        heard.append((await receive())["body"])
        await send(start("stream"))
        heard.append((await receive())["type"])

    async def talk():
        messages = messages_of(app, {"type": "http"}, b"a body")
        assert (await anext(messages))["type"] == "http.response.start"
        await messages.aclose()
        await asyncio.sleep(0.01)

    asyncio.run(talk())
    assert heard == [b"a body", "http.disconnect"]


# ---- on Ray ----


def replicas(server):
    """Processes of the replicas, below the server's Ray."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica" in _title(child)]


def _title(process):
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def ask(server, picture, question):
    answer = server.client(timeout=300).chat.completions.create(
        model="m", messages=[message(question, picture)], temperature=0, max_tokens=6
    )
    return answer.choices[0].message.content, answer.model_extra["star_edge"]["images"][0]


def cases(n_pictures, n_questions):
    by_image = collections.defaultdict(list)
    for line in (QUESTIONS / "questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        by_image[question["image"]].append(question["question"])
    chosen = list(by_image.items())[:n_pictures]
    return [(data_url(QUESTIONS / name), question) for name, asked in chosen for question in asked[:n_questions]]


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up_when_a_replica_is_killed():
    """200 requests, two replicas, one killed on the way. The right answers are those of one server without Ray."""
    pytest.importorskip("ray.serve")
    pairs = cases(5, 4)
    alone = Server()
    try:
        right = [ask(alone, *pair)[0] for pair in pairs]
    finally:
        alone.stop()
    assert len(set(right)) > 3
    server = Server("--ray", "--workers", "2")
    try:
        before = replicas(server)
        assert len(before) == 2
        for picture, question in pairs[::4]:
            ask(server, picture, question)
        time.sleep(5)  # a replica tells the front every second which pictures it has
        for picture, question in pairs:  # one after the other: each picture's replica is free
            assert ask(server, picture, question)[1]["cached"]

        order = list(range(len(pairs))) * 10
        random.Random(0).shuffle(order)
        n_done, enough = 0, threading.Event()

        def one(i):
            nonlocal n_done
            text = ask(server, *pairs[i])[0]
            n_done += 1
            if n_done >= 40:
                enough.set()
            return text == right[i]

        with ThreadPoolExecutor(8) as pool:
            results = [pool.submit(one, i) for i in order]
            enough.wait(300)
            before[0].kill()
            assert all(result.result() for result in results)
        server.wait(lambda: server.request("GET", "/health")[2]["replicas"] == 2)
        assert before[1].pid in {process.pid for process in replicas(server)}
    finally:
        server.stop()
