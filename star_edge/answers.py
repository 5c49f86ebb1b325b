"""Answers of StarVLM: whole, as streams, and as streams for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from .errors import RequestTimeoutError
from .report import PruneReport
from .request import Request

FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(TypedDict):
    """name: of the function. arguments: as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool, in OpenAI's form."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict, total=False):
    """A message of the assistant, in OpenAI's form."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall]


def _message(text: str, calls: list[ToolCall]) -> AssistantMessage:
    if calls:
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": "assistant", "content": text}


@dataclass
class Answer:
    """An answer.

    Attributes:
        text: The answer's text. With a chosen tool, the arguments of its call as JSON.
        finish_reason: "stop", "length", or "tool_calls" with a chosen tool.
        report: What was pruned, and where the time went.
        tool_calls: The call of a chosen tool, in OpenAI's form. A tool that the model calls of its own accord is in
            `text`, in the model's own format.
    """

    text: str
    finish_reason: FinishReason
    report: PruneReport = field(repr=False)
    tool_calls: list[ToolCall] = field(default_factory=list, repr=False)

    @property
    def message(self) -> AssistantMessage:
        """The answer as a message, which the next turn of `chat` goes on from."""
        return _message(self.text, self.tool_calls)


class AnswerStream(Iterator[str]):
    """An iterator over the pieces of an answer, as they are generated.

    A stream may be dropped, closed or left by an exception: the engine starts the next request afresh. A stream of an
    earlier request raises EngineClosedError.

    Attributes:
        report: What was pruned, and where the time went. Its times and counts of the answer grow with each piece.
        text: The answer's text so far.
        finish_reason: As in Answer at the end, before that None.
        tool_calls: As in Answer, at the end.
    """

    def __init__(
        self,
        request: Request,
        chunks: Generator[Any, None, None],
        check_open: Callable[[], None],
        tool: str | None = None,
    ) -> None:
        """tool: the function that the model has to call."""
        self._request, self._chunks, self._tool = request, chunks, tool
        self._check_open = check_open  # the engine's: a stream keeps its engine alive
        self.report = request.answered[1]
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.tool_calls: list[ToolCall] = []

    @property
    def message(self) -> AssistantMessage:
        """As in Answer: the text so far, or the call at the end."""
        return _message(self.text, self.tool_calls)

    def __next__(self) -> str:
        self._check_open()
        try:
            while (chunk := self._request.next_chunk(self._chunks)) is not None:
                piece = str(chunk["choices"][0]["text"])
                self.text += piece
                if self._request.finish_reason is not None:
                    self._finish(chunk["id"], self._request.finish_reason)
                if piece:
                    return piece
        except BaseException as error:
            if isinstance(error, RequestTimeoutError):
                error.text = self.text
            self.close()
            raise
        self.close()
        raise StopIteration

    def _finish(self, number: str, reason: str) -> None:
        self.finish_reason = "length" if reason == "length" else "stop"
        if self._tool is not None:  # as MTMDChatHandler has it
            self.finish_reason = "tool_calls"
            function: FunctionCall = {"name": self._tool, "arguments": self.text}
            self.tool_calls = [{"id": f"call__0_{self._tool}_{number}", "type": "function", "function": function}]

    def close(self) -> None:
        """Ends the answer here, and leaves `llama_cpp.Llama` as if nothing had been asked.

        If another thread waits for the next piece, that wait ends within a token.

        Raises:
            EngineClosedError: A callback of the request called it.
        """
        self._request.close(self._chunks)

    def whole(self) -> Answer:
        """Reads the rest, and returns the whole answer.

        Raises:
            StarEdgeError: As `next`.
        """
        for _ in self:
            pass
        return Answer(self.text, self.finish_reason or "length", self.report, self.tool_calls)


class AsyncAnswerStream(AsyncIterator[str]):
    """An asynchronous iterator over the pieces of an answer, for asyncio.

    The answer is generated in a thread, whether or not its pieces are read. So other requests never wait for a reader
    that has stopped. `aclose`, the end of an `async with` block, or dropping the stream ends it within a token.

    Attributes:
        report: As in AnswerStream.
        text: The text of the pieces that have been read.
    """

    def __init__(self, job: StreamJob, stream: AnswerStream) -> None:
        self._job, self._stream = job, stream
        self.report = stream.report
        self.text = ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """As in Answer once all pieces have been read, before that None."""
        return self._stream.finish_reason if self._job.is_read else None

    @property
    def tool_calls(self) -> list[ToolCall]:
        """As in Answer, once all pieces have been read."""
        return self._stream.tool_calls if self._job.is_read else []

    @property
    def message(self) -> AssistantMessage:
        """As in Answer: the text that has been read, or the call at the end."""
        return _message(self.text, self.tool_calls)

    async def __anext__(self) -> str:
        piece = await self._job.next_piece()
        if piece is None:
            raise StopAsyncIteration
        self.text += piece
        return piece

    async def aclose(self) -> None:
        """Ends the answer here. Returns once the engine is free of it."""
        await self._job.end()

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._job.stopped.set()


class StreamJob:
    """A streamed answer under way in a thread, and its pieces on their way to an event loop.

    Attributes:
        stopped: Set when nobody wants the rest.
        is_read: Whether the end has been read.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        """on_end: called in the loop when the thread no longer needs the engine."""
        self._on_end = on_end
        self.stopped = threading.Event()
        self.is_read = False
        self._loop = asyncio.get_running_loop()
        # No bound: the thread must not wait for a reader, and an answer is never longer than the context.
        self._pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._began: asyncio.Future[AnswerStream] = self._loop.create_future()
        self._ended = asyncio.Event()

    def run(self, holding: AbstractContextManager[None], begin: Callable[[], AnswerStream]) -> None:
        """Begins and generates the answer. Runs in the thread, which has the engine to itself while `holding`."""
        end: BaseException | None = None
        try:
            with holding:
                stream = begin()
                self._post(self._begin, stream)
                for piece in stream:
                    self._post(self._pieces.put_nowait, piece)
        except BaseException as error:
            end = error
        self._post(self._end, end)

    async def begun(self) -> AnswerStream:
        """The stream, once the prompt has been read. Raises what ended the request before that."""
        try:
            return await asyncio.shield(self._began)
        except asyncio.CancelledError:
            self.stopped.set()
            raise

    async def next_piece(self) -> str | None:
        """The next piece, or None at the end. Raises what ended the answer."""
        if self.is_read:
            return None
        try:
            piece = await self._pieces.get()
        except asyncio.CancelledError:
            self.stopped.set()
            raise
        if isinstance(piece, str):
            return piece
        self.is_read = True
        if piece is not None:
            raise piece
        return None

    async def end(self) -> None:
        """Ends the answer. Returns once the thread no longer needs the engine."""
        self.stopped.set()
        self.is_read = True
        await self._ended.wait()

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """Calls a function in the loop's thread. If the loop is closed, nobody wants the rest."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self.stopped.set()

    def _begin(self, stream: AnswerStream) -> None:
        if not self._began.done():
            self._began.set_result(stream)

    def _end(self, error: BaseException | None) -> None:
        if not self._began.done():
            assert error is not None  # which kept it from beginning
            self._began.set_exception(error)
            self._began.exception()  # now it counts as seen: a task that was cancelled does not wait for it
        self._pieces.put_nowait(error)
        self._ended.set()
        self._on_end()
