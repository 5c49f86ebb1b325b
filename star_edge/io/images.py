"""Turns whatever a caller calls an image into one RGB array, or refuses it with a typed error.

Knows file formats, URLs, pixel layouts and the limits that keep a hostile or broken image from exhausting memory. Knows
nothing of models: it neither resizes nor normalises.
"""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import io
import os
import re
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, BinaryIO, cast

import numpy as np
import PIL.Image

from ..errors import ImageError, ImageTooLargeError

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image | np.ndarray

# Formats whose header states the size that is decoded. Left out on purpose: EPS, which runs Ghostscript, and containers
# such as ICO, whose embedded picture may be far larger than their header says. AVIF and HEIF only work where Pillow has
# them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
USER_AGENT = "star-edge/0.1 (python-urllib)"

_PASS_ONE_OF = (
    "pass a path, bytes, a file opened for reading bytes, a data: or http(s) URL, a PIL image or a NumPy array"
)
_CHECK_FILE = "check that it is a complete image file (PNG, JPEG, WebP, GIF, BMP, TIFF), or save it again as PNG"
_EXIF_ORIENTATION = 0x0112
_CHUNK_BYTES = 1 << 16
# A progressive JPEG has about ten scans. Each costs time for all pixels, and may take no more than a dozen bytes of the
# file.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 2_000_000_000  # scans x pixels: some seconds on a slow core
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# How base64 of PNG, JPEG, GIF, WebP, BMP, TIFF begins
_BASE64_OF_IMAGE = re.compile(
    r"\s*(iVBORw0KGgo|/9j/|_9j_|R0lGOD|UklGR|Qk[0-9A-Za-z+/]|SUkqA|TU0AK)[0-9A-Za-z+/_=\s-]{60,}\s*", re.ASCII
)

# warnings.catch_warnings swaps global state; without the lock, two threads could leave each other's filters behind.
_open_lock = threading.Lock()


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
        return _from_array(source, limits)
    if isinstance(source, PIL.Image.Image):
        return _from_pil(source, "PIL image", limits)
    data, name = _read_bytes(source, limits)
    return _decode(data, name, limits)


# --- where the bytes come from ---


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


def _read_bytes(source: object, limits: ImageLimits) -> tuple[bytes, str]:
    """The encoded image and a short name of its source for messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        _check_bytes(size, f"image of {size} bytes", limits)
        return bytes(source), f"image of {size} bytes"
    if isinstance(source, str):
        if re.match(r"\s*data:", source, re.IGNORECASE):
            return _read_data_url(source.lstrip(), limits), "data: URL"
        if re.match(r"\s*https?://", source, re.IGNORECASE):
            return _read_http(source.strip(), limits)
        if _BASE64_OF_IMAGE.fullmatch(source) and not _is_file(source):
            return _from_base64(source.encode(), "base64 text", limits), "base64 text"
        if re.match(r"file:", source, re.IGNORECASE):
            raise ImageError(f"file: URLs are not read ({_shown(source)})", "give the path itself, without file:")
        # At least two letters, so that Windows drives stay paths.
        if scheme := re.match(r"([a-z][a-z0-9+.-]+)://", source, re.IGNORECASE):
            raise ImageError(f"{scheme[1]}: URLs are not read ({_shown_url(source)})", _PASS_ONE_OF)
        return _read_file(source, limits), _shown(source)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _read_file(path, limits), _shown(path)
    if callable(getattr(source, "read", None)):
        return _read_stream(cast(BinaryIO, source), limits), f"what a {type(source).__name__} holds"
    raise ImageError(f"an object of type {type(source).__name__} is not an image", _PASS_ONE_OF)


def _read_file(path: str, limits: ImageLimits) -> bytes:
    if not path:
        raise ImageError("the image path is empty", _PASS_ONE_OF)
    name = _shown(path)
    if path.startswith("~") and not os.path.lexists(path):
        path = os.path.expanduser(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a directory", "give the path of an image file")
        # Reading a pipe or a device could block, or never end.
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file", "save the image to a file, or pass its bytes")
        _check_bytes(status.st_size, name, limits)
        with open(path, "rb") as file:
            data = file.read(limits.max_bytes + 1)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist", "check the path of the image") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise ImageError(
                f"a text of {len(path)} characters is not the path of an image",
                "put data:image/png;base64, before it if it is base64",
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{name} cannot be read ({_one_line(reason)})", "check the path and its permissions"
        ) from error
    _check_bytes(len(data), name, limits)
    return data


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL character
        return False


def _read_stream(source: BinaryIO, limits: ImageLimits) -> bytes:
    """Reads from the beginning if the source can seek, as Pillow does, so that one object may be given twice."""
    name = f"a {type(source).__name__}"
    try:
        if callable(getattr(source, "seekable", None)) and source.seekable():
            source.seek(0)
        data = bytearray()
        while len(data) <= limits.max_bytes and (
            chunk := source.read(min(_CHUNK_BYTES, limits.max_bytes + 1 - len(data)))
        ):
            if not isinstance(chunk, (bytes, bytearray, memoryview)):
                raise ImageError(
                    f"{name} gives {type(chunk).__name__} instead of bytes", 'open the file with mode "rb"'
                )
            data += chunk
    except ImageError:
        raise
    except Exception as error:  # it is the caller's object
        raise ImageError(f"{name} cannot be read ({_reason(error)})", "give an open file") from error
    _check_bytes(len(data), f"what {name} holds", limits)
    return bytes(data)


def _read_data_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError("data: URL has no comma, so no data", "write it as data:image/png;base64,<data>")
    try:
        data = urllib.parse.unquote_to_bytes(payload)
    except UnicodeEncodeError:
        raise ImageError("data: URL has characters that are not text (surrogates)", "encode the image again") from None
    # The parameters come in any order, and some leave ;base64 out
    if "base64" in [word.strip().lower() for word in header.split(";")[1:]] or _BASE64_OF_IMAGE.fullmatch(payload):
        data = _from_base64(data, "data: URL", limits)
    _check_bytes(len(data), "data: URL", limits)
    return data


def _from_base64(data: bytes, name: str, limits: ImageLimits) -> bytes:
    """Decodes base64 of either alphabet, with or without padding and white space."""
    text = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    _check_bytes(3 * len(text) // 4, name, limits)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name} holds invalid base64 ({_one_line(error)})", "encode the image again") from error


class _HttpOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only. urllib itself would follow one to ftp."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme.lower() not in ("http", "https"):
            fp.close()
            raise urllib.error.URLError(f"redirected to {_shown_url(newurl)}, which is not http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _http_opener() -> urllib.request.OpenerDirector:
    """An opener that knows HTTP alone, built for each call because the proxy settings come from the environment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _HttpOnlyRedirects,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _read_http(url: str, limits: ImageLimits) -> tuple[bytes, str]:
    name = _shown_url(url)
    if not limits.allow_http:
        raise ImageError(
            f"{name} is not fetched, since HTTP is off", "pass the image itself, or set ImageLimits(allow_http=True)"
        )
    remedy = "check the URL, or download the image and give its path"
    deadline = time.monotonic() + limits.timeout_s
    data = bytearray()
    try:
        if "@" in urllib.parse.urlsplit(url).netloc:
            raise ValueError  # urllib would take the user name for a part of the host name
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT, "Accept": "image/*"})
        with _http_opener().open(request, timeout=limits.timeout_s) as response:
            length = response.headers.get("Content-Length", "")
            if length.isdecimal():
                _check_bytes(int(length), name, limits)
            while chunk := response.read1(min(_CHUNK_BYTES, limits.max_bytes + 1 - len(data))):
                data += chunk
                _check_bytes(len(data), name, limits)
                if time.monotonic() > deadline:
                    raise TimeoutError
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{name} cannot be fetched (HTTP {error.code} {_one_line(error.reason)})", remedy) from error
    except (http.client.InvalidURL, ValueError):
        # Without the cause: it quotes the URL, with whatever secrets that holds.
        raise ImageError(
            f"{name} is not a valid URL", "percent-encode unusual characters, and leave out user names"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            reason = f"no complete answer within {limits.timeout_s:g} s"
        else:
            reason = _one_line(cause) or type(cause).__name__
        raise ImageError(f"{name} cannot be fetched ({reason})", remedy) from error
    return bytes(data), name


# --- from bytes to pixels ---


def _decode(data: bytes, name: str, limits: ImageLimits) -> np.ndarray:
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
        raise ImageError(f"{name} cannot be decoded ({_reason(error)})", _CHECK_FILE) from error


def _decode_bytes(data: bytes, name: str, limits: ImageLimits) -> np.ndarray:
    with _open_header(data) as image:
        if image.format in ("JPEG", "MPO"):
            _check_scans(data, image.width * image.height, name)
        return _from_pil(image, name, limits)


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


def _from_pil(image: PIL.Image.Image, name: str, limits: ImageLimits) -> np.ndarray:
    _check_pixels(image.width, image.height, name, limits)
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
        raise ImageError(f"{name} cannot be decoded ({_reason(error)})", _CHECK_FILE) from error


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
        return _from_array(np.asarray(image), None, name)
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


# --- arrays ---


def _from_array(array: np.ndarray, limits: ImageLimits | None, name: str | None = None) -> np.ndarray:
    """`limits` is None where the size was checked already."""
    array = np.asarray(array)  # np.matrix keeps two dimensions whatever is done to it
    name = name or f"array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} is not an image", "pass shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if limits is not None:
        _check_pixels(array.shape[1], array.shape[0], name, limits)
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


# --- limits and messages ---


def _check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageTooLargeError(
            f"{name} is larger than the {limits.max_bytes} bytes allowed",
            "shrink it, or raise ImageLimits(max_bytes=...)",
        )


def _check_pixels(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})", "pass an image with at least one pixel")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} = {width * height} pixels, more than the {limits.max_pixels} allowed",
            "shrink it, or raise ImageLimits(max_pixels=...)",
        )


def _too_large_for_pillow(name: str, error: Exception) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{name} has too many pixels ({_one_line(error)})",
        "shrink it; to allow it, raise PIL.Image.MAX_IMAGE_PIXELS besides ImageLimits(max_pixels=...)",
    )


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    return _one_line(error) or type(error).__name__


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _shown(text: str) -> str:
    """A path or URL that fits in one line of a message."""
    if len(text) > 160:
        text = f"{text[:100]}...{text[-50:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) or "''"


def _shown_url(url: str) -> str:
    """Without the user part and the query: passwords and signatures travel there, and messages end up in logs."""
    return _shown(re.sub(r"(?<=://)[^/]*@", "", re.split(r"[?#]", url, maxsplit=1)[0]))
