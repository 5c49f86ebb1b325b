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
    """Opens a file to read it from its start and append to it, and locks it until it is closed.

    The file is created if it does not exist.

    Raises:
        BlockingIOError: Another run has it open.
        OSError: It cannot be opened; or it is a device or a pipe, which may be endless and must not be replaced.
    """
    while True:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
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
