"""Pixels: encoded images, PIL images and arrays as (height, width, 3) uint8 RGB.

Neither resizes nor normalises. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import io
import re
import threading
import warnings

import numpy as np
import PIL.Image

from ..errors import ImageError, ImageTooLargeError
from .image_limits import ImageLimits, check_size, one_line, reason_of

# Formats whose header states the size that is decoded. Left out on purpose: EPS, which runs Ghostscript, and containers
# such as ICO, whose embedded picture may be far larger than their header says. AVIF and HEIF only work where Pillow has
# them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_CHECK_FILE = "check that it is a complete image file (PNG, JPEG, WebP, GIF, BMP, TIFF), or save it again as PNG"
_EXIF_ORIENTATION = 0x0112
# A progressive JPEG has about ten scans. Each costs time for all pixels, and may take no more than a dozen bytes of the
# file.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 2_000_000_000  # scans x pixels: some seconds on a slow core
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# warnings.catch_warnings swaps global state; without the lock, two threads could leave each other's filters behind.
_open_lock = threading.Lock()


def check_pixels(pixels: np.ndarray, name: str = "a picture") -> np.ndarray:
    """(h, w, 3) uint8, C-contiguous: what libmtmd reads through a pointer.

    Raises:
        ImageError: an array of another kind, or none.
    """
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 3
        or pixels.shape[2] != 3
        or not pixels.size
    ):
        is_array = isinstance(pixels, np.ndarray)
        shape = f"{pixels.dtype} array of shape {pixels.shape}" if is_array else type(pixels).__name__
        raise ImageError(f"{name} is a {shape}", "give (h, w, 3) uint8")
    return np.ascontiguousarray(pixels)


def decode(data: bytes, name: str, limits: ImageLimits) -> np.ndarray:
    if not data:
        raise ImageError(f"{name} is empty", _CHECK_FILE)
    try:
        try:
            return _decode_bytes(data, name, limits)
        except (ImageError, ValueError):
            smaller = _without_texts(data)
            if smaller is None:
                raise
            return _decode_bytes(smaller, name, limits)
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise _too_large_for_pillow(name, error) from error
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a known format", _CHECK_FILE) from None
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded ({reason_of(error)})", _CHECK_FILE) from error


def _decode_bytes(data: bytes, name: str, limits: ImageLimits) -> np.ndarray:
    with _open_header(data) as image:
        if image.format in ("JPEG", "MPO"):
            _check_scans(data, image.width * image.height, name)
        return from_pil(image, name, limits)


def _without_texts(data: bytes) -> bytes | None:
    """A PNG file without its texts and colour profile, of which Pillow unpacks 1 MiB at most.

    None: it is not a PNG file, or has neither.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"iCCP", b"zTXt", b"iTXt", b"tEXt"):
            kept.append(data[at:end])
        at = end
    result = b"".join(kept)
    return result if len(result) < len(data) else None


def _check_scans(data: bytes, n_pixels: int, name: str) -> None:
    """Refuses a JPEG file whose scans would take too long."""
    most = max(1, min(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(1, n_pixels)))
    if data.count(b"\xff\xda") > most:  # the two bytes may also stand in a header's preview or profile
        n_scans = _count_scans(data, most)
        if n_scans > most:
            raise ImageTooLargeError(
                f"{name} has more than the {most} scans that are decoded of a JPEG of {n_pixels} pixels",
                "save it again, or as PNG",
            )


def _count_scans(data: bytes, most: int) -> int:
    """Number of scans of a JPEG file, or a number over `most`."""
    n_scans, at = 0, 2
    while n_scans <= most:
        # Not markers: a stuffed FF, a restart, a filler
        marker = _MARKER.search(data, at)
        if marker is None or data[marker.start() + 1] == 0xD9:
            break
        at = marker.end()
        n_scans += data[at - 1] == 0xDA
        if data[at - 1] != 0xD8:
            at += int.from_bytes(data[at : at + 2], "big")
    return n_scans


def _open_header(data: bytes) -> PIL.Image.Image:
    """Reads the header only. The caller checks the size before anything is decoded."""
    PIL.Image.init()
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]
    with _open_lock, warnings.catch_warnings():
        # Pillow warns of large sizes, which are checked here, and of oddities that either do not matter or raise later.
        warnings.simplefilter("ignore")
        return PIL.Image.open(io.BytesIO(data), formats=formats)


def from_pil(image: PIL.Image.Image, name: str, limits: ImageLimits) -> np.ndarray:
    check_size(image.width, image.height, name, limits)
    try:
        image.load()
        orientation = _orientation(image)
        pixels = _to_rgb(image, name)
        return np.ascontiguousarray(_orient(pixels, orientation))
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise _too_large_for_pillow(name, error) from error
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded ({reason_of(error)})", _CHECK_FILE) from error


def _to_rgb(image: PIL.Image.Image, name: str) -> np.ndarray:
    """A fresh (height, width, 3) uint8 array of a loaded image in any mode of Pillow."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling. Mode I is how it holds 16-bit grey when it lacks
        # I;16.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has pixel values outside 0..65535", "scale it to 8 or 16 bits first")
        grey = _from_16_bits(values.astype(np.uint16))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        return from_array(np.asarray(image), None, name)
    if _has_transparency(image):
        return _over_white(image)
    return np.array(image.convert("RGB"))


def _has_transparency(image: PIL.Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return True
    if image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _over_white(image: PIL.Image.Image) -> np.ndarray:
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    canvas = PIL.Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return np.array(canvas)


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Unreadable metadata counts as none: it does not make the pixels unreadable."""
    try:
        orientation: int = image.getexif().get(_EXIF_ORIENTATION, 1)
        return orientation
    except Exception:
        return 1


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What PIL.ImageOps.exif_transpose does, without its rewriting of the metadata, which fails where EXIF is odd."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    return pixels


def from_array(array: np.ndarray, limits: ImageLimits | None, name: str | None = None) -> np.ndarray:
    """`limits` is None where the size was checked already."""
    array = np.asarray(array)  # np.matrix keeps two dimensions whatever is done to it
    name = name or f"array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} is not an image", "pass shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if limits is not None:
        check_size(array.shape[1], array.shape[0], name, limits)
    if array.dtype == np.uint8:
        pixels = np.array(array, subok=False)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        pixels = _from_16_bits(array)
    elif array.dtype.kind == "f":
        # Written so that NaN fails it too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"{name} has values outside 0..1 or NaN", "scale floats to 0..1, or convert them to uint8")
        pixels = (array * 255 + 0.5).astype(np.uint8)
    else:
        raise ImageError(f"{name} is not an image", "convert it to uint8, uint16 or floats in 0..1")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    elif pixels.shape[2] == 4:
        pixels = _over_white(PIL.Image.fromarray(np.ascontiguousarray(pixels)))
    return np.ascontiguousarray(pixels)


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 in full range to uint8, rounded to nearest."""
    whole, rest = np.divmod(values, np.uint16(257))
    return (whole + (rest > 128)).astype(np.uint8)


def _too_large_for_pillow(name: str, error: Exception) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{name} has too many pixels ({one_line(error)})",
        "shrink it; to allow it, raise PIL.Image.MAX_IMAGE_PIXELS besides ImageLimits(max_pixels=...)",
    )
