"""How far the reading of a prompt is, for whoever waits for the first token.

A meter is told of images and of decodes, never from inside them. Without a meter nobody is told anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

Phase = Literal["encode", "read", "choose"]


@dataclass(frozen=True)
class Progress:
    """How far the reading of a prompt is.

    Attributes:
        phase: "encode": a picture is in the vision encoder. "read": the decoder reads the prompt. "choose": it is
            chosen which image tokens stay. A decoder stage chooses in the middle of reading.
        done: The part of the phase that is done, 0 to 1. Reading is counted in rows times layers, after each decode.
        seconds: Time since the request began.
        seconds_left: Time that the rest of the phase will take at the speed so far. None: nothing of it is done yet.
        picture: The picture in the encoder, from 1; otherwise 0.
        n_pictures: Pictures of the prompt.
    """

    phase: Phase
    done: float
    seconds: float
    seconds_left: float | None = None
    picture: int = 0
    n_pictures: int = 0


class Meter:
    """Makes Progress of what the stages of one prompt say.

    Args:
        tell: Gets each Progress. Its exceptions end the request.
        start: When the request began, in seconds of time.perf_counter.
    """

    def __init__(self, tell: Callable[[Progress], None], start: float) -> None:
        self._tell, self._start = tell, start
        self._n_pictures = 0
        self._encoding: list[int] = []  # images that have been in the encoder, the last one still is
        self._encode_since = self._read_since = 0.0
        self._n_read, self._n_total = 0, 0

    def encode(self, image: int, pictures: list[int]) -> None:
        """An image enters the encoder.

        Args:
            image: Its index among the prompt's images.
            pictures: The picture of each image of the prompt.
        """
        now = perf_counter()
        self._n_pictures = len(set(pictures))
        if not self._encoding:
            self._encode_since = now
        if image not in self._encoding:
            self._encoding.append(image)
        n_done = len(self._encoding) - 1  # others may have come from the cache: they took no time
        n_left = len(pictures) - max(self._encoding)
        left = (now - self._encode_since) / n_done * n_left if n_done else None
        done = 1 - n_left / len(pictures)
        self._tell(Progress("encode", done, now - self._start, left, pictures[image] + 1, self._n_pictures))

    def choose(self) -> None:
        """A stage chooses which tokens stay."""
        self._tell(
            Progress(
                "choose", self._n_read / (self._n_total or 1), perf_counter() - self._start, None, 0, self._n_pictures
            )
        )

    def begin_read(self, n_total: int) -> None:
        """The decoder begins, with so many rows times layers before it."""
        self._n_read, self._n_total, self._read_since = 0, max(1, n_total), perf_counter()
        self._tell(Progress("read", 0.0, self._read_since - self._start, None, 0, self._n_pictures))

    def decoded(self, n: int) -> None:
        """A decode of so many rows times layers is done."""
        now = perf_counter()
        self._n_read += n
        done = min(1.0, self._n_read / self._n_total)
        left = (now - self._read_since) * (1 - done) / done if done else None
        self._tell(Progress("read", done, now - self._start, left, 0, self._n_pictures))
