"""Answers of StarVLM: whole, and as streams."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from .report import PruneReport
from .request import Request


@dataclass
class Answer:
    """An answer.

    Attributes:
        text: The answer's text.
        finish_reason: "stop" or "length".
        report: What was pruned, and where the time went.
    """

    text: str
    finish_reason: str
    report: PruneReport = field(repr=False)


class AnswerStream(Iterator[str]):
    """An iterator over the pieces of an answer, as they are generated.

    A stream may be dropped, closed or left by an exception: the engine starts the next request afresh. A stream of an
    earlier request raises EngineClosedError.

    Attributes:
        report: What was pruned, and where the time went. Its times and counts of the answer grow with each piece.
        text: The answer's text so far.
        finish_reason: "stop" or "length" at the end, before that None.
    """

    def __init__(self, request: Request, chunks: Generator[Any, None, None], check_open: Callable[[], None]) -> None:
        self._request, self._chunks = request, chunks
        self._check_open = check_open  # the engine's: a stream keeps its engine alive
        self.report = request.answered[1]
        self.text = ""
        self.finish_reason: str | None = None

    def __next__(self) -> str:
        self._check_open()
        try:
            while (chunk := self._request.next_chunk(self._chunks)) is not None:
                self.finish_reason = self._request.finish_reason
                piece = chunk["choices"][0]["text"]
                if piece:
                    self.text += piece
                    return str(piece)
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Ends the answer here, and leaves `llama_cpp.Llama` as if nothing had been asked.

        If another thread waits for the next piece, that wait ends within a token.

        Raises:
            EngineClosedError: A callback of the request called it.
        """
        self._request.close(self._chunks)
