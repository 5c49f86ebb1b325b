"""Videos of a request: their frames are read within the server's limits, and drawn small for clients that ask for them.

Knows nothing of prompts, and nothing of whose turn it is.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from ..errors import ImageTooLargeError
from ..io.images import ImageLimits
from ..io.video import Frames, Video, read_video
from ..report import PruneReport

_SIDE = 360  # pixels of a frame that is sent back
_QUALITY = 80
_REMEDY = "take fewer frames, make it smaller or shorter, or start the server with a higher --max-image-bytes or "
_REMEDY += "--max-image-pixels"


def read_videos(messages: list[dict[str, Any]], limits: ImageLimits) -> tuple[list[dict[str, Any]], list[Frames]]:
    """Reads the videos of messages that `read_messages` has checked.

    Args:
        messages: The messages. They stay as they are.
        limits: What frames may cost.

    Returns:
        The messages with frames in place of each Video, and these frames, in order.

    Raises:
        ImageTooLargeError: A video has more bytes or pixels than the server allows.
        ImageError: A video cannot be read.
        MissingDependencyError: One is a video file, and PyAV is not installed.
    """
    found: list[Frames] = []

    def read(part: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(part.get("video"), Video):
            return part
        try:
            found.append(read_video(part["video"], limits))
        except ImageTooLargeError as error:
            raise ImageTooLargeError(error.cause, _REMEDY) from error
        return {**part, "video": found[-1]}

    done = [
        {**m, "content": [read(part) for part in m["content"]]} if isinstance(m["content"], list) else m
        for m in messages
    ]
    return done, found


def pictures_in(messages: list[dict[str, Any]], images: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of messages that `read_videos` has read, in order: images by their names, and frames by names of
    their own.
    """
    found: dict[str, Any] = {}
    for part in (part for m in messages if isinstance(m["content"], list) for part in m["content"]):
        if part["type"] == "image_url":
            found[part["image_url"]["url"]] = images[part["image_url"]["url"]]
        elif part["type"] == "video":
            found |= {f"frame-{len(found) + i}": pixels for i, pixels in enumerate(part["video"].pictures)}
    return found


def frames_of(report: PruneReport, videos: Sequence[Frames]) -> list[dict[str, Any]]:
    """The frames of a request's videos, for the response.

    Args:
        report: Of the request.
        videos: The frames of its videos, in order.

    Returns:
        For each frame: picture, its index among the prompt's pictures; video, the index of its video; second, its time
        in seconds or None; same_as, the picture of an earlier frame of that video with the same pixels, or None; and
        url, a small JPEG as a data: URL.
    """
    pictures: dict[int, list[int]] = {}  # by video
    for image in report.images:
        if image.video is not None:
            of_video = pictures.setdefault(image.video, [])
            if image.picture not in of_video:
                of_video.append(image.picture)
    result = []
    for video, frames in enumerate(videos):
        first: dict[bytes, int] = {}  # by a hash of the pixels
        for i, (picture, pixels) in enumerate(zip(pictures.get(video, ()), frames.pictures)):
            about = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
            twin = first.setdefault(about, picture)
            same_as = None if twin == picture else twin
            second = frames.second(i)
            result.append(
                {"picture": picture, "video": video, "second": second, "same_as": same_as, "url": _small(pixels)}
            )
    return result


def _small(pixels: np.ndarray) -> str:
    """A small JPEG of a picture, as a data: URL."""
    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
