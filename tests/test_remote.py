"""Images that the server fetches: public addresses alone, the one that was checked, redirects checked again, and an end
to it.
"""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from star_edge import errors
from star_edge.server import remote


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
    ],
)
def test_public_addresses(address, public):
    assert remote.is_public(address) == public


@pytest.fixture
def web(monkeypatch):
    """A server that answers for every public address; names resolve to what `names` says. Logs connections and
    requests.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            web.requests.append((self.headers["Host"], self.path))
            status, headers, body = web.pages.get(self.path, (404, {}, b""))
            self.send_response(status)
            for item in headers.items():
                self.send_header(*item)
            self.end_headers()
            with contextlib.suppress(OSError):
                for part in body if isinstance(body, list) else [body]:
                    self.wfile.write(part)
                    time.sleep(0.05 * isinstance(body, list))

    class Web:
        def __init__(self):
            self.names, self.pages, self.requests, self.connected = {}, {}, [], []
            self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    web = Web()
    threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    connect = socket.create_connection

    real = remote.socket.getaddrinfo

    def resolve(name, port, *args, **options):
        if name == "127.0.0.1":
            return real(name, port, *args, **options)
        addresses = web.names.get(name, ["93.184.216.34"])
        return [
            (None, None, None, "", (address, port))
            for address in (addresses.pop(0) if isinstance(addresses[0], list) else addresses)
        ]

    def create_connection(address, timeout):
        web.connected.append(address)
        return connect(web.server.server_address, timeout)

    monkeypatch.setattr(remote.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote.socket, "create_connection", create_connection)
    yield web
    web.server.shutdown()
    web.server.server_close()


def test_fetch(web):
    web.pages = {"/a?b=1": (200, {}, b"data"), "/r": (302, {"Location": "//other.test/a?b=1"}, b"")}
    assert remote.fetch("http://name.test:81/a?b=1", 4) == b"data"
    assert web.connected == [("93.184.216.34", 81)] and web.requests == [("name.test:81", "/a?b=1")]
    assert remote.fetch("http://name.test/r", 4) == b"data"
    assert web.requests[-1] == ("other.test", "/a?b=1")


def test_the_connection_goes_to_the_address_that_was_checked(web):
    """A name that is private when it is asked again (DNS rebinding) is not asked again."""
    web.names["name.test"] = [["93.184.216.34"], ["127.0.0.1"]]
    web.pages["/"] = (200, {}, b"data")
    assert remote.fetch("http://name.test", 10) == b"data"
    assert web.connected == [("93.184.216.34", 80)]
    web.names["mixed.test"] = ["93.184.216.34", "10.0.0.1"]
    with pytest.raises(errors.ImageError, match="not on a public address"):
        remote.fetch("http://mixed.test", 10)
    assert len(web.connected) == 1


@pytest.mark.parametrize(
    "target", ["http://private.test/", "file:///etc/passwd", "ftp://name.test/", "http://user@name.test/", "/loop"]
)
def test_redirects_are_checked(web, target):
    web.names["private.test"] = ["169.254.169.254"]
    web.pages["/loop"] = (302, {"Location": target}, b"")
    with pytest.raises(errors.ImageError, match="public address|not a URL that is fetched|more than 5 times"):
        remote.fetch("http://name.test/loop", 10)
    assert {address for address, _ in web.connected} == {"93.184.216.34"} and len(web.connected) <= 6


def test_fetch_ends(web):
    web.pages = {
        "/big": (200, {}, b"12345"),
        "/slow": (200, {}, [b"x"] * 10**6),
        "/cut": (200, {"Content-Length": "9"}, b"1234"),
        "/error": (500, {}, b""),
    }
    with pytest.raises(errors.ImageTooLargeError):
        remote.fetch("http://name.test/big", 4)
    with pytest.raises(errors.ImageError, match="within 0.3 s"):  # and not after the half day that the server takes
        remote.fetch("http://name.test/slow?key=secret".replace("?key=secret", ""), 10**7, 0.3)
    for path in ("/cut", "/error", "/gone"):
        with pytest.raises(errors.ImageError, match="cannot be fetched") as caught:
            remote.fetch(f"http://name.test{path}?key=secret", 1000)
        assert "secret" not in str(caught.value)
