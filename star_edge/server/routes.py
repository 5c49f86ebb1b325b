"""The routes that star_edge adds to llama-cpp-python's app, and those that it replaces there."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette.sse import EventSourceResponse

from .. import __version__, refvlm
from ..config import PRESETS, PruneConfig
from ..errors import ImageError
from . import remote
from .jobs import Engine, Job
from .schema import ChatRequest, describe, error_response, parse_prune
from .settings import Policy

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "app.js": (_PAGE / "app.js", "text/javascript"),
    "style.css": (_PAGE / "style.css", "text/css"),
    "demo.png": (refvlm.DEMO_IMAGE, "image/png"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_router(engine: Engine, policy: Policy, default: PruneConfig | None) -> APIRouter:
    router = APIRouter(tags=["star_edge"])
    # Downloads may be slow: they wait for each other, and for nothing else to wait for them.
    fetch = functools.partial(anyio.to_thread.run_sync, limiter=anyio.CapacityLimiter(8))

    @router.post("/v1/chat/completions", summary="Chat, with images and pruning", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """llama-cpp-python's chat completion; `prune` says how to prune, and the response's `star_edge` what was pruned."""
        arrived = time.perf_counter()
        job, first = None, None
        scope = anyio.CancelScope()
        watcher = asyncio.create_task(_cancel_when_gone(request, scope))
        try:
            with scope:
                config = parse_prune(body.prune) if "prune" in body.model_fields_set else default
                urls = _take_urls(body, policy)
                images = {name: await _source(url, policy, fetch) for name, url in urls.items()}
                job = Job(engine, body, config, images, arrived)
                job.start()
                results = job.results()
                first = await anext(results)  # before the status line is sent: what is wrong with a request shows by now
        except Exception as error:
            return _failed(error, engine)
        finally:
            watcher.cancel()
            if first is None and job is not None:
                job.stop()
        if first is None:
            engine.metrics.error("ClientLeft")
            return Response(status_code=499)  # nginx's, which nobody reads but the metrics
        if not body.stream:
            return JSONResponse(first)
        return EventSourceResponse(_events(job, first, results, engine), sep="\n")

    @router.get("/v1/models", summary="Models")
    async def models() -> dict[str, Any]:
        """Answers while the engine works, which llama-cpp-python's own does not."""
        return {"object": "list", "data": [{"id": engine.model, "object": "model", "owned_by": "me", "permissions": []}]}

    @router.get("/health", summary="Whether the server answers, and how many requests wait")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": engine.waiting}

    @router.get("/metrics", summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", media_type="text/html", headers=_PAGE_HEADERS)

    @router.get("/page/setup.json", include_in_schema=False)
    async def setup() -> dict[str, Any]:
        """What the page has to know before it has a key, so nothing that a key protects."""
        return {
            "version": __version__,
            "needs_key": policy.api_key is not None,
            "max_image_bytes": policy.max_image_bytes,
            "presets": [name for name in PRESETS if name != "off"],
            "demo_questions": [question["question"] for question in refvlm.demo_questions()],
        }

    @router.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_FILES:
            return JSONResponse({"detail": "Not Found"}, 404)
        path, kind = _PAGE_FILES[name]
        return FileResponse(path, media_type=kind, headers=_PAGE_HEADERS)

    return router


async def _cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _failed(error: Exception, engine: Engine) -> Response:
    engine.metrics.error(type(error).__name__)
    if describe(error)[0] == 500:
        _log.error("a request failed", exc_info=error)
    return error_response(error)


async def _events(job: Job, first: dict[str, Any], results: AsyncIterator[dict[str, Any]], engine: Engine) -> AsyncIterator[dict[str, str]]:
    """The chunks as server-sent events; the status line is out, so an error is an event too."""
    finished = False
    try:
        yield {"data": json.dumps(first)}
        async for chunk in results:
            yield {"data": json.dumps(chunk)}
        yield {"data": "[DONE]"}
        finished = True
    except Exception as error:
        finished = True
        _failed(error, engine)
        yield {"data": json.dumps(describe(error)[1])}
    finally:
        if not finished:
            engine.metrics.error("ClientLeft")
        job.stop()


def _take_urls(body: ChatRequest, policy: Policy) -> dict[str, str]:
    """Puts names in the place of the messages' image URLs, and returns the URLs by name.

    Raises:
        ImageError: more images than allowed, or what is no URL.
    """
    urls: dict[str, str] = {}
    for message in body.messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            if part["type"] == "image_url":
                image = part["image_url"]
                name = f"image-{len(urls)}"
                urls[name] = image if isinstance(image, str) else image["url"]
                part["image_url"] = {"url": name}
    if len(urls) > policy.max_images:
        raise ImageError(f"the request has {len(urls)} images", f"send at most {policy.max_images}, or start the server with --max-images")
    return urls


async def _source(url: str, policy: Policy, fetch: Any) -> str | bytes:
    """What load_image makes pixels of when the turn has come: a data: URL as it is, the bytes behind an http(s) URL.

    Raises:
        ImageError: any other kind of URL, or one that is not allowed.
    """
    if re.match(r"data:", url, re.IGNORECASE):
        return url
    if not re.match(r"https?:", url, re.IGNORECASE):
        raise ImageError("an image is neither a data: nor an http(s) URL", "send it as data:image/png;base64,...")
    if not policy.allow_remote_images:
        raise ImageError(
            "image URLs are not fetched by this server", "send the image as a data: URL, or start the server with --allow-remote-images"
        )
    return await fetch(remote.fetch, url, policy.max_image_bytes)
