"""A line for each request: who asked, what was pruned, how long it took. No prompts and no pictures, unless asked for.

Lines are JSON, or text in pairs of name=value. What clients send is quoted, so that it cannot look like another line.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..errors import ConfigError
from ..report import PruneReport

_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)
RECORD = "star_edge.record"  # key in a request's scope, and type of the message that carries a record to a front


@dataclass
class Record:
    """A request, as far as it has come.

    Attributes:
        client: Its address, or None.
        path: What it asked for.
        id: Also in the response, as header x-request-id.
        facts: What is known of it, by name.
    """

    client: str | None
    path: str
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    facts: dict[str, Any] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)
    _when: float = field(default_factory=time.time)

    def asked(self, model: str, prune: str, stream: bool) -> None:
        """A chat completion that can be answered. prune: name of the config, "custom" for one by fields."""
        self.facts |= {"model": model, "prune": prune, "stream": stream}

    def read(self, report: PruneReport, waited: float) -> None:
        """Its prompt was read, after `waited` seconds in the queue."""
        first = waited + report.milliseconds["first_token"] / 1e3
        self.facts |= {
            "images": len(report.pictures),
            "image_tokens": report.n_image_tokens,
            "after_vision": report.n_vision_kept,
            "after_decoder": report.n_decoder_kept,
            "average_tokens": round(report.average_tokens, 1),
            "cached_images": report.n_cached,
            "reused_tokens": report.reused_tokens,
            "queue_ms": round(1e3 * waited, 1),
            "first_token_ms": round(1e3 * first, 1),
        }

    def line(self, status: int) -> dict[str, Any]:
        """The fields of its line. status: of HTTP; 499 if the client left before there was one."""
        when = datetime.datetime.fromtimestamp(self._when, datetime.timezone.utc)
        head = {"time": when.isoformat(timespec="milliseconds"), "id": self.id, "client": self.client}
        total = round(1e3 * (time.perf_counter() - self._start), 1)
        return {**head, "path": self.path, "status": status, **self.facts, "total_ms": total}


class RequestLog:
    """Writes lines.

    A line that cannot be written costs no request anything: the first time, stderr says so.

    Args:
        target: A file, to which lines are added, or "-" for stdout.
        form: "text" or "json".

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, target: str, form: str) -> None:
        self._form = form
        self._target = target
        self._failed = False
        try:
            self._file: TextIO = sys.stdout if target == "-" else open(target, "a", encoding="utf-8")  # noqa: SIM115 (to the end)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"request_log={target!r} cannot be written ({reason})", "give a file, or -") from error

    def write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line) if self._form == "json" else as_text(line)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            if not self._failed:
                print(f"the request log {self._target} cannot be written ({error})", file=sys.stderr)
            self._failed = True

    def close(self) -> None:
        if self._file is not sys.stdout:
            self._file.close()


def as_text(line: Mapping[str, Any]) -> str:
    """name=value pairs, without those that are None."""
    return " ".join(f"{name}={_value(value)}" for name, value in line.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)
