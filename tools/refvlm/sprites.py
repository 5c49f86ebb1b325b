"""What scenes are made of: anti-aliased masks of shapes, digits and number plates, and textured backgrounds.

Everything is drawn from a generator that the caller seeds. Masks are float32 arrays (height, width) in [0, 1].
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from vocabulary import DIGITS, SHAPES

_OVERSAMPLE = 4  # masks are drawn this much larger and averaged down
_FONT_FILES = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
_PLATE_FONTS = _FONT_FILES[:2]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib ships these fonts, so that every machine draws the same glyphs. Its import is late: only text needs it.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _regular_polygon(n_corners: int, degrees: float, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners on the unit circle; with `inner` < 1 every second one lies on a circle of that radius."""
    start, step = math.radians(degrees), 2 * math.pi / n_corners
    radii = [1.0 if i % 2 == 0 else inner for i in range(n_corners)]
    return [(r * math.cos(start + i * step), r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    """The classical parametric heart, scaled into the unit square."""
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(x / 16.5, -y / 16.5))


def draw_shape(kind: str, size: int, degrees: float) -> np.ndarray:
    """Mask (size, size) of a shape, turned by some degrees where turning shows."""
    n = size * _OVERSAMPLE
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    centre, radius = (n - 1) / 2, n / 2 - 2

    def ellipse(scale: float, fill: int) -> None:
        r = radius * scale
        draw.ellipse((centre - r, centre - r, centre + r, centre + r), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(centre + radius * x, centre + radius * y) for x, y in points], fill=255)

    if kind == "circle":
        ellipse(0.95, 255)
    elif kind == "ring":
        ellipse(1.0, 255)
        ellipse(0.52, 0)
    elif kind == "square":
        polygon([(1.15 * x, 1.15 * y) for x, y in _regular_polygon(4, degrees + 45)])
    elif kind == "triangle":
        polygon([(x, y + 0.15) for x, y in _regular_polygon(3, degrees - 90)])
    elif kind == "star":
        polygon(_regular_polygon(10, degrees - 90, inner=0.42))
    elif kind == "cross":
        arm = 0.30 * radius
        draw.rectangle((centre - radius, centre - arm, centre + radius, centre + arm), fill=255)
        draw.rectangle((centre - arm, centre - radius, centre + arm, centre + radius), fill=255)
        image = image.rotate(degrees, resample=Image.Resampling.BILINEAR)
    elif kind == "heart":
        polygon(_heart())
    else:
        raise ValueError(f"unknown shape: {kind}")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def draw_text(text: str, size: int, font_name: str) -> np.ndarray:
    """Mask of a line of text with two pixels of margin; its size follows from the font."""
    k = _OVERSAMPLE
    font = _font(font_name, size * k)
    left, top, right, bottom = font.getbbox(text)
    width, height = (math.ceil((extent + 4 * k) / k) for extent in (right - left, bottom - top))
    image = Image.new("L", (width * k, height * k), 0)
    ImageDraw.Draw(image).text((2 * k - left, 2 * k - top), text, fill=255, font=font)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32) / 255


class SpriteBank:
    """All masks that one split uses: `n_variants` of each shape and digit, two of each two-digit number."""

    def __init__(self, rng: np.random.Generator, n_variants: int):
        self._objects = {
            kind: [draw_shape(kind, int(rng.integers(17, 25)), rng.uniform(-16, 16)) for _ in range(n_variants)]
            for kind in SHAPES
        }
        for digit in DIGITS:
            self._objects[digit] = [
                draw_text(digit, int(rng.integers(22, 29)), _FONT_FILES[i % 3]) for i in range(n_variants)
            ]
        self._numbers = {
            (a, b): [draw_text(f"{a}{b}", int(rng.integers(17, 20)), font) for font in _PLATE_FONTS]
            for a in range(10)
            for b in range(10)
        }

    def object(self, kind: str, rng: np.random.Generator) -> np.ndarray:
        variants = self._objects[kind]
        return variants[rng.integers(len(variants))]

    def plate(self, digits: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Text mask of a plate that shows two-digit numbers side by side."""
        font = rng.integers(len(_PLATE_FONTS))
        numbers = [self._numbers[digits[i], digits[i + 1]][font] for i in range(0, len(digits), 2)]
        height = max(mask.shape[0] for mask in numbers)
        padded = [np.pad(mask, ((0, height - mask.shape[0]), (2, 2))) for mask in numbers]
        return np.pad(np.concatenate(padded, axis=1), ((2, 2), (0, 0)))


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Smooth noise (size, size) with about `cells` bumps along each side."""
    coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Texture (size, size, 3), float32 in [0, 255]: grey and coloured noise, perhaps stripes, perhaps clutter lines."""
    image = np.full((size, size, 3), rng.uniform(70, 175), np.float32)
    for cells, amplitude in ((4, 28), (10, 22), (30, 16)):
        image += _noise(rng, cells, size)[..., None] * np.float32(amplitude * rng.uniform(0.4, 1.1))
        image += np.stack([_noise(rng, cells, size) for _ in range(3)], -1) * np.float32(amplitude * 0.4)
    if rng.random() < 0.5:
        y, x = np.mgrid[:size, :size]
        angle, period, amplitude = rng.uniform(0, np.pi), rng.uniform(6, 30), rng.uniform(5, 18)
        image += (np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period) * amplitude)[..., None].astype(
            np.float32
        )
    if rng.random() < 0.5:
        lines = Image.new("L", (size, size), 0)
        draw = ImageDraw.Draw(lines)
        for _ in range(int(rng.integers(10, 40))):
            x, y = (int(v) for v in rng.integers(0, size, 2))
            dx, dy = (int(v) for v in rng.integers(-40, 40, 2))
            draw.line((x, y, x + dx, y + dy), fill=int(rng.integers(60, 255)), width=int(rng.integers(1, 3)))
        image += (np.asarray(lines, np.float32) * np.float32(rng.choice([-0.15, 0.15])))[..., None]
    image += rng.normal(0, rng.uniform(2, 7), (size, size, 1)).astype(np.float32)
    return np.clip(image, 0, 255)
