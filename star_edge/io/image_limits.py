"""What an image may cost, and how messages speak of one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ImageError, ImageTooLargeError


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost before it is refused.

    Attributes:
        max_bytes: Size of the encoded image in bytes (files, bytes, data: URLs, downloads).
        max_pixels: Width x height, checked before anything is decoded.
        timeout_s: Seconds for each wait on an HTTP server (connecting, the next packet), and for the whole body.
        allow_http: Whether http:// and https:// URLs are fetched. Any address that the machine can reach is fetched, so
            a service that takes URLs from strangers should turn this off.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 64_000_000
    timeout_s: float = 20.0
    allow_http: bool = True


def check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageTooLargeError(
            f"{name} is larger than the {limits.max_bytes} bytes allowed",
            "shrink it, or raise ImageLimits(max_bytes=...)",
        )


def check_size(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})", "pass an image with at least one pixel")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} = {width * height} pixels, more than the {limits.max_pixels} allowed",
            "shrink it, or raise ImageLimits(max_pixels=...)",
        )


# ---- words ----


def reason_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    return one_line(error) or type(error).__name__


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def shown(text: str) -> str:
    """A path or URL that fits in one line of a message."""
    if len(text) > 160:
        text = f"{text[:100]}...{text[-50:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) or "''"


def shown_url(url: str) -> str:
    """Without the user part and the query: passwords and signatures travel there, and messages end up in logs."""
    return shown(re.sub(r"(?<=://)[^/]*@", "", re.split(r"[?#]", url, maxsplit=1)[0]))
