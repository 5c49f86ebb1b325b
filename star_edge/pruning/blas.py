"""Threads that a choice takes: those that are asked for, and none of the BLAS behind NumPy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

_lock = threading.Lock()
_depth = 0
_limit: Any = None


@functools.cache
def _controller() -> ThreadpoolController:
    # reads the list of loaded libraries: milliseconds, where setting a limit takes microseconds
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limits BLAS to one thread, process-wide, until the last block is left.

    The matrices of both stages are small. BLAS threads that spin would take the cores from llama.cpp's threads.
    """
    global _depth, _limit
    with _lock:
        if not _depth:
            _limit = _controller().limit(limits=1, user_api="blas")
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                _limit.restore_original_limits()


def spread(work: Callable[[Item], Result], items: Sequence[Item], n_threads: int) -> list[Result]:
    """work(item) of each item, in order, on up to n_threads threads, which end with it.

    The C core lets go of the interpreter, and NumPy does in products and in passes over large arrays. What is made of
    many small calls gains nothing here.
    """
    n_threads = min(n_threads, len(items))
    if n_threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, items))
