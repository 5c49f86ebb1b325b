"""star-edge serve under odd requests, slow and leaving clients: nobody ends it, no answer is 500, and others are
served.
"""

import time

import psutil
import pytest
from helpers.odd_requests import odd_requests, send
from helpers.serving import COLOR, DEMO, Server, message


@pytest.fixture(scope="module")
def server():
    server = Server("--max-queue", "200", "--body-seconds", "5")
    yield server
    status, stderr = server.stop()
    assert status == 0 and "Traceback" not in stderr, stderr[-3000:]


def good(server):
    answer = server.client().chat.completions.create(
        model="m", messages=[message(COLOR, DEMO)], temperature=0, max_tokens=4
    )
    return answer.choices[0].message.content.strip()


def soak(server, seed, n):
    """Sends n odd requests, each followed by a good one or, more often, by none. Returns seconds of the good ones."""
    seconds, statuses = [], {}
    for i, (kind, data) in enumerate(odd_requests(seed, n)):
        answer = send(server.url, data, whole=kind not in ("cut", "bytes"))
        status = answer[9:12].decode("latin-1")
        statuses[status] = statuses.get(status, 0) + 1
        assert status != "500", (i, kind, data[:3000], answer[:3000])
        body = answer.partition(b"\r\n\r\n")[2]
        assert b"star_edge/" not in body and b"site-packages" not in body and b"Traceback" not in body, (
            kind,
            data[:3000],
            body,
        )
        assert b'"code": 500' not in body and b"internal error" not in body, (kind, data[:3000], body)  # in a stream
        if i % 10 == 9:
            start = time.perf_counter()
            assert good(server) == "red", (kind, data[:3000])
            seconds.append(time.perf_counter() - start)
        assert server.process.poll() is None, (kind, data[:3000])
    return seconds, statuses


def test_two_hundred_odd_requests(server):
    _, statuses = soak(server, 1, 200)
    assert len(statuses) > 3 and statuses.get("200") and statuses.get("400")
    health = server.request("GET", "/health")[2]
    assert health == {"status": "ok", "receiving": 0, "waiting": 0, "answering": 0}


@pytest.mark.slow
def test_five_thousand_odd_requests(server, capsys):
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    seconds, statuses = soak(server, 2, 5000)
    with capsys.disabled():
        print(
            f"\nodd requests: {statuses}; a good one after a bad one: median {sorted(seconds)[len(seconds) // 2]:.3f} "
            f"s, longest {max(seconds):.3f} s; memory {before / 2**20:.0f} MB before, {memory().rss / 2**20:.0f} MB "
            "after"
        )
