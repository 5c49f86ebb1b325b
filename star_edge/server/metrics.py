"""Counters of a server, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..report import PruneReport

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class Metrics:
    """Counters in their own registry, so that several servers fit in a process.

    queue_length: gives the number of chat completions that wait for their turn.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()

        def make(kind: type[_Metric], name: str, text: str, *labels: str, **options: Any) -> _Metric:
            return kind(name, text, labels, registry=self._registry, **options)

        self._requests = make(Counter, "star_edge_requests", "POST requests by path and HTTP status", "path", "status")
        self._errors = make(Counter, "star_edge_errors", "Chat completions that failed, by error", "error")
        self._image_tokens = make(
            Counter, "star_edge_image_tokens", "Image tokens before pruning and after each stage", "point"
        )
        self._generated = make(Counter, "star_edge_generated_tokens", "Tokens of answers")
        self._first_token = make(
            Histogram,
            "star_edge_time_to_first_token_seconds",
            "From a request's arrival, its time in the queue included",
            buckets=_SECONDS,
        )
        self._verified = make(
            Counter,
            "star_edge_verified",
            "Answers that were compared with unpruned ones (--verify), by result",
            "result",
        )
        make(Gauge, "star_edge_queue_length", "Chat completions that wait for their turn").set_function(queue_length)

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def error(self, name: str) -> None:
        self._errors.labels(name).inc()

    def prompt(self, report: PruneReport, seconds_before: float) -> None:
        """A prompt was read; seconds_before: from the request's arrival to the engine's start."""
        self._first_token.observe(seconds_before + report.milliseconds["first_token"] / 1e3)
        counts = {
            "before": report.n_image_tokens,
            "after_vision": report.n_vision_kept,
            "after_decoder": report.n_decoder_kept,
        }
        for point, n in counts.items():
            self._image_tokens.labels(point).inc(n)

    def generated(self, n: int) -> None:
        self._generated.inc(n)

    def verified(self, result: str) -> None:
        self._verified.labels(result).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
