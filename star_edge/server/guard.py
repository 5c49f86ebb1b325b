"""What every HTTP request passes first: who may call, how much it may send, and how many may wait.

ASGI middleware that knows headers and bytes. Knows neither models nor images.
"""

from __future__ import annotations

import hmac
import json
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

from .bodies import Bodies, Body, Refusal
from .request_log import RECORD, Record
from .schema import error_body
from .settings import Policy

_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
TICKET = "star_edge.ticket"  # key in a request's scope
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Ticket:
    """A request's place in the queue, and the memory of its body."""

    def __init__(self, guard: Guard, body: Body) -> None:
        self._guard: Guard | None = guard
        self._body = body
        guard.n_waiting += 1

    def take_body(self) -> bytearray:
        """The whole body; empty the second time. Its memory still counts, for what is made of it."""
        data, self._body.data = self._body.data, bytearray()
        return data

    def release(self) -> None:
        """Gives up place and memory. Calling it again does nothing."""
        if self._guard is not None:
            self._guard.n_waiting -= 1
            self._guard = None
        self._body.release()


class Guard:
    """Refuses what the policy does not allow. Reads whole bodies before anything else sees them.

    Args:
        app: The application behind it.
        policy: What is allowed.
        on_post: Called with the path and status of every answered POST request.
        paths: Paths that on_post names; others are "other".
        bodies: The bodies that arrive.
        log: Called with the line of every POST request, when it is over.

    Attributes:
        n_waiting: Requests that have arrived and are not answered yet.
    """

    def __init__(
        self,
        app: Any,
        policy: Policy,
        on_post: Callable[[str, int], None],
        paths: set[str],
        bodies: Bodies,
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.app, self.policy, self.on_post, self.paths = app, policy, on_post, paths
        self.bodies, self.log = bodies, log
        self.n_waiting = 0
        self._names = _LOCAL_NAMES | {policy.host.strip("[]").lower()}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        status = 499  # nginx's code: the client left before there was a status
        client = scope.get("client")
        record = scope[RECORD] = Record(client[0] if client else None, scope["path"])

        async def note_status(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if scope["method"] == "POST":
                    name = b"x-request-id"
                    headers = [header for header in message.get("headers", []) if header[0].lower() != name]
                    message["headers"] = [*headers, (name, record.id.encode())]
            await send(message)

        try:
            self._check_caller(scope)
            if scope["method"] == "POST":
                await self._post(scope, receive, note_status)
            else:
                await self.app(scope, receive, note_status)
        except Refusal as refusal:
            record.facts["error"] = refusal.code
            await _answer(note_status, refusal)
        finally:
            if scope["method"] == "POST":  # other paths are a stranger's text, and each would be kept for ever
                self.on_post(scope["path"] if scope["path"] in self.paths else "other", status)
                if self.log is not None:
                    self.log(record.line(status))

    async def _post(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"").lstrip(b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self.policy.max_body_bytes):
            raise self.bodies.too_large()
        self._check_queue()  # before the client has sent everything
        body = Body(self.bodies)
        if not await body.read(receive):
            return
        try:
            self._check_queue()
        except Refusal:
            body.release()
            raise
        ticket = scope[TICKET] = Ticket(self, body)
        is_first = True

        async def receive_after_body() -> dict[str, Any]:
            nonlocal is_first
            if is_first:
                is_first = False
                return {"type": "http.request", "body": b"", "more_body": False}
            return await receive()

        try:
            await self.app(scope, receive_after_body, send)
        finally:
            ticket.release()

    def _check_queue(self) -> None:
        if self.n_waiting > self.policy.max_queue:
            raise Refusal(503, f"{self.policy.max_queue} requests wait already: ask again later", "queue_full")

    def _check_caller(self, scope: dict[str, Any]) -> None:
        headers = dict(scope["headers"])  # the last of a repeated header, for every check
        host = headers.get(b"host", b"").decode("latin-1")
        if self.policy.is_local and _name(host) not in self._names:
            # Otherwise a foreign site whose name points at this machine would have the server's origin for a browser.
            raise Refusal(403, f"this server is localhost, not {host[:100]!r}: use its own address", "wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        foreign = origin and scope["method"] not in ("GET", "HEAD") and _site(origin) != host.lower()
        if foreign and not {"*", origin.lower()} & set(self.policy.cors_origins):
            raise Refusal(
                403,
                f"pages of {origin[:100]!r} may not use this server: start it with --cors-origin",
                "wrong_origin",
            )
        path = scope["path"]
        if self.policy.api_key is None or path in ("/", "/health") or path.startswith("/page/"):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.policy.api_key.encode()):
            raise Refusal(
                401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", "invalid_api_key"
            )


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _site(origin: str) -> str | None:
    """The host and port of an Origin header; None if it is not valid."""
    try:
        return urllib.parse.urlsplit(origin).netloc.lower() or None
    except ValueError:  # "http://["
        return None


async def _answer(send: Send, refusal: Refusal) -> None:
    kind = "server_error" if refusal.status == 503 else "invalid_request_error"
    body = json.dumps(error_body(str(refusal), kind, refusal.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += {401: [(b"www-authenticate", b"Bearer")], 503: [(b"retry-after", b"1")]}.get(refusal.status, [])
    if refusal.status == 408:
        headers.append(
            (b"connection", b"close")
        )  # for others the rest of the body is read and dropped: a reset could overtake the answer
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
