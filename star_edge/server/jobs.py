"""Chat completions as jobs: each waits for its turn at the Llama, runs in threads, and can be stopped from outside."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import llama_cpp
import numpy as np
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from llama_cpp import Llama
from llama_cpp.llama_grammar import LlamaGrammar

from ..chat_handler import StarChatHandler
from ..errors import ConfigError, ImageError, ImageTooLargeError, RequestCancelledError, StarEdgeError
from ..io.images import ImageLimits, load_image
from ..pruning.config import PruneConfig
from ..report import PruneReport
from ..request import Request
from ..verify import answer_text, draw_seed
from .messages import videos_in
from .metrics import Metrics
from .request_log import Record
from .schema import ChatRequest
from .verifying import Verifier
from .videos import frames_of, pictures_in, read_videos

# Fields of a request that Llama.create_chat_completion takes by the same name
_TO_LLAMA = {
    "functions",
    "function_call",
    "tools",
    "tool_choice",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stream",
    "stop",
    "seed",
    "response_format",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
    "logprobs",
    "top_logprobs",
}
_MAX_BIASES = 4096
_MAX_AHEAD_BYTES = 128 * 2**20  # of pixels that wait for their request's turn; of larger pictures they are read twice
_log = logging.getLogger(__name__)
Source = str | bytes | np.ndarray  # of an image: data: URL, encoded bytes, or pixels


class Pictures:
    """The handler's image_loader: the images of the request under way, by the names in its messages."""

    def __init__(self, limits: ImageLimits) -> None:
        self.sources: dict[str, Source] = {}
        self.limits = limits

    def __call__(self, name: str) -> np.ndarray:
        source = self.sources.get(name)
        if source is None:
            raise ImageError("an image is given where none is read", "give images as image_url parts of messages")
        return self.load(source)

    def load(self, source: Source) -> np.ndarray:
        """The pixels of an image, within the limits. Those that are loaded already are returned as they are."""
        if isinstance(source, np.ndarray):
            return source
        try:
            return load_image(source, self.limits)
        except ImageTooLargeError as error:
            remedy = "shrink it, or start the server with a higher --max-image-bytes or --max-image-pixels"
            raise ImageTooLargeError(error.cause, remedy) from error


class Engine:
    """The Llama, for jobs.

    Attributes:
        waiting: Jobs whose turn has not come.
        answering: Jobs that have the Llama, 0 or 1.
        verifier: Answers some requests again, see `verifying`. None: it does not.
    """

    def __init__(self, llama: Llama, handler: StarChatHandler, pictures: Pictures, model: str) -> None:
        self.llama, self.handler, self.pictures, self.model = llama, handler, pictures, model
        self.turn = anyio.Lock()  # handed on in order of arrival
        self.next = anyio.Lock()  # held by the job that gets the turn next
        self.encodes_ahead = False
        self.waiting = self.answering = 0
        self.jobs: set[Job] = set()
        self.verifier: Verifier | None = None
        self.metrics = Metrics(lambda: self.waiting)
        # Its own thread: slow downloads and other routes may occupy all default ones.
        self.in_thread = functools.partial(anyio.to_thread.run_sync, limiter=anyio.CapacityLimiter(1))
        self.in_thread_ahead = functools.partial(anyio.to_thread.run_sync, limiter=anyio.CapacityLimiter(1))

    async def count_tokens(
        self, messages: list[dict[str, Any]], images: dict[str, Source], prune: PruneConfig
    ) -> dict[str, Any]:
        """Image tokens of pictures, counted without encoding when nobody else has the Llama.

        messages, images: as for `Job`. prune: what the pictures would be made smaller by.

        Returns plain JSON values: n_tokens, of all; and for each picture, or frame of a video, n_tokens, and
        n_full_tokens at its own size.
        """
        count = self.handler.count_tokens
        smaller = prune.image_max_tokens, prune.redundancy

        def count_all() -> list[dict[str, int]]:
            read, _ = read_videos(messages, self.pictures.limits)
            self.pictures.sources = pictures_in(read, images)
            try:
                names = list(self.pictures.sources)
                return [{"n_tokens": count(n, *smaller), "n_full_tokens": count(n)} for n in names]
            finally:
                self.pictures.sources = {}

        async with self.turn:
            counts = await self.in_thread(count_all)
        return {"n_tokens": sum(one["n_tokens"] for one in counts), "images": counts}

    def stop_jobs(self) -> None:
        for job in list(self.jobs):
            job.stop()

    async def stop(self) -> None:
        """Ends every job. Returns when none uses the Llama."""
        while self.jobs:
            self.stop_jobs()  # those that began meanwhile
            await anyio.sleep(0.01)


class Job:
    """One chat completion, begun by `start`.

    It runs in its own task, because the task that takes the Llama must give it back, whoever waits for the results.
    """

    def __init__(
        self,
        engine: Engine,
        body: ChatRequest,
        messages: list[dict[str, Any]],
        config: PruneConfig | None,
        images: dict[str, Source],
        arrived: float,
        on_end: Callable[[], None],
        record: Record,
    ) -> None:
        """messages, images: see `messages` and `Pictures`. on_end: called when the job no longer needs its request."""
        self._engine, self._body, self._messages, self._config, self._images = engine, body, messages, config, images
        self._arrived, self._on_end, self._record = arrived, on_end, record
        self.scope = anyio.CancelScope()
        self._stopped = threading.Event()
        self._is_waiting = False
        self._ahead_ms: float | None = None
        self._is_cancelled: Callable[[], bool] = self._stopped.is_set
        self._again: Job | None = None  # the same request, to be verified
        self._text = ""  # of the answer so far, for that
        self._frames: list[dict[str, Any]] = []  # of its videos, if they are asked for
        self._error: Exception | None = None
        self._n_chunks = 0
        # No bound: the engine must not wait for a client that reads slowly, and an answer is never longer than the
        # context.
        pieces: tuple[MemoryObjectSendStream[Any], MemoryObjectReceiveStream[Any]]
        pieces = anyio.create_memory_object_stream(math.inf)
        self._send, self._receive = pieces
        engine.jobs.add(self)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Ends the job: at once if its turn has not come, otherwise within about a token."""
        self._stopped.set()
        self.scope.cancel()

    async def results(self) -> AsyncIterator[dict[str, Any]]:
        """The response, or the chunks of a stream. Raises the job's error."""
        async for result in self._receive:
            yield result
        if self._error is not None:
            raise self._error

    async def _run(self) -> None:
        engine = self._engine
        self._count_waiting(1)
        try:
            with self.scope:
                async with engine.next:
                    if engine.encodes_ahead and engine.answering and self._images and not self._body.star_edge.afresh:
                        await engine.in_thread_ahead(self._encode_ahead)
                    await engine.turn.acquire()
                try:
                    self._count_waiting(-1)
                    engine.answering += 1
                    try:
                        await self._answer()
                    finally:
                        engine.answering -= 1
                finally:
                    engine.turn.release()
        except Exception as error:
            self._error = error
        finally:
            self._count_waiting(-1)
            if self._stopped.is_set() and self._error is None:
                self._error = RequestCancelledError("the request was cancelled")
            if isinstance(self._error, RequestCancelledError):
                engine.metrics.generated(self._n_chunks)
            self._images, self._messages = {}, []
            self._verify()
            self._on_end()
            engine.jobs.discard(self)
            self._send.close()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def unpruned(self) -> Job:
        """The same request without pruning, for `Verifier`. It gives way to any request that waits."""
        again = copy.copy(self)
        again._body, again._config = self._body.model_copy(update={"stream": False}), None
        again._messages, again._images = copy.deepcopy(self._messages), dict(self._images)
        again.scope, again._stopped = anyio.CancelScope(), threading.Event()
        again._is_cancelled = lambda: again.is_stopped or self._engine.waiting > 0
        return again

    def answer_alone(self) -> Any:
        """The response of a request that is not streamed. Runs in a thread that has the Llama."""
        return self._begin()[0]

    def _take_for_verifier(self) -> None:
        """Keeps the request if it is to be verified. A seed that it lacks is drawn: both answers need the same."""
        verifier = self._engine.verifier
        has_pictures = self._images or videos_in(self._messages)
        if verifier is not None and self._config is not None and has_pictures and verifier.takes():
            if self._body.seed is None:
                self._body = self._body.model_copy(update={"seed": draw_seed()})
            self._again = self.unpruned()

    def _verify(self) -> None:
        verifier, again, self._again = self._engine.verifier, self._again, None
        if verifier is not None and again is not None:
            if self._error is None:
                verifier.verify(again, self._text)
            else:
                verifier.skip()

    def _count_waiting(self, change: int) -> None:
        if self._is_waiting != (change > 0):
            self._is_waiting = change > 0
            self._engine.waiting += change

    async def _answer(self) -> None:
        engine = self._engine
        waited = time.perf_counter() - self._arrived
        self._take_for_verifier()
        result, request = await engine.in_thread(self._begin)
        report = request.answered[1]
        engine.metrics.prompt(report, waited)
        self._record.read(report, waited)
        if not self._body.stream:
            self._finish(result, report, waited)
            return
        n_prompt, includes_usage = request.n_prompt, self._body.stream_options.include_usage
        try:
            while not self._stopped.is_set():
                chunk = await engine.in_thread(next, result, None)
                if chunk is None:
                    break
                self._n_chunks += 1
                last = chunk | {"choices": []}
                self._finish(chunk | {"usage": None} if includes_usage else chunk, report, waited)
            if includes_usage and not self._stopped.is_set():
                n = report.n_generated
                last["usage"] = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
                self._send.send_nowait(last)
        finally:
            with anyio.CancelScope(shield=True):
                await engine.in_thread(result.close)

    def _finish(self, result: dict[str, Any], report: PruneReport, waited: float) -> None:
        if self._again is not None:
            self._text += answer_text(result["choices"])
        if "star_edge" in result:
            result["star_edge"]["milliseconds"]["queue"] = 1e3 * waited
            if self._ahead_ms is not None:
                result["star_edge"]["milliseconds"]["ahead"] = self._ahead_ms
            if self._body.star_edge.kept:
                result["star_edge"]["kept"] = _kept(report)
            if self._body.star_edge.frames:
                result["star_edge"]["frames"] = self._frames
            finish_reason = result["choices"][0]["finish_reason"]
            self._record.facts |= {"tokens": report.n_generated, "finish_reason": finish_reason}
            self._engine.metrics.generated(report.n_generated)
        self._send.send_nowait(result)

    def _encode_ahead(self) -> None:
        """Loads and encodes the images while another job has the Llama. What goes wrong shows when the turn comes."""
        engine = self._engine
        start = time.perf_counter()
        try:
            pixels = {name: engine.pictures.load(source) for name, source in self._images.items()}
            engine.handler.reader.encode_ahead(list(pixels.values()), self._config)
        except StarEdgeError:
            return
        except Exception:
            _log.exception("images could not be encoded ahead")
            return
        if sum(image.nbytes for image in pixels.values()) <= _MAX_AHEAD_BYTES:
            self._images = dict(pixels)
        self._ahead_ms = 1e3 * (time.perf_counter() - start)
        self._record.facts["ahead_ms"] = round(self._ahead_ms, 1)

    def _begin(self) -> tuple[Any, Request]:
        """Reads the prompt, and answers unless the answer is streamed. Runs in a thread that has the Llama."""
        engine, body = self._engine, self._body
        kwargs = body.model_dump(include=_TO_LLAMA)
        kwargs["model"] = body.model or engine.model  # Llama would reveal the path of its file
        kwargs["max_tokens"] = body.most_tokens
        if body.logit_bias:
            kwargs["logit_bias"] = _biases(engine.llama, body)
        if body.min_tokens:
            least = llama_cpp.MinTokensLogitsProcessor(body.min_tokens, engine.llama.token_eos())
            kwargs["logits_processor"] = llama_cpp.LogitsProcessorList([least])
        if body.grammar is not None:
            kwargs["grammar"] = LlamaGrammar.from_string(body.grammar)
        engine.pictures.sources = self._images
        afresh = engine.handler.reader.afresh() if body.star_edge.afresh else contextlib.nullcontext()
        try:
            with engine.handler.pruning(self._config), engine.handler.cancellable(self._is_cancelled), afresh:
                messages: Any  # JSON that read_messages has checked
                messages, videos = read_videos(self._messages, engine.pictures.limits)
                result = engine.llama.create_chat_completion(messages, **kwargs)
                request = engine.handler.last_request
                assert request is not None  # this one
                if body.star_edge.frames:
                    self._frames = frames_of(request.answered[1], videos)
                if body.star_edge.kept:
                    _ = request.answered[1].places  # now, because this thread has the Llama; the report remembers them
                return result, request
        finally:
            engine.pictures.sources = self._images = {}


def _biases(llama: Llama, body: ChatRequest) -> dict[int, float]:
    """logit_bias by token id.

    With logit_bias_type "tokens" its names are texts, and all tokens of a text get its bias.

    Raises:
        ConfigError: A name is not a token, or there are too many.
    """
    asked = body.logit_bias or {}
    if sum(len(name) for name in asked) > 8 * _MAX_BIASES or len(asked) > _MAX_BIASES:
        raise ConfigError(f"logit_bias has {len(asked)} entries or long ones", f"send at most {_MAX_BIASES} short ones")
    biases: dict[int, float] = {}
    for name, bias in asked.items():
        if body.logit_bias_type == "tokens":
            biases.update(dict.fromkeys(llama.tokenize(name.encode(), add_bos=False, special=True), bias))
        elif name.isascii() and name.isdigit() and len(name) < 10:
            biases[int(name)] = bias
        else:
            raise ConfigError(f"logit_bias: {name[:60]!r} is not a token id", f"use ids of 0 to {llama.n_vocab() - 1}")
    return biases


def _kept(report: PruneReport) -> list[dict[str, Any]]:
    """For each image, which tokens stayed and where they lie. Names are those of ImageReport, and of Place."""
    return [
        {
            "picture": image.picture,
            "video": image.video,
            "second": image.second,
            "same_as": image.same_as,
            "grid": image.grid,
            "cells": image.cells.tolist(),
            "place": None if place is None else [round(edge, 5) for edge in place],
            "n_tokens": image.n_tokens,
            "redundant": image.redundant.tolist(),
            "encoder_kept": None if image.encoder_kept is None else image.encoder_kept.tolist(),
            "vision_kept": image.vision_kept.tolist(),
            "decoder_kept": image.decoder_kept.tolist(),
        }
        for image, place in zip(report.images, report.places)
    ]
