"""Runs a function in forked children, one case each, so that a death is seen and ends nothing else.

The parent must not have run a model: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable

MEMORY = 6 * 2**30  # address space of a child, so that a size that is no size fails there instead of swapping


def run(case: Callable[[], str], seconds: float) -> str:
    """What `case` returns in a child; "death: SIGNAME", "hang" after so many seconds, or "untyped: TRACEBACK" when it
    raised.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        faulthandler.disable()  # pytest's, which would write the parent's stack
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                result = case()
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                result = (
                    f"untyped: {type(error).__name__}: {error} at {os.path.basename(where.filename)}:{where.lineno}"
                )
            os.write(write, result.encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    os.close(write)
    try:
        end = time.monotonic() + seconds
        parts = []
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([read], [], [], left)[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "hang"
            piece = os.read(read, 4096)
            if not piece:
                break
            parts.append(piece)
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(read)
    if os.WIFSIGNALED(status):
        return f"death: {signal.Signals(os.WTERMSIG(status)).name}"
    return b"".join(parts).decode("utf-8", "replace") or "death: no result"
