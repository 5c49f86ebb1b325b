"""How many image tokens a picture takes at a size, and the size at which it takes no more than a number of them.

Families scale and cut pictures in ways of their own. What libmtmd makes of a blank picture of a size says it for all of
them, without encoding: it takes a millisecond to some tens of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image

from ..errors import ImageError
from ..llamacpp.mtmd import MEDIA_MARKER
from ..pruning.config import Keep
from .chunks import ImageChunk
from .encoder import VisionEncoder

_TINY = 32  # pixels along the longer side of the smallest picture that is tried
_STEPS = 12
_CLOSE = 1.02  # between a side that fits and one that does not
_LOOKS = 6  # at a picture's pixels, which costs more than a size
_LOOKS_CLOSE = 1.04
_KEPT = 256  # sizes whose counts are remembered


@dataclass(frozen=True)
class FittedSize:
    """What a picture takes.

    n_full: image tokens at its own size, None if the encoder cannot take that.
    most: tokens that it should take at most.
    is_smaller: whether it was made smaller.
    """

    n_full: int | None
    most: int
    is_smaller: bool


@dataclass(frozen=True)
class Fitted:
    """A picture as a request gets it, (h, w, 3) uint8. size: None where nobody asked for a smaller one."""

    pixels: np.ndarray
    size: FittedSize | None = None


class Resolution:
    """Sizes of pictures for one encoder, which must outlive it."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self._counts: dict[tuple[int, int], int] = {}

    def count(self, height: int, width: int) -> int:
        """Image tokens of a picture of that size, in pixels; of all its crops, special tokens included.

        Raises:
            ImageError: The encoder cannot take that shape.
            EngineClosedError: The encoder is closed.
        """
        if (height, width) not in self._counts:
            prompt = self._encoder.tokenize(MEDIA_MARKER, [np.zeros((height, width, 3), np.uint8)])
            try:
                n = sum(chunk.n_tokens for chunk in prompt.chunks if isinstance(chunk, ImageChunk))
            finally:
                prompt.close()
            if len(self._counts) >= _KEPT:
                del self._counts[next(iter(self._counts))]
            self._counts[height, width] = n
        return self._counts[height, width]

    def fit(self, pixels: np.ndarray, most: Keep, entering: Callable[[np.ndarray], int] | None = None) -> Fitted:
        """The picture, made smaller if it takes more than `most` tokens; the largest that was found to take no more.

        Where no size takes so few, because the model makes as many of any picture or cuts it into crops of a fixed
        number, it is as small as helps.

        Args:
            pixels: (h, w, 3) uint8.
            most: A share of the tokens that it takes at its own size, or a count, as in PruneConfig.image_max_tokens.
            entering: How many tokens of a picture, (h, w, 3) uint8, enter the encoder. None: all of them. With it
                those that enter are counted, so a picture with much that is redundant stays larger.

        Returns:
            The picture, `pixels` itself where it fits or where a smaller one takes as many.

        Raises:
            ImageError: The encoder cannot take its shape, and `most` is a share.
        """
        height, width = pixels.shape[:2]
        if isinstance(most, int):
            n, goal = self._count_or_none(height, width), most
        else:
            n = self.count(height, width)
            goal = max(1, math.floor(most * n + 0.5))
        if n is not None and n <= goal:
            return Fitted(pixels, FittedSize(n, goal, False))
        if entering is not None and n is not None:
            count = entering(pixels)
            if count <= goal:
                return Fitted(pixels, FittedSize(n, goal, False))
            if n > count * _CLOSE**2:  # otherwise next to nothing is redundant, and no larger picture would do
                larger = self._larger(pixels, n, count, goal, entering)
                if larger is not None:
                    return Fitted(larger, FittedSize(n, goal, True))
        reachable = max(goal, self._least(height, width))
        size = self._largest(height, width, n, reachable) if n is None or n > reachable else None
        if size is None:
            return Fitted(pixels, FittedSize(n, goal, False))
        return Fitted(_resized(pixels, size), FittedSize(n, goal, True))

    def _larger(
        self, pixels: np.ndarray, n: int, count: int, goal: int, entering: Callable[[np.ndarray], int]
    ) -> np.ndarray | None:
        """The largest picture found of which at most `goal` tokens enter the encoder, or None.

        n: tokens of the picture itself. count: those of them that enter, more than `goal`.
        """
        height, width = pixels.shape[:2]
        best, fits, too_large = None, 0.0, 1.0
        seen = {n: count}  # by the tokens of a size: sizes of one grid show nearly the same
        scale = 1.0
        for _ in range(_LOOKS):
            if too_large <= fits * _LOOKS_CLOSE:
                break
            scale *= math.sqrt(goal / count)  # as if what enters grew with the area
            if not fits * _CLOSE <= scale <= too_large / _CLOSE:
                scale = math.sqrt(fits * too_large) if fits else too_large * 0.9
            size = _scaled(height, width, scale)
            tokens = self._count_or_none(*size)
            if tokens is None:
                return best
            if tokens not in seen:
                tried = _resized(pixels, size)
                seen[tokens] = entering(tried)
                best = tried if seen[tokens] <= goal else best
            count = seen[tokens]
            fits, too_large = (scale, too_large) if count <= goal else (fits, scale)
        return best

    def _least(self, height: int, width: int) -> int:
        """Tokens of the smallest picture of that shape; 0 if the encoder cannot take it."""
        return self._count_or_none(*_scaled(height, width, min(1.0, _TINY / max(height, width)))) or 0

    def _largest(self, height: int, width: int, n: int | None, goal: int) -> tuple[int, int] | None:
        """The largest size found that takes at most `goal` tokens, None if none was found.

        n: tokens at full size, None if the encoder cannot take that.

        Tokens grow with the area, but in steps, and crops of some models in no order: what is tried is what counts.
        """
        fits, too_large = 0.0, 1.0
        best: tuple[int, int] | None = None
        scale = 0.9 if n is None else math.sqrt(goal / n)
        for _ in range(_STEPS):
            size = _scaled(height, width, scale)
            count = self._count_or_none(*size)
            if count is not None and count <= goal:
                best, fits = size, scale
            else:
                too_large = scale
            if not fits:
                scale = too_large * 0.9
            elif too_large == 1.0:
                scale = min(fits * 1.08, math.sqrt(fits))
            elif too_large <= fits * _CLOSE:
                break
            else:
                scale = math.sqrt(fits * too_large)
        return best

    def _count_or_none(self, height: int, width: int) -> int | None:
        try:
            return self.count(height, width)
        except ImageError:  # of a shape that rounding made, such as one pixel high
            return None


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = PIL.Image.fromarray(pixels).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    return np.ascontiguousarray(picture, np.uint8)


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, round(height * scale)), max(1, round(width * scale))
