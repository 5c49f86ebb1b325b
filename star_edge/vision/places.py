"""Where the images that a model gets of a picture lie on it: all of it, padded or not, or an overview and tiles.

Each family scales, pads and cuts pictures by a rule of its own (libmtmd's mtmd-image.cpp), and the rules change with
versions. They are not written down here a second time: libmtmd is given a picture of the same size whose colours say
where each of its pixels lies, and what the encoder would get of it is read. Nothing is encoded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import EngineError, StarEdgeError
from ..llamacpp.mtmd import MEDIA_MARKER
from ..llamacpp.names import PIXELS
from ..llamacpp.tap import Plan
from .chunks import ImageChunk
from .encoder import VisionEncoder

_KEPT = 64  # sizes whose places are remembered
_INNER = 0.8  # middle part of an image that the fit uses: at a picture's edges filters bend the ramp
_MARKED = 0.98  # blue of a pixel that shows the picture. No padding of libmtmd is so blue
_STEP = 1 / 255  # what one level of 8 bits is


class Place(NamedTuple):
    """What an image shows, as a part of its picture.

    Each is a fraction of the picture's height or width. An image that is padded reaches over the picture's edges: below
    0, or over 1.
    """

    top: float
    left: float
    bottom: float
    right: float


class Places:
    """Places for one encoder, which must outlive it. Not for several threads at a time."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self._of_size: dict[tuple[int, int], list[Place | None]] = {}
        self._scale: tuple[np.ndarray, np.ndarray] | None = None

    def of(self, height: int, width: int) -> list[Place | None]:
        """The place of each image that the encoder gets of a picture of that size, in the order of the prompt.

        None for one that is no single rectangle of the picture (some models stack the tiles of a row), that shows
        nothing but padding, or whose pixels cannot be read.

        Args:
            height: Pixels of the picture.
            width: The same.

        Raises:
            ImageError: The encoder cannot take that shape.
            EngineClosedError: The encoder is closed.
        """
        if (height, width) not in self._of_size:
            places = self._measure(height, width)
            if len(self._of_size) >= _KEPT:
                del self._of_size[next(iter(self._of_size))]
            self._of_size[height, width] = places
        return self._of_size[height, width]

    def _measure(self, height: int, width: int) -> list[Place | None]:
        if self._scale is None:
            self._scale = self._normalization()
        low, high = self._scale
        images = self._look(_map_of(height, width))
        unit = [None if pixels is None else (pixels - low) / (high - low) for pixels in images]
        return [None if pixels is None else locate(pixels, height, width) for pixels in unit]

    def _normalization(self) -> tuple[np.ndarray, np.ndarray]:
        """What black and white are for the encoder, (3, 1, 1) float32 each."""
        ends = []
        for value in (0, 255):
            pixels = self._look(np.full((64, 64, 3), value, np.uint8))[0]
            if pixels is None:
                raise EngineError("the pixels that the encoder gets cannot be read")
            ends.append(pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].reshape(3, 1, 1).copy())
        if (ends[0] == ends[1]).any():
            raise EngineError("the encoder's pixels do not tell black from white")
        return ends[0], ends[1]

    def _look(self, picture: np.ndarray) -> list[np.ndarray | None]:
        """What the encoder would get of a picture, (3, h, w) float32 for each image, or None."""
        prompt = self._encoder.tokenize(MEDIA_MARKER, [picture])
        try:
            return [self._pixels(chunk) for chunk in prompt.chunks if isinstance(chunk, ImageChunk)]
        finally:
            prompt.close()

    def _pixels(self, chunk: ImageChunk) -> np.ndarray | None:
        if chunk.size is None:
            return None
        pixels = np.empty((3, *chunk.size), np.float32)
        try:
            with self._encoder.tap.watching(PIXELS, pixels):
                self._encoder.run(chunk, Plan(count_only=True))
        except EngineError:
            return None
        return pixels if self._encoder.tap.watched() == pixels.nbytes else None


def _map_of(height: int, width: int) -> np.ndarray:
    """A picture whose red says how far to the right a pixel is, and whose green how far down. Its blue is full."""
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[:, :, 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    picture[:, :, 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    return picture


def locate(pixels: np.ndarray, height: int, width: int) -> Place | None:
    """The place of an image of a map, (3, h, w) float32 in 0..1. None: it is no rectangle of the picture.

    height, width: of the picture, in pixels.
    """
    shown = pixels[2] > _MARKED
    if not shown.any():
        return None
    across = _line(_means(pixels[0], shown, 0), width)
    down = _line(_means(pixels[1], shown, 1), height)
    return None if across is None or down is None else Place(down[0], across[0], down[1], across[1])


def _means(values: np.ndarray, shown: np.ndarray, axis: int) -> np.ndarray:
    """Means over the pixels along an axis that show the picture, nan where none does."""
    counts = shown.sum(axis)
    sums = np.where(shown, values, 0).sum(axis, dtype=np.float64)
    means: np.ndarray = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means


def _line(values: np.ndarray, n: int) -> tuple[float, float] | None:
    """Where an image begins and ends on a picture of n pixels, from the coordinates that its pixels show.

    None: they do not lie on a line that rises.
    """
    at = np.flatnonzero(~np.isnan(values))
    trim = int(len(at) * (1 - _INNER) / 2)
    at = at[trim : len(at) - trim]
    if len(at) < 2:
        return None
    centres = at + 0.5
    slope, start = np.polyfit(centres, values[at], 1)
    # The filter of a picture that is made larger may repeat pixels: steps of a pixel, or of a level of 8 bits
    tolerance = 1.5 * max(_STEP, 1 / n, slope)
    if slope <= 0 or np.abs(slope * centres + start - values[at]).max() > tolerance:
        return None
    return float(start), float(start + slope * len(values))


def places_or_none(places: Places, height: int, width: int, n_images: int) -> list[Place | None]:
    """As `Places.of`, with None for each of the n images of a picture if places cannot be told."""
    try:
        found = places.of(height, width)
    except StarEdgeError:
        found = []
    return found if len(found) == n_images else [None] * n_images
