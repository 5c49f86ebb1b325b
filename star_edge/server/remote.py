"""Fetches images from strangers' URLs: from public addresses only, within limits of time and size.

Knows HTTP and addresses. Knows neither image formats nor requests.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import urllib.parse

from ..errors import ImageError, ImageTooLargeError
from ..io.images import USER_AGENT

MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# IANA's registries of special-purpose addresses. What `ipaddress` knows of them depends on the Python version.
_SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "2620:4f:8000::/48",
        "3fff::/20",
    )
]
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all that IANA has assigned as global unicast
_REMEDY = "check the URL, or send the image as a data: URL"


def fetch(url: str, max_bytes: int, seconds: float = 20.0) -> bytes:
    """Fetches the body at an http:// or https:// URL.

    The name is resolved once per hop, all its addresses are checked, and the connection goes to a checked address. A
    name that changes its address in between gains nothing. The environment's proxies are not used, because they resolve
    names themselves.

    Args:
        url: The URL.
        max_bytes: Bytes of the body at most.
        seconds: Limit for everything, redirects included. Resolving names has the resolver's own limit.

    Raises:
        ImageError: The URL is not valid, its address is not public, or there is no answer.
        ImageTooLargeError: The body has more than max_bytes.
    """
    deadline = _Deadline(seconds)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            body, url = _get(url, max_bytes, deadline)
            if body is not None:
                return body
        raise ImageError(f"{_shown(url)} is redirected more than {MAX_REDIRECTS} times", _REMEDY)
    except ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = (
            f"no complete answer within {seconds:g} s"
            if deadline.passed or isinstance(error, TimeoutError)
            else type(error).__name__
        )
        raise ImageError(f"{_shown(url)} cannot be fetched ({reason})", _REMEDY) from error
    finally:
        deadline.cancel()


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet. IPv6 addresses that stand for IPv4 ones are checked as those."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_V6:
            return False
    if any(
        ip.version == network.version and ip in network for network in _SPECIAL
    ):  # among them old tunnels, whose ends are unknown
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_private)


class _Deadline:
    """Shuts the socket when the time is up. A server that sends a byte now and then would pass every read timeout."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passed = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, sock: socket.socket) -> None:
        with self._lock:
            self._socket = sock
            if self.passed:
                raise TimeoutError

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # closed already
                    self._socket.shutdown(socket.SHUT_RDWR)

    def cancel(self) -> None:
        self._timer.cancel()


def _get(url: str, max_bytes: int, deadline: _Deadline) -> tuple[bytes | None, str]:
    """The body and the URL; or None and the URL of a redirect."""
    parts = urllib.parse.urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or not url.isascii()
        or re.search(r"[\s\\]", url)
    ):
        raise ImageError(
            f"{_shown(url)} is not a URL that is fetched", "use http(s)://, without a user name, percent-encoded"
        )
    connection = http.client.HTTPConnection(parts.hostname, 0)
    try:
        connection.sock = _connect(parts, deadline)
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for name, value in (
            ("Host", parts.netloc),
            ("User-Agent", USER_AGENT),
            ("Accept", "image/*"),
            ("Connection", "close"),
        ):
            connection.putheader(name, value)
        connection.endheaders()
        with connection.getresponse() as response:
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return None, urllib.parse.urljoin(url, location)
            if response.status != 200:
                raise ImageError(f"{_shown(url)} cannot be fetched (HTTP {response.status})", _REMEDY)
            data = bytearray()
            while chunk := response.read1(min(_CHUNK_BYTES, max_bytes + 1 - len(data))):
                data += chunk
                if len(data) > max_bytes:
                    raise ImageTooLargeError(
                        f"{_shown(url)} is larger than the {max_bytes} bytes allowed", "send a smaller image"
                    )
            if response.length:  # missing of Content-Length, perhaps cut by the deadline
                raise TimeoutError if deadline.passed else http.client.IncompleteRead(b"", response.length)
            if deadline.passed:
                raise TimeoutError
            return bytes(data), url
    finally:
        connection.close()


def _connect(parts: urllib.parse.SplitResult, deadline: _Deadline) -> socket.socket:
    """A connection to the URL's host. All its addresses must be public."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or not all(is_public(address) for address in addresses):
        raise ImageError(f"{_shown(parts.geturl())} is not on a public address", "send the image as a data: URL")
    error: OSError | None = None
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), deadline.seconds)
            break
        except OSError as caught:
            error = caught
            if deadline.passed:
                raise
    else:
        assert error is not None  # there is an address, and none was connected to
        raise error
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
            deadline.watch(sock)
            sock.do_handshake()
        else:
            deadline.watch(sock)
        return sock
    except BaseException:
        sock.close()
        raise


def _shown(url: str) -> str:
    """The URL for messages: short, without user names and queries, which may be secret."""
    text = re.sub(r"(?<=://)[^/]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])[:160]
    return "".join(c if c.isprintable() else "?" for c in text)
