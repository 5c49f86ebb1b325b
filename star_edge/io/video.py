"""Frames of a video: from a list of pictures, a folder, an animated image, or a video file.

Video files need PyAV (`pip install "star-edge[video]"`). Nothing is downloaded, and a file may not refer to others.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np
import PIL.Image

from ..errors import ConfigError, ImageError, ImageTooLargeError, MissingDependencyError, quoted
from .image_bytes import read_bytes
from .image_limits import ImageLimits, check_size, reason_of, shown
from .images import ImageSource, load_image
from .pixels import FORMATS, from_pil

DEFAULT_COUNT = 8
MAX_FRAMES = 256
_FORMATS_OF_VIDEO = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,h264,hevc,ivf,m4v"
_FAR = 10.0  # seconds: farther ahead than that, looking for a key frame is quicker than decoding what lies between
_INSTALL = 'pip install "star-edge[video]"'


@dataclass(frozen=True)
class Video:
    """A video, or a series of pictures of one thing, as one of the images of a request.

    Its frames stand where the video is in the prompt, each with its time where the model's own template has times. They
    share one budget, and equal frames are encoded once.

    Attributes:
        source: A path, bytes, an open file or a `data:` URL of a video file or of an animated image (GIF, WebP, PNG); a
            folder of pictures, in the order of their names, numbers by value; or a list of pictures (`load_image`).
        count: Most frames. None: 8, or all that `rate` asks for, at most 256. They lie in the middle of parts of equal
            length.
        rate: Frames per second. None: as few as `count` says.
        source_rate: Frames per second of a folder or a list, which say nothing of time. None: unknown, and no times are
            written.

    Raises:
        ConfigError: A value cannot be used.
    """

    source: Any
    count: int | None = None
    rate: float | None = None
    source_rate: float | None = None

    def __post_init__(self) -> None:
        count: Any = self.count
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_FRAMES
        ):
            raise ConfigError(
                f"count={quoted(count)} is not 1 to {MAX_FRAMES} frames", "give a whole number in that range"
            )
        for name in ("rate", "source_rate"):
            value: Any = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= 1000):
                raise ConfigError(f"{name}={quoted(value)} is not a number in (0, 1000]", "give frames per second")
        if self.rate is not None and self._is_series and self.source_rate is None:
            raise ConfigError(
                f"rate={self.rate} needs to know how fast the pictures follow each other", "give source_rate too"
            )

    @property
    def _is_series(self) -> bool:
        """Whether it is pictures without times."""
        return isinstance(self.source, (list, tuple)) or _is_folder(self.source)


@dataclass(frozen=True)
class Frames:
    """The frames that were taken of a video.

    Attributes:
        pictures: Their pixels, (h, w, 3) uint8 each.
        seconds: Their times. None: unknown.
        duration: Seconds of the whole video. None: unknown.
    """

    pictures: tuple[np.ndarray, ...]
    seconds: tuple[float, ...] | None
    duration: float | None

    def second(self, i: int) -> float | None:
        """The time of frame i. None: unknown."""
        return None if self.seconds is None else self.seconds[i]

    def with_pictures(self, pictures: Sequence[np.ndarray]) -> Frames:
        """The same frames with other pixels, such as smaller ones."""
        return replace(self, pictures=tuple(pictures))


@dataclass(frozen=True)
class VideoFrame:
    """A frame as one of a prompt's images.

    Attributes:
        pixels: (h, w, 3) uint8.
        video: Index of its video in the prompt.
        second: Its time in the video. None: unknown.
    """

    pixels: np.ndarray
    video: int
    second: float | None = None


def read_video(video: Video, limits: ImageLimits = ImageLimits()) -> Frames:
    """Takes frames of a video.

    Args:
        video: The video.
        limits: What each frame may cost, and the encoded file unless it is on a disk. All frames together may have four
            times `limits.max_pixels`.

    Returns:
        At least one frame, in order of time.

    Raises:
        ImageTooLargeError: The video has more bytes or pixels than `limits` allows.
        ImageError: The source is no video, or cannot be read.
        MissingDependencyError: It is a video file, and PyAV is not installed.
    """
    source = video.source
    if isinstance(source, (list, tuple)):
        return _of_series(source, video, limits)
    if _is_folder(source):
        return _of_series(_in_folder(os.fsdecode(source)), video, limits)
    data, name = _open(source, limits)
    with data:
        animation = _animation(data)
        if animation is not None:
            return _of_animation(animation, name, video, limits)
        data.seek(0)
        return _of_file(data, name, video, limits)


# ---- which frames ----


def frame_times(duration: float, count: int | None, rate: float | None) -> list[float]:
    """Times of the frames that are taken, in seconds: the middles of parts of equal length."""
    n = DEFAULT_COUNT if count is None and rate is None else count or MAX_FRAMES
    if rate is not None:
        n = min(n, max(1, round(duration * rate)))
    return [(i + 0.5) * duration / n for i in range(n)]


def _at(times: Sequence[float], starts: Sequence[float]) -> list[int]:
    """Index of the frame that is shown at each of the times, each frame once."""
    shown_at = np.maximum(np.searchsorted(starts, np.asarray(times) + 1e-9, side="right") - 1, 0)
    return [int(i) for i in dict.fromkeys(shown_at.tolist())]


class _Budget:
    """Refuses frames that together have too many pixels."""

    def __init__(self, name: str, limits: ImageLimits) -> None:
        self.name, self.most, self.pixels = name, 4 * limits.max_pixels, 0

    def add(self, height: int, width: int) -> None:
        self.pixels += height * width
        if self.pixels > self.most:
            raise ImageTooLargeError(
                f"the frames of {self.name} have more than {self.most} pixels together",
                "take fewer frames, or make the video smaller",
            )


# ---- pictures one by one ----


def _is_folder(source: object) -> bool:
    return isinstance(source, (str, os.PathLike)) and not _is_url(source) and os.path.isdir(source)


def _is_url(source: object) -> bool:
    return isinstance(source, str) and re.match(r"\s*(data:|[a-z][a-z0-9+.-]+://)", source, re.IGNORECASE) is not None


def _in_folder(folder: str) -> list[ImageSource]:
    PIL.Image.init()
    endings = {ending for ending, kind in PIL.Image.registered_extensions().items() if kind in FORMATS}
    names = [n for n in os.listdir(folder) if os.path.splitext(n)[1].lower() in endings and not n.startswith(".")]
    if not names:
        raise ImageError(f"there is no picture in {shown(folder)}", "give a folder of PNG, JPEG, WebP, ... files")

    def by_value(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]

    return [os.path.join(folder, name) for name in sorted(names, key=by_value)]


def _of_series(sources: Sequence[ImageSource], video: Video, limits: ImageLimits) -> Frames:
    if not sources:
        raise ImageError("the video is an empty list", "give at least one picture")
    if any(isinstance(source, Video) for source in sources):
        raise ImageError("a video is a list with a video in it", "give a list of pictures")
    second = 1.0 / (video.source_rate or 1.0)
    starts = [i * second for i in range(len(sources))]
    chosen = _at(frame_times(len(sources) * second, video.count, video.rate), starts)
    budget = _Budget("the video", limits)
    pictures = []
    for i in chosen:
        pictures.append(load_image(sources[i], limits))
        budget.add(*pictures[-1].shape[:2])
    if video.source_rate is None:
        return Frames(tuple(pictures), None, None)
    return Frames(tuple(pictures), tuple(starts[i] for i in chosen), len(sources) * second)


# ---- encoded videos ----


def _open(source: object, limits: ImageLimits) -> tuple[BinaryIO, str]:
    """The encoded video, open for reading and seeking; and a short name of it for messages."""
    if isinstance(source, (str, os.PathLike)) and not _is_url(source):
        path = os.path.expanduser(os.fsdecode(source))
        if not os.path.isfile(path):
            reason = "is not a regular file" if os.path.exists(path) else "does not exist"
            raise ImageError(f"{shown(path)} {reason}", "give a video file, an animated image or a folder of pictures")
        try:
            return open(path, "rb"), shown(path)
        except OSError as error:
            raise ImageError(f"{shown(path)} cannot be read ({reason_of(error)})", "check its permissions") from error
    if isinstance(source, str) and source.lstrip()[:5].lower() == "data:":
        return io.BytesIO(_of_data_url(source.strip(), limits)), "what the data: URL holds"
    if isinstance(source, str):
        raise ImageError("a video is not downloaded", "fetch it first, and give its path or its bytes")
    data, name = read_bytes(source, limits)
    return io.BytesIO(data), name.replace("image", "video")


def _of_data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, text = url.partition(",")
    if not comma:
        raise ImageError("the data: URL of a video has no comma", "write data:video/mp4;base64,...")
    if len(text) > 4 * limits.max_bytes:
        raise ImageTooLargeError(
            f"a video is larger than the {limits.max_bytes} bytes allowed", "make it smaller, or raise max_bytes"
        )
    try:
        if head.lower().endswith(";base64"):
            data = base64.b64decode(re.sub(r"\s|%0A|%0D", "", text, flags=re.IGNORECASE), validate=True)
        else:
            data = urllib.parse.unquote_to_bytes(text)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the base64 text of a video is damaged ({reason_of(error)})", "encode it again") from error
    return read_bytes(data, limits)[0]


def _animation(data: BinaryIO) -> PIL.Image.Image | None:
    """An image, animated or not; None if it is none."""
    PIL.Image.init()
    try:
        return PIL.Image.open(data, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    except PIL.Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"a frame has too many pixels ({reason_of(error)})", "make it smaller") from error
    except Exception:  # Pillow raises all kinds of errors for what it does not know
        return None


def _of_animation(image: PIL.Image.Image, name: str, video: Video, limits: ImageLimits) -> Frames:
    check_size(image.width, image.height, name, limits)
    try:
        n = getattr(image, "n_frames", 1)
        starts, end = [], 0.0
        for i in range(n):
            image.seek(i)
            image.load()  # WebP's frames say how long they are shown only then
            starts.append(end)
            # Browsers show a frame that states less than 0.02 s for 0.1 s
            shown_for = float(image.info.get("duration") or 0) / 1000
            end += shown_for if shown_for >= 0.02 else 0.1
        budget = _Budget(name, limits)
        pictures = []
        chosen = _at(frame_times(end, video.count, video.rate), starts)
        for i in chosen:
            budget.add(image.height, image.width)
            image.seek(i)
            pictures.append(from_pil(image.copy(), name, limits))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded ({reason_of(error)})", "save it again") from error
    return Frames(tuple(pictures), tuple(starts[i] for i in chosen), end)


def _of_file(data: BinaryIO, name: str, video: Video, limits: ImageLimits) -> Frames:
    try:
        import av
    except ImportError:
        raise MissingDependencyError(f"{name} is no animated image, and video files need PyAV", _INSTALL) from None
    try:
        # The data come from Python alone: a playlist that names other files or addresses is no format of the list
        options = {"format_whitelist": _FORMATS_OF_VIDEO, "protocol_whitelist": "none"}
        with av.open(data, options=options) as container:
            if not container.streams.video:
                raise ImageError(f"{name} has no pictures in it", "give a video")
            return _of_container(container, name, video, limits)
    except ImageError:
        raise
    except Exception as error:  # PyAV raises its own, and ValueError and OSError
        raise ImageError(
            f"{name} cannot be read as a video ({reason_of(error)})", "give a video file such as MP4, WebM or MKV"
        ) from error


def _of_container(container: Any, name: str, video: Video, limits: ImageLimits) -> Frames:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    check_size(stream.codec_context.width, stream.codec_context.height, name, limits)
    start, duration = _extent(container, stream)
    budget = _Budget(name, limits)
    found: dict[float, np.ndarray] = {}
    ahead: Iterator[Any] = container.decode(stream)
    shown_now: Any = None  # the newest frame that is not after the time looked for
    following = next(ahead, None)
    for time in frame_times(duration, video.count, video.rate):
        if following is not None and time - (following.time - start) > _FAR:
            container.seek(int((start + time) / stream.time_base), stream=stream)
            ahead = container.decode(stream)
            following = next(ahead, None)
        while following is not None and (shown_now is None or following.time - start <= time + 1e-6):
            shown_now, following = following, next(ahead, None)
        if shown_now is None:
            break
        at = max(0.0, float(shown_now.time) - start)
        if at not in found:
            check_size(shown_now.width, shown_now.height, name, limits)
            budget.add(shown_now.height, shown_now.width)
            found[at] = _upright(shown_now)
    if not found:
        raise ImageError(f"{name} has no frame that can be decoded", "check that it is complete")
    return Frames(tuple(found.values()), tuple(found), duration)


def _extent(container: Any, stream: Any) -> tuple[float, float]:
    """When the video begins, and how long it is, in seconds. Where the file does not say, its packets are counted."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start, float(stream.duration * stream.time_base)
    if container.duration:
        return start, container.duration / 1_000_000
    ends = [
        float((packet.pts + (packet.duration or 0)) * stream.time_base)
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    container.seek(0)
    return start, max(max(ends, default=0.0) - start, 1e-3)


def _upright(frame: Any) -> np.ndarray:
    """The pixels of a frame, turned as its display matrix says: phones film upright pictures sideways."""
    pixels = cast(np.ndarray, frame.to_ndarray(format="rgb24"))
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
