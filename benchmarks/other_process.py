"""A process of another environment that stays alive and answers one line of JSON with one line of JSON.

So two engines that cannot be installed together are measured in turn. Both ends are here, and need the standard library
alone. The process says at each answer how much processor time it took since the one before, when it should have slept.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

IDLE = "idle_cpu_s"  # of an answer: processor seconds of all threads since the answer before


class OtherProcessError(RuntimeError):
    """The process could not be started, has ended, or could not answer."""


def take_stdout() -> TextIO:
    """The stream for answers. What anything else prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def serve(
    answers: TextIO, hello: dict[str, Any], answer: Callable[..., dict[str, Any]], requests: Iterable[str] = sys.stdin
) -> None:
    """Answers requests until their stream ends.

    Args:
        answers: Where answers go.
        hello: The first line, once everything is loaded.
        answer: Called with the fields of a request. What it raises becomes {"error": ...}.
        requests: Lines of JSON objects.
    """
    _send(answers, hello)
    slept_since = time.process_time()
    for line in requests:
        idle = time.process_time() - slept_since
        try:
            found = answer(**json.loads(line))
        except Exception as error:  # whatever it is, the other end wants to know
            found = {"error": f"{type(error).__name__}: {error}"}
        slept_since = time.process_time()  # before the answer is sent: what threads do after it counts as idle
        _send(answers, found | {IDLE: idle})


def _send(stream: TextIO, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


class OtherProcess:
    """The end that asks.

    Args:
        command: Program and arguments. What it prints before it is ready goes to stderr.

    Attributes:
        hello: What the process said once it was ready.

    Raises:
        OtherProcessError: It could not be started, or ended before it was ready.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._name = os.path.basename(command[1] if len(command) > 1 else command[0])
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise OtherProcessError(f"{command[0]} cannot be started ({error.strerror})") from error
        try:
            self.hello = self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            OtherProcessError: There is none.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and receiving says how
            _send(self._process.stdin, request)
        answer = self._receive()
        if "error" in answer:
            raise OtherProcessError(f"{self._name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process: its stream of requests ends, and if it does not go then, it is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):  # something was left to send, and it has ended
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                return value
            sys.stderr.write(line)
        raise OtherProcessError(f"{self._name} ended with status {self._process.wait()}; what it said is above")
