"""The routes: OpenAI's that a vision-language model needs, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from .. import __version__, refvlm
from ..errors import ImageError
from ..pruning.config import PruneConfig
from ..pruning.presets import PRESETS
from . import remote
from .bodies import Bodies
from .guard import TICKET
from .jobs import Engine, Job, Source
from .messages import image_name, read_messages, without_videos
from .request_log import RECORD, Record
from .responses import ResponseBuilder, ResponseRequest
from .schema import ChatRequest, Configs, describe, error_body, error_response, read_request
from .settings import Policy

_log = logging.getLogger(__name__)
_BASE64 = re.compile(r"[0-9A-Za-z+/_\s-]{60,}={0,2}", re.ASCII)
_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("app", "api", "code", "draw", "media", "read", "words")
_PAGE_FILES = {
    **{f"{name}.js": (_PAGE / f"{name}.js", "text/javascript") for name in _SCRIPTS},
    "style.css": (_PAGE / "style.css", "text/css"),
    "demo.png": (refvlm.DEMO_IMAGE, "image/png"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Chat:
    """The form of chat completions: results as they are, events of data alone, and one that says it is over."""

    def __init__(self, request: ChatRequest) -> None:
        self.chat, self.places = request, None

    def whole(self, result: dict[str, Any]) -> dict[str, Any]:
        return result

    async def events(
        self, first: dict[str, Any], results: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[dict[str, str]]:
        yield {"data": json.dumps(first)}
        async for chunk in results:
            yield {"data": json.dumps(chunk)}
        yield {"data": "[DONE]"}

    def error(self, error: Exception) -> dict[str, str]:
        return {"data": json.dumps(describe(error)[1])}


class _Responses:
    """The form of the Responses API: results translated, events with names."""

    def __init__(self, request: ResponseRequest) -> None:
        self.chat, self.places = request.chat, request.places
        self._builder = ResponseBuilder(request)
        self.whole = self._builder.whole

    async def events(
        self, first: dict[str, Any], results: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[dict[str, str]]:
        async for event in self._builder.events(first, results):
            yield {"event": event["type"], "data": json.dumps(event)}

    def error(self, error: Exception) -> dict[str, str]:
        event = self._builder.error(error)
        return {"event": event["type"], "data": json.dumps(event)}


def make_routes(engine: Engine, policy: Policy, configs: Configs, bodies: Bodies) -> list[Route]:
    # Downloads may be slow: they have their own threads, so that nothing else waits for them.
    fetch = functools.partial(anyio.to_thread.run_sync, limiter=anyio.CapacityLimiter(8))

    async def sources(urls: list[str]) -> dict[str, Source]:
        """By `image_name` what the images are loaded from."""
        if len(urls) > policy.max_images:
            remedy = f"send at most {policy.max_images}, or start the server with --max-images"
            raise ImageError(f"the request has {len(urls)} images", remedy)
        return {image_name(i): await _source(url, policy, fetch) for i, url in enumerate(urls)}

    async def chat(request: Request) -> Response:
        return await complete(request, lambda data: _Chat(read_request(data)))

    async def responses(request: Request) -> Response:
        return await complete(request, lambda data: _Responses(ResponseRequest(data)))

    async def complete(request: Request, read: Callable[[bytearray], _Chat | _Responses]) -> Response:
        """Answers a chat completion, in the form that `read` gives it."""
        arrived = time.perf_counter()
        job, first = None, None
        scope = anyio.CancelScope()
        ticket, record = request.scope[TICKET], request.scope[RECORD]
        watcher = asyncio.create_task(cancel_when_gone(request, scope))
        try:
            with scope:
                form = read(ticket.take_body())
                body = form.chat
                config, name = configs.of(body)
                messages, urls = read_messages(body.messages, engine.llama.n_ctx(), form.places)
                body.messages = []  # the images are now in urls only
                record.asked(body.model or engine.model, name, body.stream)
                if policy.request_log_prompts:
                    record.facts["messages"] = without_videos(messages)
                images = await sources(urls)
                del urls
                job = Job(engine, body, messages, config, images, arrived, ticket.release, record)
                del images
                job.start()
                results = job.results()
                first = await anext(results)  # before the status line is sent, so that an error still has a status
        except Exception as error:
            return _failed(error, engine, record)
        finally:
            watcher.cancel()
            if first is None and job is not None:
                job.stop()
        if first is None or job is None:
            engine.metrics.error("ClientLeft")
            record.facts["error"] = "ClientLeft"
            return Response(status_code=499)  # nginx's, which nobody reads but the metrics
        if not body.stream:
            return JSONResponse(form.whole(first))
        events = _events(form, job, first, results, engine, record)
        return EventSourceResponse(events, sep="\n", send_timeout=policy.body_seconds)

    async def image_tokens(request: Request) -> Response:
        """How many image tokens the pictures of a chat completion would take. The body is that of the completion."""
        ticket = request.scope[TICKET]
        try:
            body = read_request(ticket.take_body())
            config, _ = configs.of(body)
            messages, urls = read_messages(body.messages, engine.llama.n_ctx())
            images = await sources(urls)
            body.messages, urls = [], []  # the images are now in their sources only
            return JSONResponse(await engine.count_tokens(messages, images, config or PruneConfig()))
        except Exception as error:
            return _failed(error, engine, request.scope[RECORD])

    supported = _supported(engine, policy, configs)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(engine) | {"star_edge": supported}]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != engine.model:
            raise HTTPException(404, f"there is no model of that name: this server has {engine.model}")
        return JSONResponse(_model(engine) | {"star_edge": supported})

    async def health(_: Request) -> Response:
        """receiving: bodies that arrive. waiting: requests whose turn has not come. answering: 1 while one runs.
        verified: what --verify has counted.
        """
        counts = {"receiving": len(bodies.arriving), "waiting": engine.waiting, "answering": engine.answering}
        verified = {} if engine.verifier is None else {"verified": engine.verifier.agreement.to_dict()}
        return JSONResponse({"status": "ok", **counts, **verified})

    async def metrics(_: Request) -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page(_: Request) -> Response:
        return FileResponse(_PAGE / "index.html", media_type="text/html", headers=_PAGE_HEADERS)

    async def setup(_: Request) -> Response:
        """What the page needs before it has a key. Nothing that the key protects is in it."""
        named = configs.named if policy.api_key is None else {}
        known = {name: config for name, config in {**named, **PRESETS, **named}.items() if config is not None}
        return JSONResponse(
            {
                "version": __version__,
                "needs_key": policy.api_key is not None,
                "max_image_bytes": policy.max_image_bytes,
                "max_body_bytes": policy.max_body_bytes,
                "presets": {name: _changes(config) for name, config in known.items()},
                "default": next((name for name, config in known.items() if config == configs.default), None),
                "demo_questions": [question["question"] for question in refvlm.demo_questions()],
            }
        )

    async def page_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _PAGE_FILES:
            raise HTTPException(404)
        path, kind = _PAGE_FILES[name]
        return FileResponse(path, media_type=kind, headers=_PAGE_HEADERS)

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/image_tokens", image_tokens, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/", page),
        Route("/page/setup.json", setup),
        Route("/page/{name}", page_file),
    ]


def _changes(config: PruneConfig) -> dict[str, Any]:
    """The fields of a config that are not the default. JavaScript would write a 1.0 as 1, which means one token."""
    usual = PruneConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != usual[name]}


def _model(engine: Engine) -> dict[str, Any]:
    return {"id": engine.model, "object": "model", "created": 0, "owned_by": "me"}


def _supported(engine: Engine, policy: Policy, configs: Configs) -> dict[str, Any]:
    """What the model and the server can do, for clients that ask for the models."""

    def fields(config: PruneConfig | None) -> dict[str, Any] | None:
        return None if config is None else _changes(config)

    reader = engine.handler.reader
    return {
        "version": __version__,
        "stages": reader.stages,
        "presets": {name: fields(config) for name, config in PRESETS.items()},
        "configs": {name: fields(config) for name, config in configs.named.items()},
        "default": {"name": configs.default_name, "config": fields(configs.default)},
        "n_ctx": reader.decoder.n_ctx,
        "images": {
            "max_images": policy.max_images,
            "max_image_bytes": policy.max_image_bytes,
            "max_image_pixels": policy.max_image_pixels,
            "max_body_bytes": policy.max_body_bytes,
            "remote": policy.allow_remote_images,
        },
        "prompt_cache_bytes": reader.saved.n_bytes,
    }


def error_handlers(routes: list[Route]) -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """OpenAI's form for paths without a route, and for unexpected errors."""
    served = ", ".join(sorted(route.path for route in routes if route.path.startswith("/v1") and "{" not in route.path))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is nothing at this path: this server has {served}, /health, /metrics and a page at /",
            405: f"{request.method[:20]} is not for this path: use "
            f"{(error.headers or {}).get('Allow', 'another method')}",
        }.get(error.status_code, error.detail)
        if error.status_code == 404 and error.detail != "Not Found":
            message = error.detail
        body = error_body(
            message, "invalid_request_error", {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        )
        return JSONResponse(body, error.status_code, headers=error.headers)

    async def unforeseen(_: Request, error: Exception) -> Response:
        return error_response(error)

    return {HTTPException: http_error, Exception: unforeseen}


async def cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _failed(error: Exception, engine: Engine, record: Record) -> Response:
    _note(error, engine, record)
    return error_response(error)


def _note(error: Exception, engine: Engine, record: Record) -> None:
    engine.metrics.error(type(error).__name__)
    record.facts["error"] = type(error).__name__
    if describe(error)[0] == 500:
        _log.error("a request failed", exc_info=error)


async def _events(
    form: _Chat | _Responses,
    job: Job,
    first: dict[str, Any],
    results: AsyncIterator[dict[str, Any]],
    engine: Engine,
    record: Record,
) -> AsyncIterator[dict[str, str]]:
    """The chunks as server-sent events. The status line is sent already, so an error is an event too."""
    finished = False
    try:
        async for event in form.events(first, results):
            yield event
        finished = True
    except Exception as error:
        finished = True
        _note(error, engine, record)
        yield form.error(error)
    finally:
        if not finished:
            engine.metrics.error("ClientLeft")
            record.facts["error"] = "ClientLeft"
        job.stop()


async def _source(url: str, policy: Policy, fetch: Any) -> str | bytes:
    """The source for load_image: a data: URL, also for base64 alone, or the bytes behind an http(s) URL.

    Raises:
        ImageError: Another kind of URL, or one that is not allowed.
    """
    url = url.strip()
    if re.match(r"data:", url, re.IGNORECASE):
        return url
    if _BASE64.fullmatch(url):  # not a path: the server reads none
        return f"data:;base64,{url}"
    if not re.match(r"https?:", url, re.IGNORECASE):
        raise ImageError("an image is neither a data: nor an http(s) URL", "send it as data:image/png;base64,...")
    if not policy.allow_remote_images:
        raise ImageError(
            "image URLs are not fetched by this server",
            "send the image as a data: URL, or start the server with --allow-remote-images",
        )
    source: str | bytes = await fetch(remote.fetch, url, policy.max_image_bytes)
    return source
