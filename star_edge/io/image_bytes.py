"""The bytes of an encoded image: from a path, memory, an open file, base64 text, a data: or an http(s) URL.

Knows nothing of image formats, but for how base64 of them begins.
"""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import os
import re
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPMessage
from typing import IO, BinaryIO, cast

from ..errors import ImageError
from .image_limits import ImageLimits, check_bytes, one_line, reason_of, shown, shown_url

USER_AGENT = "star-edge/0.1 (python-urllib)"
PASS_ONE_OF = (
    "pass a path, bytes, a file opened for reading bytes, a data: or http(s) URL, a PIL image or a NumPy array"
)
_CHUNK_BYTES = 1 << 16
# How base64 of PNG, JPEG, GIF, WebP, BMP, TIFF begins
_BASE64_OF_IMAGE = re.compile(
    r"\s*(iVBORw0KGgo|/9j/|_9j_|R0lGOD|UklGR|Qk[0-9A-Za-z+/]|SUkqA|TU0AK)[0-9A-Za-z+/_=\s-]{60,}\s*", re.ASCII
)


def read_bytes(source: object, limits: ImageLimits) -> tuple[bytes, str]:
    """The encoded image and a short name of its source for messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        check_bytes(size, f"image of {size} bytes", limits)
        return bytes(source), f"image of {size} bytes"
    if isinstance(source, str):
        if re.match(r"\s*data:", source, re.IGNORECASE):
            return _read_data_url(source.lstrip(), limits), "data: URL"
        if re.match(r"\s*https?://", source, re.IGNORECASE):
            return _read_http(source.strip(), limits)
        if _BASE64_OF_IMAGE.fullmatch(source) and not _is_file(source):
            return _from_base64(source.encode(), "base64 text", limits), "base64 text"
        if re.match(r"file:", source, re.IGNORECASE):
            raise ImageError(f"file: URLs are not read ({shown(source)})", "give the path itself, without file:")
        # At least two letters, so that Windows drives stay paths.
        if scheme := re.match(r"([a-z][a-z0-9+.-]+)://", source, re.IGNORECASE):
            raise ImageError(f"{scheme[1]}: URLs are not read ({shown_url(source)})", PASS_ONE_OF)
        return _read_file(source, limits), shown(source)
    if isinstance(source, os.PathLike):
        path = os.fsdecode(source)
        return _read_file(path, limits), shown(path)
    if callable(getattr(source, "read", None)):
        return _read_stream(cast(BinaryIO, source), limits), f"what a {type(source).__name__} holds"
    raise ImageError(f"an object of type {type(source).__name__} is not an image", PASS_ONE_OF)


def _read_file(path: str, limits: ImageLimits) -> bytes:
    if not path:
        raise ImageError("the image path is empty", PASS_ONE_OF)
    name = shown(path)
    if path.startswith("~") and not os.path.lexists(path):
        path = os.path.expanduser(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a directory", "give the path of an image file")
        # Reading a pipe or a device could block, or never end.
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file", "save the image to a file, or pass its bytes")
        check_bytes(status.st_size, name, limits)
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
        raise ImageError(f"{name} cannot be read ({one_line(reason)})", "check the path and its permissions") from error
    check_bytes(len(data), name, limits)
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
        raise ImageError(f"{name} cannot be read ({reason_of(error)})", "give an open file") from error
    check_bytes(len(data), f"what {name} holds", limits)
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
    check_bytes(len(data), "data: URL", limits)
    return data


def _from_base64(data: bytes, name: str, limits: ImageLimits) -> bytes:
    """Decodes base64 of either alphabet, with or without padding and white space."""
    text = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    check_bytes(3 * len(text) // 4, name, limits)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name} holds invalid base64 ({one_line(error)})", "encode the image again") from error


class _HttpOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only. urllib itself would follow one to ftp."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme.lower() not in ("http", "https"):
            fp.close()
            raise urllib.error.URLError(f"redirected to {shown_url(newurl)}, which is not http or https")
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
    name = shown_url(url)
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
                check_bytes(int(length), name, limits)
            while chunk := response.read1(min(_CHUNK_BYTES, limits.max_bytes + 1 - len(data))):
                data += chunk
                check_bytes(len(data), name, limits)
                if time.monotonic() > deadline:
                    raise TimeoutError
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{name} cannot be fetched (HTTP {error.code} {one_line(error.reason)})", remedy) from error
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
            reason = one_line(cause) or type(cause).__name__
        raise ImageError(f"{name} cannot be fetched ({reason})", remedy) from error
    return bytes(data), name
