"""Every Nth pruned request is answered unpruned as well, once its client has the answer and nobody waits.

A request that arrives meanwhile ends the second answer: it waits for the decode that runs, or for the encoding of one
image. What was ended, or never began because others waited, counts as skipped.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import anyio

from ..errors import RequestCancelledError
from ..verify import Agreement, answer_text, compare
from .metrics import Metrics

_log = logging.getLogger(__name__)


class Again(Protocol):
    """A job that answers a request once more, see `jobs.Job.unpruned`."""

    scope: anyio.CancelScope

    @property
    def is_stopped(self) -> bool: ...

    def answer_alone(self) -> Any: ...


class Host(Protocol):
    """What is asked of `jobs.Engine`."""

    waiting: int
    turn: anyio.Lock
    metrics: Metrics
    jobs: set[Any]
    in_thread: Any


class Verifier:
    """Verifies the answers of one engine.

    Attributes:
        agreement: The counts.
        is_busy: Whether a request is kept to be verified. There is one at a time, so that memory is bounded.
    """

    def __init__(self, engine: Host, every: int) -> None:
        self.agreement = Agreement(every)
        self.is_busy = False
        self._engine = engine
        self._tasks: set[asyncio.Task[None]] = set()

    def takes(self) -> bool:
        """Counts a pruned request, and says whether it is to be verified. Then `verify` or `skip` must follow."""
        if not self.agreement.is_due():
            return False
        if self.is_busy:
            self._count("skipped")
            return False
        self.is_busy = True
        return True

    def skip(self) -> None:
        """The request that was taken has no answer that could be compared."""
        self.is_busy = False
        self._count("skipped")

    def verify(self, again: Again, answer: str) -> None:
        """Answers a request again, in the background. again: see `Job.unpruned`. answer: the pruned one."""
        self._engine.jobs.add(again)  # so that the server's end stops it, and waits for it
        task = asyncio.create_task(self._verify(again, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _verify(self, again: Again, answer: str) -> None:
        engine, result = self._engine, "skipped"
        try:
            with again.scope:
                await asyncio.sleep(0)  # the client's last bytes first
                if not engine.waiting:
                    async with engine.turn:
                        if not engine.waiting and not again.is_stopped:
                            response: dict[str, Any] = await engine.in_thread(again.answer_alone)
                            result = compare(answer, answer_text(response["choices"]))
        except RequestCancelledError:
            pass
        except Exception as error:
            result = "failed"
            _log.warning("an answer could not be verified: %s", error)
        finally:
            engine.jobs.discard(again)
            self.is_busy = False
            self._count(result)

    def _count(self, result: str) -> None:
        self.agreement.count(result)
        self._engine.metrics.verified(result)
        counts = self.agreement.to_dict()
        log = _log.warning if result == "different" else _log.info
        log(
            "verified: %s; so far %d the same as unpruned, %d different, %d skipped, %d failed",
            *(result, counts["same"], counts["different"], counts["skipped"], counts["failed"]),
        )
