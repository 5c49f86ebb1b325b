"""The front of several servers: the guard of one, and each request forwarded to whoever is asked to answer it.

Knows neither models nor where the servers run. A server that is lost before it has sent anything is replaced by another
for that request: nobody sees it. An answer that is not a stream counts as sent when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import RequestCancelledError, StarEdgeError
from .bodies import Bodies
from .guard import TICKET, Guard
from .messages import read_messages, videos_in
from .request_log import RECORD, RequestLog
from .responses import ResponseRequest
from .routes import cancel_when_gone, error_handlers
from .schema import describe, error_response, read_request
from .settings import Policy

_MAX_ATTEMPTS = 3
_log = logging.getLogger(__name__)
Message = dict[str, Any]  # of ASGI
# (scope, body, name of the first picture or "") -> the ASGI messages of the answer
Ask = Callable[[dict[str, Any], bytes, str], AsyncGenerator[Message, None]]


class ServerLostError(Exception):
    """The server that was to answer is gone."""


def picture_name(body: bytes, path: str = "/v1/chat/completions") -> str:
    """A name for a request's first picture, the same for the same picture, or for its first video if it has no picture.

    "": it has neither, or cannot be read.
    """
    try:
        chat = ResponseRequest(body).chat if path == "/v1/responses" else read_request(body)
        messages, urls = read_messages(chat.messages, sys.maxsize)
    except (StarEdgeError, ValueError, RecursionError):
        return ""  # the server that gets it says what is wrong
    for video in videos_in(messages):
        urls += video.source if isinstance(video.source, list) else [video.source]
    return hashlib.sha256(urls[0].encode()).hexdigest() if urls else ""


class Front:
    """Forwards requests, and can end those under way."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._scopes: set[anyio.CancelScope] = set()
        self._stopping = False

    def stop_jobs(self) -> None:
        self._stopping = True
        for scope in list(self._scopes):
            scope.cancel()

    async def forward(self, request: Request) -> Response:
        body = bytes(request.scope[TICKET].take_body()) if request.method == "POST" else b""
        scope = {
            name: request.scope[name]
            for name in ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
        }
        scope |= {"asgi": {"version": "3.0"}, "root_path": "", "client": None, "server": None}
        picture = await anyio.to_thread.run_sync(picture_name, body, request.url.path) if body else ""
        cancel = anyio.CancelScope()
        self._scopes.add(cancel)
        watcher = asyncio.create_task(cancel_when_gone(request, cancel))
        facts = request.scope[RECORD].facts
        try:
            with cancel:
                return await self._attempt(scope, body, picture, facts)
        finally:
            watcher.cancel()
            self._scopes.discard(cancel)
        if self._stopping:
            return error_response(RequestCancelledError("the request was cancelled"))
        return Response(status_code=499)  # the client left

    async def _attempt(self, scope: dict[str, Any], body: bytes, picture: str, facts: dict[str, Any]) -> Response:
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            messages = _without_records(self._ask(scope, body, picture), facts)
            try:
                start = await anext(messages)
                headers = dict(start["headers"])
                if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                    first = await anext(messages)
                    response: Response = StreamingResponse(self._events(first, messages), start["status"])
                else:
                    try:
                        response = Response(b"".join([m.get("body", b"") async for m in messages]), start["status"])
                    finally:
                        await messages.aclose()
                response.raw_headers = list(start["headers"])
                return response
            except (ServerLostError, StopAsyncIteration) as error:
                _log.warning("a server was lost (%s), attempt %d of %d", error, attempt, _MAX_ATTEMPTS)
        lost = "the servers that were to answer are gone: ask again"
        facts["error"] = "ServerLost"
        return JSONResponse({"error": {"message": lost, "type": "server_error", "param": None, "code": "lost"}}, 503)

    async def _events(self, first: Message, messages: AsyncGenerator[Message, None]) -> AsyncGenerator[bytes, None]:
        """A stream under way. It cannot be asked again: an error is its last event."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                yield first.get("body", b"")
                async for message in messages:
                    yield message.get("body", b"")
        except ServerLostError as error:
            _log.warning("a server was lost while it answered (%s)", error)
            yield f"data: {json.dumps(describe(error)[1])}\n\n".encode()
        finally:
            self._scopes.discard(scope)
            with anyio.CancelScope(shield=True):
                await messages.aclose()


async def _without_records(
    messages: AsyncGenerator[Message, None], facts: dict[str, Any]
) -> AsyncGenerator[Message, None]:
    """A server's messages. What its record says of the request goes into `facts`."""
    async with contextlib.aclosing(messages):
        async for message in messages:
            if message["type"] == RECORD:
                facts |= message["facts"]
            else:
                yield message


def make_front(policy: Policy, ask: Ask, count: Callable[[], int]) -> Starlette:
    """The app. `app.state.engine.stop_jobs` ends running requests.

    Args:
        policy: What is allowed. The servers behind it have the same.
        ask: Has a server answer a request. It raises ServerLostError when that is gone.
        count: How many servers there are, for /health.
    """
    front = Front(ask)
    bodies = Bodies(policy.max_body_bytes, policy.max_held_bytes, policy.body_seconds)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "receiving": len(bodies.arriving), "replicas": count()})

    posts = {"/v1/chat/completions", "/v1/responses", "/v1/image_tokens"}
    routes = [
        *(Route(path, front.forward, methods=["POST"]) for path in sorted(posts)),
        Route("/health", health),
        *(Route(path, front.forward) for path in ("/v1/models", "/v1/models/{name:path}", "/", "/page/{name}")),
    ]
    log = None if policy.request_log is None else RequestLog(policy.request_log, policy.request_log_format)
    on_line = None if log is None else log.write
    middleware = [Middleware(Guard, policy=policy, on_post=lambda *_: None, paths=posts, bodies=bodies, log=on_line)]
    if policy.cors_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(policy.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=error_handlers(routes))
    app.router.redirect_slashes = False
    app.state.engine = front
    return app
