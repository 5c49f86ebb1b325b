"""The order of measurements: warm-up, interleaved repeats, and single tokens with and without an idle callback."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from ..errors import EngineError, StarEdgeError
from ..evaluation.runner import order
from ..llamacpp.stock import clear_cache, decode_token
from .sides import Request, Sample, SideSpec, Workbench


def run_sides(
    bench: Workbench,
    specs: Sequence[SideSpec],
    request: Request,
    *,
    repeats: int,
    n_generate: int,
    progress: Callable[[], None] = lambda: None,
    save: Callable[[dict[str, list[Sample]], dict[str, int], list[str]], None] = lambda samples, cache_bytes, notes: (
        None
    ),
) -> tuple[dict[str, list[Sample]], dict[str, int], list[str]]:
    """Asks each side once to warm up, then `repeats` times in rotated order.

    A side is left out if it cannot be made here, or if its smaller picture has as many tokens as the full one.

    Args:
        bench: The model and its sides.
        specs: The sides.
        request: What each is asked.
        repeats: Number of repeats.
        n_generate: Tokens of each answer.
        progress: Called after each request.
        save: Called after each repeat with what is returned.

    Returns:
        By the side's name its samples, and the bytes of the KV cache that holds the prompt; and a note for each side
        that was left out.

    Raises:
        StarEdgeError: No star_edge side could be asked. The error is that of the first one.
    """
    samples: dict[str, list[Sample]] = {}
    cache_bytes: dict[str, int] = {}
    notes: list[str] = []
    left: list[SideSpec] = []
    first_error: StarEdgeError | None = None
    full = 0
    for spec in specs:
        try:
            warm = bench.ask(spec, request, 1)  # one token: the cache holds the prompt alone
        except StarEdgeError as error:
            if spec.kind == "star_edge" and first_error is None:
                first_error = error
            notes.append(f"left out {spec.name}: {error}")
        else:
            full = max(full, warm.n_image)
            if spec.image_max_tokens is not None and warm.n_image >= full:
                notes.append(
                    f"left out {spec.name}: this encoder makes {warm.n_image} tokens of the smaller picture too"
                )
            else:
                assert warm.cache_bytes is not None  # of one token
                cache_bytes[spec.name] = warm.cache_bytes
                samples[spec.name] = []
                left.append(spec)
        progress()
    if not any(spec.kind == "star_edge" for spec in left):
        raise first_error or EngineError("there is no side to measure")
    for repeat in range(repeats):
        for i in order(len(left), repeat):
            samples[left[i].name].append(bench.ask(left[i], request, n_generate))
            progress()
        save(samples, cache_bytes, notes)
    return samples, cache_bytes, notes


def time_idle_hook(bench: Workbench, stock: SideSpec, star: SideSpec, n_tokens: int) -> dict[str, float]:
    """The cost of an idle callback per generated token.

    Two contexts of one model, with and without the callback, decode one token each in turn.

    Args:
        bench: The model and its sides.
        stock: The side without the callback.
        star: The side with it.
        n_tokens: Tokens that are timed on each side, after a warm-up.

    Returns:
        Medians in milliseconds, their ratio, and the number of tokens.

    Raises:
        EngineError: A decode failed.
    """
    contexts = {"stock": bench.context(stock), "hook": bench.context(star)}
    times: dict[str, list[float]] = {name: [] for name in contexts}
    warm_up = max(4, n_tokens // 4)
    for context in contexts.values():
        clear_cache(context)
    for i in range(warm_up + n_tokens):
        for name in sorted(contexts, reverse=bool(i % 2)):
            start = time.perf_counter()
            decode_token(contexts[name], 1 + i % 200, i)
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    for context in contexts.values():
        clear_cache(context)
    stock_ms, hook_ms = (1e3 * statistics.median(times[name]) for name in ("stock", "hook"))
    return {
        "stock_ms_per_token": stock_ms,
        "hook_ms_per_token": hook_ms,
        "ratio": hook_ms / stock_ms,
        "tokens": n_tokens,
    }
