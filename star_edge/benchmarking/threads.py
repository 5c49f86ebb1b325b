"""How long a token takes with how many threads, on the machine as it is: what `star-edge doctor --measure` says."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ..engine import StarVLM
from ..llamacpp.context import set_threads

TOKENS, ROUNDS = 6, 3


def measure_tokens(vlm: StarVLM) -> list[dict[str, Any]]:
    """Median time of a token with all of the model's threads, with half of them, ..., with one.

    Args:
        vlm: The model. Its prompt cache is emptied.

    Returns:
        For each number of threads: threads, milliseconds, and is_used: whether the model has that number now.

    Raises:
        EngineError: A decode failed.
    """
    n = int(vlm.llama.n_threads)
    counts = [n]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    times: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for turn in range(ROUNDS):
            for count in counts if turn % 2 == 0 else counts[::-1]:
                set_threads(vlm.llama, count)
                times[count] += _tokens(vlm)
    finally:
        set_threads(vlm.llama, n)
    return [
        {"threads": count, "milliseconds": 1e3 * statistics.median(times[count]), "is_used": count == n}
        for count in counts
    ]


def _tokens(vlm: StarVLM) -> list[float]:
    """Times of tokens after the first, in seconds."""
    times: list[float] = []
    since = None
    for _ in vlm.generate("Count from one on.", prune=None, max_tokens=TOKENS, stream=True, chat=False):
        now = time.perf_counter()
        if since is not None:
            times.append(now - since)
        since = now
    return times
