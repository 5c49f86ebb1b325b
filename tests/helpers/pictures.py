"""Pictures, as files and as arrays, and files that claim more than they hold."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from star_edge.errors import ImageError
from star_edge.io.images import ImageLimits, load_image


def encode(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    """Noise, so that no codec can shrink it to nothing and a cut always loses pixels."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are missing."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(100))) + _chunk(b"IEND", b"")


def error_of(source, limits: ImageLimits = ImageLimits(), kind: type = ImageError) -> str:
    """The message of what `load_image` raises: one line, typed as asked for."""
    with pytest.raises(ImageError) as caught:
        load_image(source, limits)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message and caught.value.cause and caught.value.remedy
    return message
