"""What every HTTP request passes first: who may call, how much it may send, and how many may wait.

ASGI middleware that knows headers and bytes; knows neither models nor images.
"""

from __future__ import annotations

import hmac
import json
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from .schema import error_body
from .settings import Policy

_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str) -> None:
        self.status, self.code = status, code
        super().__init__(message)


class Guard:
    """Refuses what the policy does not allow; reads bodies whole before anything else sees them.

    on_post: called with the path and the status of every POST request that was answered.
    """

    def __init__(self, app: Any, policy: Policy, on_post: Callable[[str, int], None], paths: set[str]) -> None:
        self.app, self.policy, self.on_post, self.paths = app, policy, on_post, paths
        self._n_posts = 0  # in flight
        self._names = _LOCAL_NAMES | {policy.host.strip("[]")}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        status = 499  # the client left before there was one, as nginx writes it

        async def note_status(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_caller(scope)
            if scope["method"] == "POST":
                await self._post(scope, receive, note_status)
            else:
                await self.app(scope, receive, note_status)
        except _Refusal as refusal:
            await _answer(note_status, refusal)
        finally:
            if scope["method"] == "POST":  # names of other paths are strangers' words, and each would be kept for good
                self.on_post(scope["path"] if scope["path"] in self.paths else "other", status)

    async def _post(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if self._n_posts > self.policy.max_queue:
            raise _Refusal(503, f"{self.policy.max_queue} requests wait already: ask again later", "queue_full")
        self._n_posts += 1
        try:
            body = await self._read_body(scope, receive)
            if body is None:
                return
            waiting = [{"type": "http.request", "body": body, "more_body": False}]
            del body

            async def replay() -> dict[str, Any]:
                return waiting.pop() if waiting else await receive()

            await self.app(scope, replay, send)
        finally:
            self._n_posts -= 1

    def _check_caller(self, scope: dict[str, Any]) -> None:
        headers = dict(scope["headers"])  # of a repeated header the last, here and for all that is checked
        host = headers.get(b"host", b"").decode("latin-1")
        if self.policy.is_local and _name(host) not in self._names:
            # A foreign site whose name was pointed at this machine would otherwise be the same origin as the server for a browser.
            raise _Refusal(403, f"this server is localhost, not {host[:100]!r}: use its own address", "wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD") and urllib.parse.urlsplit(origin).netloc != host:
            if not {"*", origin} & set(self.policy.cors_origins):
                raise _Refusal(403, f"pages of {origin[:100]} may not use this server: start it with --cors-origin", "wrong_origin")
        path = scope["path"]
        if self.policy.api_key is None or path in ("/", "/health") or path.startswith("/page/"):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.policy.api_key.encode()):
            raise _Refusal(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", "invalid_api_key")

    async def _read_body(self, scope: dict[str, Any], receive: Receive) -> bytes | None:
        """The whole body, or None when the client left."""
        limit = self.policy.max_body_bytes
        too_large = _Refusal(413, f"the request is larger than {limit} bytes: send smaller images, or raise --max-body-bytes", "too_large")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        with anyio.move_on_after(self.policy.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
        raise _Refusal(408, f"the request took more than {self.policy.body_seconds:g} s to arrive: send it again", "too_slow")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _answer(send: Send, refusal: _Refusal) -> None:
    kind = "server_error" if refusal.status == 503 else "invalid_request_error"
    body = json.dumps(error_body(str(refusal), kind, refusal.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += {401: [(b"www-authenticate", b"Bearer")], 503: [(b"retry-after", b"1")]}.get(refusal.status, [])
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
