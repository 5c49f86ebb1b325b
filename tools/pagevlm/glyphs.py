"""Draws glyphs.npz, the bitmaps that pictures are put together from: letters in several faces and sizes, and shapes.

python tools/pagevlm/glyphs.py [--fonts DIRECTORY OF DEJAVU FONTS]

The file is in the repository: it is drawn again only to change the glyphs. A cell is 7 x 14 pixels, so that a patch of
14 x 14 is two cells. Letters are 5 to 7 pixels wide and 7 to 11 high.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from vocabulary import SHAPES, SYMBOLS

CELL_WIDTH, CELL_HEIGHT = 7, 14
FILE = Path(__file__).with_name("glyphs.npz")
FACES = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
SIZES = ((5, 7), (5, 8), (6, 9), (6, 11))  # width and height of a capital letter in pixels
_FINE = 16  # a glyph is drawn so many times larger, then averaged


def letter(font: ImageFont.FreeTypeFont, symbol: str, size: tuple[int, int]) -> np.ndarray:
    """One symbol, (14, 7) uint8 of ink, at the top left of the cell with a free pixel above. Wide letters are
    squeezed.
    """
    width, height = size
    cell = np.zeros((CELL_HEIGHT, CELL_WIDTH), np.uint8)
    if symbol == " ":
        return cell
    top, bottom = font.getbbox("H")[1], font.getbbox("H")[3]
    left, _, right, own_bottom = font.getbbox(symbol)
    natural = (right - left) / (font.getbbox("H")[2] - font.getbbox("H")[0])
    own = max(1, min(width, round(natural * width))) if natural < 0.75 else width
    scale = (bottom - top) / height
    low = max(0, math.ceil((own_bottom - bottom) / scale)) if own_bottom > bottom else 0
    image = Image.new("L", (right - left, round(scale * (height + low))), 0)
    ImageDraw.Draw(image).text((-left, -top), symbol, fill=255, font=font)
    small = np.asarray(image.resize((own, height + low), Image.Resampling.BOX), float)
    small = np.clip(small * 1.35, 0, 255)  # thin strokes lose ink to averaging
    x = (width - own) // 2
    h = min(small.shape[0], CELL_HEIGHT - 1)
    cell[1 : 1 + h, x : x + own] = small[:h]
    return cell


def shape(name: str, size: int) -> np.ndarray:
    """A filled shape, (size, size) uint8."""
    n = size * _FINE
    image = Image.new("L", (n, n), 0)
    d = ImageDraw.Draw(image)
    a, b, m = n * 0.06, n * 0.94, n / 2

    def polygon(*points: tuple[float, float]) -> None:
        d.polygon([(x * n, y * n) for x, y in points], fill=255)

    if name == "DISK":
        d.ellipse((a, a, b, b), fill=255)
    elif name == "BOX":
        d.rectangle((a * 1.6, a * 1.6, n - a * 1.6, n - a * 1.6), fill=255)
    elif name == "RING":
        d.ellipse((a, a, b, b), fill=255)
        d.ellipse((n * 0.3, n * 0.3, n * 0.7, n * 0.7), fill=0)
    elif name == "MOON":
        d.ellipse((a, a, b, b), fill=255)
        d.ellipse((n * 0.36, -n * 0.02, n * 1.1, n * 0.72), fill=0)
    elif name == "CROSS":
        d.rectangle((n * 0.36, a, n * 0.64, b), fill=255)
        d.rectangle((a, n * 0.36, b, n * 0.64), fill=255)
    elif name == "STAR":
        points = []
        for i in range(10):
            radius = n * (0.48 if i % 2 == 0 else 0.19)
            angle = math.pi * (i / 5 - 0.5)
            points.append((m + radius * math.cos(angle), m + radius * math.sin(angle)))
        d.polygon(points, fill=255)
    elif name == "ARROW":
        polygon((0.5, 0.04), (0.95, 0.52), (0.66, 0.52), (0.66, 0.96), (0.34, 0.96), (0.34, 0.52), (0.05, 0.52))
    elif name == "HEART":
        d.ellipse((n * 0.04, n * 0.08, n * 0.53, n * 0.55), fill=255)
        d.ellipse((n * 0.47, n * 0.08, n * 0.96, n * 0.55), fill=255)
        polygon((0.07, 0.42), (0.93, 0.42), (0.5, 0.96))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype/dejavu"))
    args = parser.parse_args()
    letters = []
    for face in FACES:
        font = ImageFont.truetype(str(args.fonts / f"{face}.ttf"), 160)
        for size in SIZES:
            letters.append(np.stack([letter(font, s, size) for s in SYMBOLS]))
    small = np.stack([shape(s, 14) for s in SHAPES])
    large = np.stack([shape(s, 28) for s in SHAPES])
    np.savez_compressed(FILE, letters=np.stack(letters), small=small, large=large)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
