"""Chat completions as jobs: each waits for its turn at the one Llama, runs in threads, and can be stopped from outside.

The queue is llama-cpp-python's own lock, which its other routes take too and which is handed on in order of arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import numpy as np
from llama_cpp.server.app import get_llama_proxy, prepare_request_resources

from ..chat_handler import StarChatHandler
from ..config import PruneConfig
from ..errors import ConfigError, ImageError, ImageTooLargeError, RequestCancelledError
from ..images import ImageLimits, load_image
from ..report import PruneReport
from .metrics import Metrics
from .schema import ChatRequest

_NOT_TO_LLAMA = {"n", "logit_bias_type", "user", "min_tokens", "grammar", "logit_bias", "prune", "star_edge", "max_completion_tokens"}


class Pictures:
    """The image_loader of the handler: images of the request under way, under the names that stand in its messages."""

    def __init__(self, limits: ImageLimits) -> None:
        self.sources: dict[str, str | bytes] = {}
        self._limits = limits

    def __call__(self, name: str) -> np.ndarray:
        source = self.sources.get(name)
        if source is None:
            raise ImageError("an image is given where none is read", "give images as image_url parts of messages")
        try:
            return load_image(source, self._limits)
        except ImageTooLargeError as error:
            remedy = "shrink it, or start the server with a higher --max-image-bytes or --max-image-pixels"
            raise ImageTooLargeError(error.cause, remedy) from error


class Engine:
    """The Llama of llama-cpp-python's app, for jobs. waiting: jobs whose turn has not come."""

    def __init__(self, handler: StarChatHandler, pictures: Pictures, model: str) -> None:
        self.handler, self.pictures, self.model = handler, pictures, model
        self.waiting = 0
        self.jobs: set[Job] = set()
        self.metrics = Metrics(lambda: self.waiting)
        # A thread of its own: slow downloads and other routes may have taken all of the default ones.
        self.in_thread = functools.partial(anyio.to_thread.run_sync, limiter=anyio.CapacityLimiter(1))

    def stop_jobs(self) -> None:
        for job in list(self.jobs):
            job.stop()

    async def stop(self) -> None:
        """Ends every job, and returns when none uses the Llama any more."""
        self.stop_jobs()
        while self.jobs:
            await anyio.sleep(0.01)


class Job:
    """One chat completion, begun by `start`.

    It is a task of its own: the Llama must be given back by the task that took it, whoever waits for the results.
    """

    def __init__(
        self, engine: Engine, body: ChatRequest, config: PruneConfig | None, images: dict[str, str | bytes], arrived: float
    ) -> None:
        self._engine, self._body, self._config, self._images, self._arrived = engine, body, config, images, arrived
        self._scope = anyio.CancelScope()
        self._stopped = threading.Event()
        self._is_waiting = False
        self._error: Exception | None = None
        self._n_chunks = 0
        # Without a bound: the engine never waits for a client that reads slowly, and an answer is never longer than the context.
        self._send, self._receive = anyio.create_memory_object_stream(math.inf)
        engine.jobs.add(self)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Nobody wants the rest: ends within about a token, at once if the turn has not come."""
        self._stopped.set()
        self._scope.cancel()

    async def results(self) -> AsyncIterator[dict[str, Any]]:
        """The response, or the chunks of a stream; raises what went wrong."""
        async for result in self._receive:
            yield result
        if self._error is not None:
            raise self._error

    async def _run(self) -> None:
        engine = self._engine
        self._count_waiting(1)
        try:
            with self._scope:
                async with contextlib.asynccontextmanager(get_llama_proxy)() as proxy:
                    self._count_waiting(-1)
                    await self._answer(proxy)
        except Exception as error:
            self._error = error
        finally:
            self._count_waiting(-1)
            if self._stopped.is_set() and self._error is None:
                self._error = RequestCancelledError("the request was cancelled")
            if isinstance(self._error, RequestCancelledError):
                engine.metrics.generated(self._n_chunks)
            self._images = {}
            engine.jobs.discard(self)
            self._send.close()

    def _count_waiting(self, change: int) -> None:
        if self._is_waiting != (change > 0):
            self._is_waiting = change > 0
            self._engine.waiting += change

    async def _answer(self, proxy: Any) -> None:
        engine = self._engine
        waited = time.perf_counter() - self._arrived
        result, report = await engine.in_thread(self._begin, proxy)
        if report is not None:
            engine.metrics.prompt(report, waited)
        if not self._body.stream:
            self._finish(result, report, waited)
            return
        try:
            while not self._stopped.is_set():
                chunk = await engine.in_thread(next, result, None)
                if chunk is None:
                    break
                self._n_chunks += 1
                self._finish(chunk, report, waited)
        finally:
            with anyio.CancelScope(shield=True):
                await engine.in_thread(result.close)

    def _finish(self, result: dict[str, Any], report: PruneReport, waited: float) -> None:
        if "star_edge" in result:
            result["star_edge"]["milliseconds"]["queue"] = 1e3 * waited
            if self._body.star_edge.kept:
                result["star_edge"]["kept"] = _kept(report)
            self._engine.metrics.generated(report.n_generated)
        self._send.send_nowait(result)

    def _begin(self, proxy: Any) -> tuple[Any, PruneReport]:
        """In a thread, with the Llama to itself: reads the prompt, and answers too unless the answer is streamed."""
        handler, body = self._engine.handler, self._body
        kwargs = body.model_dump(exclude=_NOT_TO_LLAMA)
        kwargs["model"] = body.model or self._engine.model  # Llama would tell the path of its file
        if body.max_tokens is None:
            kwargs["max_tokens"] = body.max_completion_tokens
        try:
            llama = prepare_request_resources(body, proxy, body.model, kwargs)
        except ValueError as error:
            raise ConfigError(f"llama_cpp refuses the request ({error})", "check its grammar and logit_bias") from error
        self._engine.pictures.sources = self._images
        try:
            with handler.pruning(self._config), handler.cancellable(self._stopped.is_set):
                return llama.create_chat_completion(**kwargs), handler.last_report
        finally:
            self._engine.pictures.sources = {}


def _kept(report: PruneReport) -> list[dict[str, Any]]:
    """For each image, which tokens stayed and where tokens lie; names are those of ImageReport."""
    return [
        {
            "picture": image.picture,
            "grid": image.grid,
            "cells": image.cells.tolist(),
            "vision_kept": image.vision_kept.tolist(),
            "decoder_kept": image.decoder_kept.tolist(),
        }
        for image in report.images
    ]
