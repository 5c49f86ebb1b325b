"""What the server allows: limits, the key, and who may call."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..errors import ConfigError
from ..images import ImageLimits


@dataclass(frozen=True)
class Policy:
    """host: what the server is bound to. api_key: what clients must send as Bearer token, None for nothing.

    allow_remote_images: fetch http(s) image URLs, from public addresses only.
    max_image_bytes, max_image_pixels: of each image, encoded and decoded. max_images: of one request.
    max_body_bytes: of a request's body; an image takes 4/3 of its bytes there.
    max_queue: requests that wait while one is answered. body_seconds: how long a client may take to send its request.
    cors_origins: other sites whose pages may call, "*" for any.

    Raises:
        ConfigError: an empty key, or a number that allows nothing.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    allow_remote_images: bool = False
    max_image_bytes: int = 16 * 2**20
    max_image_pixels: int = 32_000_000
    max_images: int = 8
    max_body_bytes: int = 32 * 2**20
    max_queue: int = 64
    body_seconds: float = 60.0
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty", "give one, or leave it out (STAR_EDGE_API_KEY too)")
        for name in ("max_image_bytes", "max_image_pixels", "max_body_bytes", "body_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} allows nothing", "use 1 or more")
        for name in ("max_images", "max_queue"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative", "use 0 or more")

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
        """For images that are here already: nothing is fetched while the engine waits."""
        return ImageLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels, allow_http=False)
