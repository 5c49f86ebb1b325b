"""A file of results that one run at a time appends to."""

from __future__ import annotations

import errno
import os
import stat
import sys
from os import PathLike
from typing import BinaryIO

if sys.platform != "win32":  # two runs into one file are not told apart there
    import fcntl


def open_alone(path: str | PathLike[str], buffering: int = -1) -> BinaryIO:
    """The file, made where there is none, to be read from its start and appended to; locked until it is closed.

    Raises:
        BlockingIOError: another run has it.
        OSError: it cannot be opened, or is a device or a pipe, whose contents may have no end and which must not be
            replaced.
    """
    while True:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        file = open(path, "a+b", buffering=buffering)  # noqa: SIM115 (kept open for the run)
        try:
            if sys.platform != "win32":
                _lock(file)
                # whoever had the lock may have put another file there: results would go into the old one
                if not _is_at(file, path):
                    file.close()
                    continue
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks


def _is_at(file: BinaryIO, path: str | PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
