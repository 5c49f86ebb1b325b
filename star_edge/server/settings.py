"""What the server allows: limits, the key, and who may call."""

from __future__ import annotations

import ipaddress
import urllib.parse
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..io.images import ImageLimits


@dataclass(frozen=True)
class Policy:
    """What the server allows.

    Attributes:
        host: Address that the server is bound to.
        api_key: Bearer token that clients must send. None: none.
        allow_remote_images: Fetch http(s) image URLs, from public addresses only.
        max_image_bytes: Bytes of an encoded image.
        max_image_pixels: Pixels of a decoded image.
        max_images: Images of a request.
        max_body_bytes: Bytes of a request's body. An image takes 4/3 of its bytes there.
        max_held_bytes: Bytes of all bodies that arrive, or whose requests wait.
        max_queue: Requests that wait while one is answered.
        body_seconds: Seconds that a body may take to arrive.
        verify: Every so many pruned requests one is answered unpruned as well, when nobody waits. None: none.
        cors_origins: Other sites whose pages may call, such as https://example.org; "*" for any.
        request_log: File that gets a line for each POST request, "-" for stdout. None: none.
        request_log_format: "text" or "json".
        request_log_prompts: The line has the texts of the request's messages. Pictures are never in it.

    Raises:
        ConfigError: The key is empty or cannot be sent, a number allows nothing, or a site is not valid.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    allow_remote_images: bool = False
    max_image_bytes: int = 16 * 2**20
    max_image_pixels: int = 32_000_000
    max_images: int = 8
    max_body_bytes: int = 32 * 2**20
    max_held_bytes: int = 256 * 2**20
    max_queue: int = 64
    body_seconds: float = 60.0
    cors_origins: tuple[str, ...] = ()
    request_log: str | None = None
    request_log_format: Literal["text", "json"] = "text"
    request_log_prompts: bool = False
    verify: int | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty", "give one, or leave it out (STAR_EDGE_API_KEY too)")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key == self.api_key.strip()
        ):
            raise ConfigError("the API key cannot be sent in a header", "use printable ASCII without space at its ends")
        for name in (
            "max_image_bytes",
            "max_image_pixels",
            "max_images",
            "max_body_bytes",
            "max_held_bytes",
            "body_seconds",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_option(name)} {getattr(self, name)} allows nothing", "use 1 or more")
        if self.body_seconds == float("inf"):
            raise ConfigError(f"{_option('body_seconds')} inf is no limit", "use a number of seconds")
        if self.verify is not None and self.verify < 1:
            raise ConfigError(f"{_option('verify')} {self.verify} verifies nothing", "use 1 or more, or leave it out")
        if self.max_queue < 0:
            raise ConfigError(f"{_option('max_queue')} {self.max_queue} is negative", "use 0 or more")
        if self.max_held_bytes < self.max_body_bytes:
            held, body = _option("max_held_bytes"), _option("max_body_bytes")
            raise ConfigError(
                f"{held} {self.max_held_bytes} is less than {body} {self.max_body_bytes}",
                "raise it, or lower the other",
            )
        for origin in self.cors_origins:
            _check_origin(origin)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def image_limits(self) -> ImageLimits:
        """Limits of images that have arrived. Nothing is fetched while the engine waits."""
        return ImageLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels, allow_http=False)


def _option(name: str) -> str:
    """The name on the command line."""
    return "--" + name.replace("_", "-")


def _check_origin(origin: str) -> None:
    """Raises ConfigError unless a browser could send it as Origin: scheme://host[:port] in lower case (RFC 6454)."""
    if origin in ("*", "null"):
        return
    try:
        parts = urllib.parse.urlsplit(origin)
        port = f":{parts.port}" if parts.port is not None else ""
        host = parts.hostname or ""
    except ValueError:
        host = port = ""
    host = f"[{host}]" if ":" in host else host
    if not host or not parts.scheme or origin != f"{parts.scheme}://{host}{port}":
        raise ConfigError(
            f"--cors-origin {origin!r} is not a site", "write https://example.org, without a path, or * for any"
        )
