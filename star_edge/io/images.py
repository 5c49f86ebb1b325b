"""Turns whatever a caller calls an image into one RGB array, or refuses it with a typed error."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from typing import BinaryIO

import numpy as np
import PIL.Image

from ..errors import ImageError
from .image_bytes import USER_AGENT, read_bytes
from .image_limits import ImageLimits
from .pixels import FORMATS, check_pixels, decode, from_array, from_pil

__all__ = ["FORMATS", "USER_AGENT", "ImageLimits", "ImageSource", "check_pixels", "load_image", "load_message_image"]

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image | np.ndarray


def load_image(source: ImageSource, limits: ImageLimits = ImageLimits()) -> np.ndarray:
    """Reads an image.

    A source is one of:

    - a path (str or PathLike), the bytes of an image file, or a file opened for reading bytes. Of an animation the
      first frame is taken.
    - a `data:`, `http://` or `https://` URL, or the base64 text of a PNG, JPEG, GIF, WebP, BMP or TIFF file.
    - a PIL image, in its current frame.
    - an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16 (full range) or float in 0..1.

    EXIF orientation is applied. Transparency is composed over white. 16-bit grey is scaled to 8 bits.

    Args:
        source: The image.
        limits: What it may cost.

    Returns:
        (height, width, 3) uint8 RGB, C-contiguous, writable, sharing no memory with the source.

    Raises:
        ImageTooLargeError: The image has more bytes or pixels than `limits` allows.
        ImageError: The source is not an image, or cannot be read.
    """
    if isinstance(source, np.ndarray):
        return from_array(source, limits)
    if isinstance(source, PIL.Image.Image):
        return from_pil(source, "PIL image", limits)
    data, name = read_bytes(source, limits)
    return decode(data, name, limits)


def load_message_image(source: ImageSource, limits: ImageLimits = ImageLimits()) -> np.ndarray:
    """As `load_image`, and reads file: URLs of this machine too. Clients write those into messages.

    Raises:
        ImageError: As `load_image`, or the URL names another host.
    """
    if isinstance(source, str) and source[:5].lower() == "file:":
        parts = urllib.parse.urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise ImageError(f"{source[:200]} is on another host", "write file:///path, or give the path itself")
        source = urllib.request.url2pathname(parts.path)
    return load_image(source, limits)
