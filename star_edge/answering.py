"""What a StarVLM is asked: a prompt, or the messages of a conversation; now, as a stream, or from asyncio.

Reads arguments, and takes turns at the Llama. `PromptReader` reads a prompt; `llama_cpp.Llama` samples the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, overload

import numpy as np
from llama_cpp import Llama

from .answers import Answer, AnswerStream, AsyncAnswerStream, StreamJob
from .arguments import Range, check_value, checked, parameters
from .asked import Asked, FrameOf, Images, ask_chat, ask_prompt, check_sampling, frame_of
from .chat import ChatFormat
from .decoder.prefill import Prefill
from .errors import EngineClosedError, UnsupportedModelError
from .io.configs import resolve_prune
from .io.images import ImageLimits, load_message_image
from .io.video import VideoFrame
from .llamacpp.guarded import request_of
from .progress import Progress
from .pruning.config import PruneConfig
from .pruning.presets import DEFAULT_PRESET
from .reader import PromptReader
from .request import Ending, IsCancelled, Request, asked_at, cancellable, cancellation
from .vision.chunks import Prompt, TextChunk
from .vision.encoder import VisionEncoder

RANGES = {"max_tokens": Range(1, 2**31 - 1), "timeout": Range(0, 1e9, above=True)}
Prune = PruneConfig | str | None
Tell = Callable[[Progress], None]


class Answering:
    """What StarVLM answers, and how requests take turns. StarVLM loads the models.

    Attributes:
        image_limits: What an image may be.
    """

    llama: Llama
    encoder: VisionEncoder | None
    image_limits: ImageLimits
    _chat: ChatFormat
    _reader: PromptReader

    def __init__(self) -> None:
        self._lock = threading.RLock()  # one request at a time; other threads wait
        self._closed = False
        # For asyncio: whose turn it is, by event loop, in order of arrival; and answers under way
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._jobs: weakref.WeakSet[StreamJob] = weakref.WeakSet()

    # ---- prompts ----

    @overload
    def generate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[False] = False,
        chat: bool = True,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[True],
        chat: bool = True,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **sampling: Any,
    ) -> AnswerStream: ...

    @overload
    def generate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool,
        chat: bool = True,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **sampling: Any,
    ) -> Answer | AnswerStream: ...

    @checked(RANGES, skip=("prompt", "images", "prune"))
    def generate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool = False,
        chat: bool = True,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **sampling: Any,
    ) -> Answer | AnswerStream:
        """Answers a prompt about images.

        One request runs at a time: other threads wait, and a new request ends an unfinished stream. The engine can be
        used again after any error. All errors but EngineError, RequestTimeoutError and RequestCancelledError come
        before anything is computed.

        Args:
            prompt: The question. Images stand before it, or where it has markers (star_edge.MEDIA_MARKER), one for each
                image. `<image>` and other models' placeholders count as markers if there are as many as images, and are
                text otherwise.
            images: Paths, bytes, open files, PIL images, NumPy arrays, data: or http(s): URLs (`load_image`), and
                videos (`Video`).
            prune: A PruneConfig, a preset's name, the path of a .json file of `star-edge tune`, or None for stock
                behaviour on the same code path.
            max_tokens: Most tokens of the answer. None: until the context is full.
            stream: Return an AnswerStream once the prompt has been read.
            chat: Put the prompt into the model's chat template. False: the prompt is complete as it is.
            temperature: Sampling temperature, 0 for greedy.
            timeout: Seconds from the call to the end of the answer, waiting for a turn included. It is looked at before
                each image and each decode; a computation that runs is not interrupted.
            progress: Is called with a Progress until the first token: before each image, and after each decode.
            **sampling: Further arguments of llama_cpp.Llama.create_completion: top_p, seed, stop, grammar, ...

        Returns:
            An Answer, or with `stream` an AnswerStream.

        Raises:
            ConfigError: An argument cannot be used.
            PromptError: The prompt cannot be used, or its markers do not match the images.
            ImageError: An image cannot be read, or is over the limits.
            ContextLengthError: The prompt does not fit the context.
            UnsupportedModelError: There are images, and the model was loaded without a vision encoder.
            EngineError: llama.cpp failed.
            EngineClosedError: The engine is closed.
            RequestTimeoutError: `timeout` has passed. `error.text` is the answer so far.
            RequestCancelledError: See `cancellable`.
        """
        named = parameters(Answering.generate)
        check_sampling(sampling, named)
        options = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        ask = functools.partial(ask_prompt, self.llama, self._chat, prompt, images, chat, self.image_limits, **options)
        return self._begin(ask, prune, Ending(timeout, [cancellation()]), progress, stream)

    # ---- conversations ----

    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[False] = False,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **options: Any,
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[True],
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **options: Any,
    ) -> AnswerStream: ...

    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **options: Any,
    ) -> Answer | AnswerStream: ...

    @checked(RANGES, skip=("messages", "images", "prune"))
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool = False,
        temperature: float = 0.0,
        timeout: float | None = None,
        progress: Tell | None = None,
        **options: Any,
    ) -> Answer | AnswerStream:
        """Answers the last message of a conversation.

        What the decoder has read of a conversation, up to its last picture, is kept for the next turn. So a second
        question about the same picture neither encodes nor reads it again. Requests take turns as in `generate`.

        Args:
            messages: Messages in OpenAI's form: role and content, which is a text or a list of parts. An image part,
                {"type": "image_url", "image_url": {"url": ...}} or {"type": "image", "image": ...}, may hold whatever
                `generate` takes as an image. `answer.message` is the message to go on from.
            images: Images that the messages do not hold: of parts {"type": "image"} without one, in order. If there is
                no such part, they stand first in the user's first message.
            prune: As for `generate`.
            max_tokens: As for `generate`.
            stream: As for `generate`.
            temperature: As for `generate`.
            timeout: As for `generate`.
            progress: As for `generate`.
            **options: The sampling options of `generate`; tools, tool_choice and response_format as in
                StarChatHandler; the dict chat_template_kwargs, and further names, are variables of the chat template.

        Returns:
            An Answer, or with `stream` an AnswerStream.

        Raises:
            ConfigError: An option cannot be used.
            PromptError: The messages cannot be used, or the images are more or fewer than the places for them.
            StarEdgeError: As `generate`.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature, **options}
        named = parameters(Answering.chat)
        ask = functools.partial(ask_chat, self.llama, self._chat, messages, images, self.image_limits, named, **options)
        return self._begin(ask, prune, Ending(timeout, [cancellation()]), progress, stream)

    # ---- asyncio ----

    @overload
    async def agenerate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Answer: ...

    @overload
    async def agenerate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> AsyncAnswerStream: ...

    async def agenerate(
        self,
        prompt: str,
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Answer | AsyncAnswerStream:
        """`generate` for asyncio: the event loop goes on while the engine works in a thread.

        Asynchronous requests of an engine wait for each other, streams included. When the task is cancelled, the
        request ends before the next decode; one that has not begun never does.

        Args:
            prompt: As for `generate`.
            images: As for `generate`.
            prune: As for `generate`.
            max_tokens: As for `generate`.
            stream: Return an AsyncAnswerStream once the prompt has been read.
            **options: The further arguments of `generate`. `progress` is called in the thread.

        Returns:
            An Answer, or with `stream` an AsyncAnswerStream.

        Raises:
            StarEdgeError: As `generate`.
        """
        return await self._ask_async(self.generate, stream, prompt, images, prune, max_tokens, **options)

    @overload
    async def achat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Answer: ...

    @overload
    async def achat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> AsyncAnswerStream: ...

    async def achat(
        self,
        messages: Iterable[Mapping[str, Any]],
        images: Images = (),
        prune: Prune = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Answer | AsyncAnswerStream:
        """`chat` for asyncio, as `agenerate` is `generate`.

        Args:
            messages: As for `chat`.
            images: As for `chat`.
            prune: As for `chat`.
            max_tokens: As for `chat`.
            stream: Return an AsyncAnswerStream once the prompt has been read.
            **options: The further arguments of `chat`. `progress` is called in the thread.

        Returns:
            An Answer, or with `stream` an AsyncAnswerStream.

        Raises:
            StarEdgeError: As `chat`.
        """
        return await self._ask_async(self.chat, stream, messages, images, prune, max_tokens, **options)

    @contextlib.contextmanager
    def cancellable(self, is_cancelled: IsCancelled) -> Iterator[None]:
        """Requests that this thread or task makes inside the block can be cancelled.

        They raise RequestCancelledError within a token after `is_cancelled()` becomes true: it is called before each
        image and each decode. It holds for a stream to its end, wherever the stream is read.

        Args:
            is_cancelled: A function without arguments.
        """
        with cancellable(is_cancelled):
            yield

    # ---- inside ----

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed", "make a new StarVLM")

    def _check_takes(self, n_images: int) -> None:
        if n_images and self.encoder is None:
            raise UnsupportedModelError("this model was loaded without a vision encoder", "give its mmproj file")

    def _begin(
        self, ask: Callable[[], Asked], prune: Prune, ending: Ending, progress: Tell | None, stream: bool
    ) -> Answer | AnswerStream:
        """Reads a prompt, and answers it unless the answer is streamed."""
        with ending.holding(self._lock):  # to the end of a whole answer: a request of another thread would end it
            self._check_open()
            asked = ask()
            self._check_takes(len(asked.images))
            request, state = self._read(asked, prune, ending, progress)
            ids = request.hand_over(state)
            chunks = self.llama.create_completion(prompt=ids, stream=True, **asked.options)
            ending.during = "while the answer was written"
            answer = AnswerStream(request, cast(Generator[Any, None, None], chunks), self._check_open, asked.tool)
            return answer if stream else answer.whole()

    def _read(self, asked: Asked, prune: Prune, ending: Ending, progress: Tell | None) -> tuple[Request, Prefill]:
        """Reads a prompt, as a request of its own."""
        config = resolve_prune(prune)
        with self._turn() as start:
            request = Request(self._reader, self._lock, config, start, ending)
            pictures = []
            ending.during = "while the pictures were loaded"
            for source in asked.images:
                ending.check()
                if isinstance(source, VideoFrame):
                    pictures.append(request.fit(source.pixels))
                else:
                    pictures.append(request.fit(load_message_image(source, self.image_limits)))
            frames = [frame_of(source) for source in asked.images]
            ending.during = "while the prompt was read"
            ending.check()
            with request.running():
                return request, request.read(self._chunks(asked.text, pictures, frames), progress)

    def _chunks(self, text: str, pictures: Sequence[np.ndarray], frames: Sequence[FrameOf | None]) -> Prompt:
        """Splits a whole prompt into chunks. They must be closed. frames: which frame each picture is, or None."""
        if self.encoder is None:
            tokens = self.llama.tokenize(text.encode(), add_bos=True, special=True)
            return Prompt([TextChunk(np.array(tokens, np.int32))])
        prompt = self.encoder.tokenize(text, pictures)
        prompt.join_frames(frames)
        return prompt

    @contextlib.contextmanager
    def _turn(self) -> Iterator[float]:
        """A turn at the Llama. Ends an unfinished request, and empties the cache except for the stem.

        Yields:
            When the turn began, in seconds of time.perf_counter.
        """
        with self._lock:
            start = time.perf_counter()
            self._check_open()
            with request_of(self.llama):
                self._reader.begin()
                yield start

    async def _ask_async(
        self, ask: Callable[..., Any], stream: bool, *args: Any, **options: Any
    ) -> Answer | AsyncAnswerStream:
        """Calls `generate` or `chat` in a thread of its own, once earlier requests of this event loop are done."""
        since = time.perf_counter()
        stream = check_value("stream", stream, bool)
        timeout = check_value("timeout", options.get("timeout"), float | None, RANGES["timeout"])
        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        ending = Ending(timeout, since=since)
        try:
            await (turn.acquire() if timeout is None else asyncio.wait_for(turn.acquire(), timeout))
        except (asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11
            raise ending.timeout_error() from None
        try:
            job = StreamJob(turn.release)
            self._jobs.add(job)
            outer = cancellation()
            signals = [job.stopped.is_set, *([] if outer is None else [outer])]

            def work() -> None:
                with cancellable(lambda: any(signal() for signal in signals)), asked_at(since):
                    hold = Ending(timeout, signals, since).holding(self._lock)
                    job.run(hold, functools.partial(ask, *args, stream=True, **options))

            threading.Thread(target=contextvars.copy_context().run, args=(work,), name="star_edge").start()
        except BaseException:
            turn.release()
            raise
        answer = AsyncAnswerStream(job, await job.begun())
        if stream:
            return answer
        async for _ in answer:
            pass
        return Answer(answer.text, answer.finish_reason or "length", answer.report, answer.tool_calls)
