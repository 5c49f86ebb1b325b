"""Images from URLs: redirects, failures, limits. HTTP is served from this process."""

from __future__ import annotations

import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import PIL.Image
import pytest
from helpers.pictures import encode, error_of, photo

from star_edge.errors import ImageError, ImageTooLargeError
from star_edge.io.images import ImageLimits, load_image

SERVED = encode(PIL.Image.fromarray(photo()))


class Handler(BaseHTTPRequestHandler):
    agents: ClassVar[list[str]] = []
    release = threading.Event()

    def do_GET(self):
        self.agents.append(self.headers.get("User-Agent", ""))
        path = self.path.split("?")[0]
        if path == "/missing.png":
            return self.send_error(404)
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", urllib.parse.unquote(path[4:]))
            return self.end_headers()
        self.send_response(200)
        if path == "/declared.png":
            self.send_header("Content-Length", str(10**12))
        elif path == "/cut.png":
            self.send_header("Content-Length", str(len(SERVED)))
        self.end_headers()
        if path == "/slow.png":
            self.wfile.write(SERVED[:20])
            self.wfile.flush()
            self.release.wait(5)
        elif path == "/dripping.png":
            try:
                while not self.release.wait(0.05):
                    self.wfile.write(b"\0")
                    self.wfile.flush()
            except OSError:
                pass
        elif path == "/endless.png":
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass
        elif path == "/cut.png":
            self.wfile.write(SERVED[: len(SERVED) // 2])
        elif path == "/page.html":
            self.wfile.write(b"<html>no image</html>")
        elif path != "/empty.png":
            self.wfile.write(SERVED)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Handler.agents.clear()
    Handler.release.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_http(server):
    assert (load_image(server + "/a.png?x=1") == photo()).all()
    assert (load_image(server.replace("http", "HTTP") + "/a.png", ImageLimits(max_bytes=len(SERVED))) == photo()).all()
    assert all("star-edge" in agent for agent in Handler.agents)
    relative = load_image(f"{server}/to/{urllib.parse.quote('/a.png', safe='')}")
    absolute = load_image(f"{server}/to/{urllib.parse.quote(server + '/a.png', safe='')}")
    assert (relative == photo()).all() and (absolute == photo()).all()


def test_http_failures_name_the_url(server):
    assert "404" in error_of(server + "/missing.png")
    for path in ("/missing.png", "/page.html", "/empty.png", "/cut.png"):
        assert server + path in error_of(server + path)
    assert "secret" not in error_of(server + "/missing.png?token=secret")
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:,x"):
        message = error_of(f"{server}/to/{urllib.parse.quote(target, safe='')}")
        assert "/to/" in message


def test_http_failures_show_no_secrets(server):
    host = server.removeprefix("http://")
    for url in (
        f"http://user:secret@{host}/a.png",
        "http://user:secret@127.0.0.1/a.png",
        f"{server}/a b.png?token=secret",
    ):
        with pytest.raises(ImageError) as caught:
            load_image(url)
        assert "secret" not in str(caught.value) and "secret" not in str(caught.value.__cause__)
    target = urllib.parse.quote("ftp://user:secret@127.0.0.1/a.png?token=secret", safe="")
    with pytest.raises(ImageError) as caught:
        load_image(f"{server}/to/{target}")
    # The path of this test's own URL spells the target, so only what follows it counts.
    assert "secret" not in str(caught.value).split("redirected to")[1] and "secret" not in str(caught.value.__cause__)


def test_http_redirect_loop(server):
    assert "/to/" in error_of(f"{server}/to/")


def test_http_byte_limit(server):
    tight = ImageLimits(max_bytes=len(SERVED) - 1)
    for path in ("/a.png", "/declared.png", "/endless.png"):
        assert server + path in error_of(server + path, tight, ImageTooLargeError)


def test_http_timeout(server):
    limits = ImageLimits(timeout_s=0.2)
    for path in ("/slow.png", "/dripping.png"):
        message = error_of(server + path, limits)
        assert "0.2 s" in message and path in message


def test_http_off(server):
    message = error_of(server + "/a.png", ImageLimits(allow_http=False))
    assert server in message and "allow_http" in message and not Handler.agents
    assert (load_image(SERVED, ImageLimits(allow_http=False)) == photo()).all()


def test_http_refused_and_malformed(server):
    host = "http://127.0.0.1"
    for url in (
        host + ":1/a.png",
        "http://",
        host + ":port/a",
        host + "/a b",
        "http://[/",
        host + "/ä",
        host + "/a\nb",
    ):
        assert "http://" in error_of(url, ImageLimits(timeout_s=2))
