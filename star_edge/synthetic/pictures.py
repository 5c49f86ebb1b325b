"""Generated pictures for benchmarks, the same on every run: what pruning gains before the encoder depends on them.

Each function takes (width, height) in pixels and gives (height, width, 3) uint8.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LETTERS = "etaoinshrdlucmfwypvbgk"  # by how frequent they are in English
_WEIGHTS = (12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 1, 1, 2, 1)


def blocks(width: int, height: int) -> np.ndarray:
    """Squares of random colours at three scales. Nearly no two units are equal."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for n in (3, 12, 48):
        block = rng.integers(0, 256, (n, n, 3))
        image += block[np.arange(height)[:, None] * n // height, np.arange(width)[None] * n // width]
    return (image / 3).astype(np.uint8)


def photo(width: int, height: int, seed: int = 1) -> np.ndarray:
    """Discs that hide each other, their sizes by a power law, each textured, in uneven light, with the sensor's noise.

    Such "dead leaves" have the edges, the sizes and the spectrum of natural images (Lee, Mumford and Huang, 2001).
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = np.full((height, width, 3), 120, np.float32)
    side = min(width, height)
    for _ in range(220):  # from the back to the front
        radius = side * min(0.5, 0.02 * rng.uniform(0.02, 1) ** -0.7)
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        left, right = max(0, int(cx - radius)), min(width, int(cx + radius) + 2)
        top, bottom = max(0, int(cy - radius)), min(height, int(cy + radius) + 2)
        if left >= right or top >= bottom:
            continue
        part = np.s_[top:bottom, left:right]
        dx, dy = x[part] - cx, y[part] - cy
        inside = dx**2 + dy**2 <= radius**2
        angle, length = rng.uniform(0, np.pi), rng.uniform(4, 40)
        waves = np.sin((dx * np.cos(angle) + dy * np.sin(angle)) * 2 * np.pi / length)
        shade = 1 - 0.3 * (dx + dy) / (2 * radius)
        color = rng.uniform(20, 235, 3).astype(np.float32)
        image[part][inside] = ((color + 18 * waves[..., None]) * shade[..., None])[inside]
    light = 0.75 + 0.35 * x / width + 0.15 * np.cos(3 * y / height)
    image = image * light[..., None] + rng.normal(0, 3, image.shape)
    pixels: np.ndarray = np.clip(image, 0, 255).astype(np.uint8)
    return pixels


def page(width: int, height: int) -> np.ndarray:
    """A page of black text on white: a heading, paragraphs, a table and a chart, with margins."""
    rng = random.Random(2)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    size = max(6, round(min(width, height) / 60))
    left, right, line = width * 8 // 100, width - width * 8 // 100, round(1.5 * size)
    y = height * 7 // 100
    _line(draw, rng, left, y, (right - left) * 2 // 3, 2 * size, "black")
    y += 4 * line
    for paragraph in range(3):
        for i in range(6):
            end = right if i < 5 else left + (right - left) * 2 // 5
            _line(draw, rng, left, y, end - left, size, "black")
            y += line
        y += line
        if paragraph == 1:
            y = _table(draw, rng, (left, y, right), size) + line
    bottom = height * 93 // 100
    for i in range(8):  # a bar chart in what is left
        x = left + (right - left) * i // 8
        tall = (bottom - y) * rng.randint(20, 100) // 100
        _box(draw, x, bottom - tall, x + (right - left) // 14, bottom, "#3b6ea5")
    draw.line((left, bottom, right, bottom), fill="black")
    return np.asarray(canvas)


def screenshot(width: int, height: int) -> np.ndarray:
    """A window of a mail program: a title bar, a dark side bar, a list with one line selected, and a message."""
    rng = random.Random(3)
    canvas = Image.new("RGB", (width, height), "#f5f6f8")
    draw = ImageDraw.Draw(canvas)
    size = max(6, round(min(width, height) / 64))
    bar, side, column = 3 * size, width * 18 // 100, width * 48 // 100
    _box(draw, 0, 0, width, bar, "#dfe3e8")
    for i, color in enumerate(("#e0443e", "#dea123", "#1aab29")):
        draw.ellipse((size + 2 * size * i, size, 2 * size + 2 * size * i, 2 * size), fill=color)
    _line(draw, rng, side, size, column - side, size, "#303030")
    _box(draw, 0, bar, side, height, "#22303c")
    for i in range(9):
        top = bar + 2 * size + 3 * size * i
        _box(draw, size, top, 2 * size, top + size, "#8aa4b8")
        _line(draw, rng, 3 * size, top, side - 5 * size, size, "#c8d4dd")
    draw.line((column, bar, column, height), fill="#c8ccd2")
    for i in range(max(1, (height - bar) // (5 * size))):
        top = bar + 5 * size * i
        if i == 1:
            _box(draw, side, top, column - 1, top + 5 * size, "#cfe3fb")
        _line(draw, rng, side + size, top + size // 2, (column - side) // 2, size, "black")
        _line(draw, rng, side + size, top + 2 * size + size // 2, column - side - 3 * size, size, "#707070")
        draw.line((side, top + 5 * size, column, top + 5 * size), fill="#e3e6ea")
    _line(draw, rng, column + 2 * size, bar + 2 * size, (width - column) * 2 // 3, 2 * size, "black")
    for i in range(9):
        long = width - column - 4 * size if i % 5 != 4 else (width - column) // 3
        _line(draw, rng, column + 2 * size, bar + 7 * size + 2 * size * i, long, size, "#202020")
    _box(draw, column + 2 * size, height - 5 * size, column + 10 * size, height - 2 * size, "#2a6fdb")
    return np.asarray(canvas)


def _box(draw: ImageDraw.ImageDraw, left: int, top: int, right: int, bottom: int, color: str) -> None:
    if left <= right and top <= bottom:  # a picture may be too small for it
        draw.rectangle((left, top, right, bottom), fill=color)


def _line(draw: ImageDraw.ImageDraw, rng: random.Random, x: int, y: int, width: int, size: int, color: str) -> None:
    """A line of words that are none, as long as fits."""
    font = ImageFont.load_default(size)
    text = ""
    while True:
        word = "".join(rng.choices(_LETTERS, _WEIGHTS, k=rng.choice((2, 3, 3, 4, 5, 6, 8))))
        longer = f"{text} {word}" if text else word
        if font.getlength(longer) > width:
            break
        text = longer
    draw.text((x, y), text, fill=color, font=font)


def _table(draw: ImageDraw.ImageDraw, rng: random.Random, place: tuple[int, int, int], size: int) -> int:
    """A ruled table of numbers. place: (left, top, right). Returns where it ends."""
    left, y, right = place
    font, row, n_columns = ImageFont.load_default(size), 2 * size, 5
    for _ in range(5):
        draw.line((left, y, right, y), fill="black")
        for i in range(n_columns):
            x = left + (right - left) * i // n_columns
            draw.text((x + size // 2, y + size // 3), f"{rng.randint(10, 99999) / 100:.2f}", fill="black", font=font)
        y += row
    draw.line((left, y, right, y), fill="black")
    return y


PICTURES: dict[str, Callable[[int, int], np.ndarray]] = {
    "blocks": blocks,
    "photo": photo,
    "page": page,
    "screenshot": screenshot,
}
PICTURE_TITLES = {"blocks": "squares", "photo": "a photo", "page": "a page of text", "screenshot": "a screenshot"}
DEFAULT_PICTURE = "blocks"
