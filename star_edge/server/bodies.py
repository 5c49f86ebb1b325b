"""Request bodies as they arrive, with a bound for the memory of all together, and for the time of each.

A body counts from its first byte until its request no longer needs it. Knows neither HTTP headers nor what bodies mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio


class Refusal(Exception):
    """A request that is refused. status: HTTP status. code: the code in OpenAI's error object."""

    def __init__(self, status: int, message: str, code: str) -> None:
        self.status, self.code = status, code
        super().__init__(message)


class Body:
    """One body. data: what has arrived. Call `release` when the request is over."""

    def __init__(self, bodies: Bodies) -> None:
        self.data = bytearray()  # grows in place: parts would be in memory twice when joined
        self.n_bytes = 0
        self._bodies = bodies
        self._scope = anyio.CancelScope()
        self._given_up = False

    def release(self) -> None:
        """Stops counting its bytes. Calling it again does nothing."""
        self._bodies.n_held -= self.n_bytes
        self.n_bytes = 0
        self.data = bytearray()

    def give_up(self) -> None:
        self._given_up = True
        self.release()
        self._bodies.arriving.pop(self, None)
        self._scope.cancel()

    async def read(self, receive: Callable[[], Awaitable[dict[str, Any]]]) -> bool:
        """Reads the whole body. False: the client has left.

        Raises:
            Refusal: The body is too large or too slow, or there is no room for it.
        """
        bodies = self._bodies
        if len(bodies.arriving) >= bodies.max_arriving:
            next(iter(bodies.arriving)).give_up()
        bodies.arriving[self] = None
        self._scope.deadline = anyio.current_time() + bodies.seconds
        is_whole = False
        try:
            with self._scope:
                while not self._given_up:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    if self.n_bytes + len(part) > bodies.max_bytes:
                        raise bodies.too_large()
                    if part and not self._given_up:
                        bodies.make_room(self, len(part))
                    if self._given_up:
                        break
                    if part:
                        self.data += part
                        self.n_bytes += len(part)
                        bodies.n_held += len(part)
                    if not message.get("more_body", False):
                        is_whole = True
                        return True
        finally:
            bodies.arriving.pop(self, None)
            if not is_whole:
                self.release()
        if self._given_up:
            raise Refusal(503, "the server has no room for this request while others arrive: send it again", "no_room")
        raise Refusal(408, f"the request took more than {bodies.seconds:g} s to arrive: send it again", "too_slow")


class Bodies:
    """All bodies of a server.

    If there is no room, the body that began to arrive first is given up. Slow clients therefore cannot keep others out.

    Args:
        max_bytes: Bytes of one body.
        max_held: Bytes of all bodies together.
        seconds: Seconds that a body may take to arrive.
        max_arriving: Bodies that may arrive at once.

    Attributes:
        n_held: Bytes that are held.
        arriving: Bodies that are not complete yet, in order of arrival.
    """

    def __init__(self, max_bytes: int, max_held: int, seconds: float, max_arriving: int = 256) -> None:
        self.max_bytes, self.max_held, self.seconds, self.max_arriving = max_bytes, max_held, seconds, max_arriving
        self.n_held = 0
        self.arriving: dict[Body, None] = {}

    def too_large(self) -> Refusal:
        remedy = "send smaller images, or raise --max-body-bytes"
        return Refusal(413, f"the request is larger than {self.max_bytes} bytes: {remedy}", "too_large")

    def make_room(self, body: Body, n: int) -> None:
        """Makes room for n more bytes of an arriving body, which may itself be given up.

        Raises:
            Refusal: Complete bodies, whose requests wait, take all the room.
        """
        of_waiting = self.n_held - sum(other.n_bytes for other in self.arriving)
        if of_waiting + body.n_bytes + n > self.max_held:
            raise Refusal(503, f"the requests that wait hold {of_waiting} bytes already: ask again later", "queue_full")
        while self.n_held + n > self.max_held and body in self.arriving:
            next(other for other in self.arriving if other.n_bytes or other is body).give_up()
