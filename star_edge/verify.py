"""Whether pruned answers agree with unpruned ones: which requests are answered twice, and what is counted."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from typing import Any

RESULTS = ("same", "different", "skipped", "failed")


class Agreement:
    """Counts of verified requests. Threads may share it.

    Two answers are the same if their texts are, apart from white space at the ends. Both are sampled from the same
    seed. Greedy answers are the better comparison: sampled ones also part where two tokens are nearly as likely.

    Args:
        every: Every so many requests one is verified, >= 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._lock = threading.Lock()
        self._requests = 0
        self._counts = dict.fromkeys(RESULTS, 0)

    def is_due(self) -> bool:
        """Counts a request, and says whether it is to be verified."""
        with self._lock:
            self._requests += 1
            return self._requests % self.every == 0

    def count(self, result: str) -> None:
        """Counts a verification: "same", "different", "skipped" (there was no time) or "failed"."""
        with self._lock:
            self._counts[result] += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: every, the counts, and share: of the same among those compared, None without any."""
        with self._lock:
            counts = dict(self._counts)
        compared = counts["same"] + counts["different"]
        return {"every": self.every, **counts, "share": counts["same"] / compared if compared else None}


def compare(answer: str, unpruned: str) -> str:
    """ "same" or "different"."""
    return "same" if answer.strip() == unpruned.strip() else "different"


def draw_seed() -> int:
    """A seed for a request without one, so that it can be answered again in the same way."""
    return secrets.randbelow(2**31)


def answer_text(choices: Iterable[dict[str, Any]]) -> str:
    """The text of a chat completion's choices, or of a chunk's: content, and names and arguments of calls."""
    parts: list[str] = []
    for choice in choices:
        message = choice.get("message") or choice.get("delta") or {}
        parts.append(message.get("content") or "")
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            parts += [function.get("name") or "", function.get("arguments") or ""]
    return "".join(parts)
