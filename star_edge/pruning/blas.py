"""Threads of the BLAS behind NumPy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

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
