"""Panels that overlays are made of: pixels under grids, titles, colour scales, and sheets of panels.

Knows arrays of pixels and values, and nothing of what the values mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

MIN_SHORT_SIDE = 336  # pixels; smaller images are enlarged by an integer factor
MAX_LONG_SIDE = 1024  # pixels; larger images are shrunk
MIN_COLUMN_WIDTH = 160  # pixels; leaves room for a title under a very narrow image
MARGIN = 12  # pixels around and between panels
TITLE_HEIGHT = 34  # pixels below each panel
LEGEND_WIDTH = 96  # pixels right of a heatmap

Region = tuple[float, float, float, float]  # top, left, bottom, right, as fractions of a picture; padding lies outside
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)

BACKGROUND = (250, 250, 250)
_TEXT = (30, 30, 30)
_LINE = (255, 176, 0)
_KEPT, _DROPPED = (
    np.array((255, 224, 150), np.float32),
    np.array((70, 70, 80), np.float32),
)  # cells that are drawn without pixels
_TILE_LINE = (90, 170, 255)  # between tiles
PADDING = 118  # grey of what lies outside the picture
_GAP = 6  # pixels between crops whose places are unknown
_TITLE_SIZES = (18, 16, 14, 12, 11)
_HEADER_LINES, _HEADER_LEADING = 4, 22  # pixels from line to line
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# Dark violet through red and orange to pale yellow: lightness rises evenly, so the order also survives in print and for
# colour-blind readers.
_COLOURS = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ],
    dtype=np.float32,
)


# --- panels ---


class Canvas:
    """A picture with the padding around it that its images show, in the size in which it is drawn."""

    def __init__(self, image: np.ndarray, regions: Sequence[Region]) -> None:
        height, width = image.shape[:2]
        self._size = (height, width)
        self._top = max((_over(-r[0], height) for r in regions), default=0)
        self._left = max((_over(-r[1], width) for r in regions), default=0)
        below = max((_over(r[2] - 1, height) for r in regions), default=0)
        right = max((_over(r[3] - 1, width) for r in regions), default=0)
        padded = np.full((self._top + height + below, self._left + width + right, 3), PADDING, np.uint8)
        padded[self._top : self._top + height, self._left : self._left + width] = image
        self._padded = padded.shape
        self.pixels = fit(padded)

    def _edges(self, region: Region) -> tuple[float, float, float, float]:
        """The region in pixels of what is drawn: top, left, bottom, right."""
        (height, width), (rows, columns) = self._size, self.pixels.shape[:2]
        down, across = rows / self._padded[0], columns / self._padded[1]
        top, left, bottom, right = region
        return (
            (top * height + self._top) * down,
            (left * width + self._left) * across,
            (bottom * height + self._top) * down,
            (right * width + self._left) * across,
        )

    def spread(self, pieces: Sequence[tuple[Region, np.ndarray | None]], elsewhere: float) -> np.ndarray:
        """Each pixel's value: that of the cell which its centre falls into, (h, w) float32."""
        height, width = self.pixels.shape[:2]
        values = np.full((height, width), elsewhere, np.float32)
        for region, grid in pieces:
            if grid is None:
                continue
            top, left, bottom, right = self._edges(region)
            y, rows = _cells(top, bottom, grid.shape[0], height)
            x, columns = _cells(left, right, grid.shape[1], width)
            values[y[:, None], x] = grid[rows[:, None], columns]
        return values

    def line_width(self, regions: Sequence[Region], grids: Sequence[np.ndarray | None]) -> int:
        """Pixels; none where cells are so small that lines would hide them."""
        sides = []
        for region, grid in zip(regions, grids):
            if grid is not None:
                top, left, bottom, right = self._edges(region)
                sides += [(bottom - top) / grid.shape[0], (right - left) / grid.shape[1]]
        cell = min(sides, default=0)
        return 0 if cell < 5 else 1 if cell < 16 else 2

    def lines(self, regions: Sequence[Region]) -> np.ndarray:
        """The pixels where tiles meet, bool. None for a single region."""
        height, width = self.pixels.shape[:2]
        marked = np.zeros((height, width), bool)
        if len(regions) < 2:
            return marked
        for region in regions:
            top, left, bottom, right = (round(edge) for edge in self._edges(region))
            y, x = slice(max(0, top), max(0, bottom)), slice(max(0, left), max(0, right))
            for edge in (top, bottom):
                if 2 < edge < height - 2:
                    marked[edge - 1 : edge + 1, x] = True
            for edge in (left, right):
                if 2 < edge < width - 2:
                    marked[y, edge - 1 : edge + 1] = True
        return marked


def _over(part: float, n: int) -> int:
    """Whole pixels of a part of n that reaches over an edge. Less than a pixel and a half is rounding."""
    return max(0, int(part * n - 0.5))


def _cells(start: float, end: float, n_cells: int, n_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels whose centres lie between start and end, and the cell that each falls into."""
    at = np.arange(n_pixels)
    cells = np.floor((at + 0.5 - start) * n_cells / max(end - start, 1e-9)).astype(int)
    inside = (cells >= 0) & (cells < n_cells)
    return at[inside], cells[inside]


def with_lines(panel: np.ndarray, lines: np.ndarray) -> np.ndarray:
    if not lines.any():
        return panel
    lined = panel.copy()
    lined[lines] = _TILE_LINE
    return lined


def dim_dropped(pixels: np.ndarray, share: np.ndarray, line_width: int) -> np.ndarray:
    part = share[:, :, None]
    half_grey = 0.5 * pixels + 0.5 * (pixels @ LUMINANCE)[:, :, None]
    dimmed = 0.4 * half_grey + 20
    panel: np.ndarray = (part * pixels + (1 - part) * dimmed + 0.5).astype(np.uint8)
    panel[_border(share > 0, line_width)] = _LINE
    return panel


def mosaic(grids: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The grids in as many columns as rows, or one more, with gaps between: (*size, 3) uint8."""
    n_columns = int(np.ceil(np.sqrt(len(grids))))
    n_rows = -(-len(grids) // n_columns)
    panel = np.full((*size, 3), BACKGROUND, np.uint8)
    height, width = max(1, size[0] // n_rows - _GAP), max(1, size[1] // n_columns - _GAP)
    for i, grid in enumerate(grids):
        row, column = divmod(i, n_columns)
        top, left = row * size[0] // n_rows, column * size[1] // n_columns
        share = _over_pixels(grid.astype(np.float32), np.empty((height, width)))[:, :, None]
        panel[top : top + height, left : left + width] = (share * _KEPT + (1 - share) * _DROPPED + 0.5).astype(np.uint8)
    return panel


def _border(kept: np.ndarray, width: int) -> np.ndarray:
    """The dropped pixels within `width` of a kept one, along rows, columns and diagonals: bool, as large as `kept`."""
    near = kept
    for _ in range(width):
        padded = np.pad(near, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        near = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    ring: np.ndarray = near & ~kept
    return ring


def _over_pixels(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Gives each pixel the value of the cell that its centre falls into."""
    rows, columns = (
        ((np.arange(size) + 0.5) * cells / size).astype(int) for size, cells in zip(pixels.shape[:2], grid.shape[:2])
    )
    spread: np.ndarray = grid[rows[:, None], columns]
    return spread


def colours(level: np.ndarray) -> np.ndarray:
    """Values in 0..1 to colours: any shape to (*shape, 3) float32 in 0..255."""
    anchors = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(level, anchors, channel) for channel in _COLOURS.T], axis=-1).astype(np.float32)


# --- composition ---


def sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]], extra_width: int = 0) -> PIL.Image.Image:
    """Rows of panels of one size, each with its title below."""
    height, width = rows[0][0][1].shape[:2]
    column, line = max(width, MIN_COLUMN_WIDTH), height + TITLE_HEIGHT
    size = (MARGIN + max(map(len, rows)) * (column + MARGIN) + extra_width, MARGIN + len(rows) * line)
    picture = PIL.Image.new("RGB", size, BACKGROUND)
    draw = PIL.ImageDraw.Draw(picture)
    for row, panels in enumerate(rows):
        top = MARGIN + row * line
        for index, (title, pixels) in enumerate(panels):
            left = MARGIN + index * (column + MARGIN)
            picture.paste(PIL.Image.fromarray(pixels), (left + (column - width) // 2, top))
            text, font = _fit_title(title, column)
            draw.text((left + column / 2, top + height + TITLE_HEIGHT / 2), text, _TEXT, font, anchor="mm")
    return picture


def under_header(picture: PIL.Image.Image, header: str) -> PIL.Image.Image:
    """The picture with a text above it, in as many lines as it needs, at most four."""
    font = PIL.ImageFont.load_default(size=16)
    width = picture.width - 2 * MARGIN
    lines = [""]
    for word in header.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if not lines[0]:
        return picture
    if len(lines) > _HEADER_LINES:
        lines = [*lines[: _HEADER_LINES - 1], lines[_HEADER_LINES - 1] + " ..."]
    top = MARGIN + _HEADER_LEADING * len(lines)
    taller = PIL.Image.new("RGB", (picture.width, picture.height + top), BACKGROUND)
    taller.paste(picture, (0, top))
    draw = PIL.ImageDraw.Draw(taller)
    for i, line in enumerate(lines):
        while line and font.getlength(line) > width:
            line = line[:-1]
        draw.text((MARGIN, MARGIN + i * _HEADER_LEADING), line, _TEXT, font)
    return taller


def _fit_title(title: str, width: int) -> tuple[str, PIL.ImageFont.ImageFont | PIL.ImageFont.FreeTypeFont]:
    """The title in the largest font that fits; cut off where even the smallest does not."""
    text = " ".join(title.split())
    for size in _TITLE_SIZES:
        font = PIL.ImageFont.load_default(size=size)
        if font.getlength(text) <= width:
            return text, font
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "...", font


def draw_legend(picture: PIL.Image.Image, height: int, low: float, high: float, unit: str) -> None:
    left = picture.width - LEGEND_WIDTH - MARGIN + 8
    ramp = np.repeat(colours(np.linspace(1, 0, height))[:, None], 14, axis=1)
    picture.paste(PIL.Image.fromarray((ramp + 0.5).astype(np.uint8)), (left, MARGIN))
    draw = PIL.ImageDraw.Draw(picture)
    font = PIL.ImageFont.load_default(size=12)
    draw.text((left + 19, MARGIN), f"{high:.3g}", _TEXT, font, anchor="lt")
    draw.text((left + 19, MARGIN + height), f"{low:.3g}", _TEXT, font, anchor="lb")
    if unit:  # upright beside the scale, between its two numbers
        label = PIL.Image.new("RGB", (int(font.getlength(unit)) + 2, 16), BACKGROUND)
        PIL.ImageDraw.Draw(label).text((1, 1), unit, _TEXT, font)
        label = label.rotate(90, expand=True)
        if label.height < height - 32:
            picture.paste(label, (left + 22, MARGIN + (height - label.height) // 2))


# --- input ---


def fit(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    if max(height, width) > MAX_LONG_SIDE:
        scale = MAX_LONG_SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.LANCZOS))
    factor = min(-(-MIN_SHORT_SIDE // min(height, width)), MAX_LONG_SIDE // max(height, width))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def checked_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be (height, width, 3) uint8, not {image.shape} {image.dtype}")
    return np.ascontiguousarray(image)


def checked_share(grid: np.ndarray, title: str) -> np.ndarray:
    kept = checked_grid(grid, f"kept of stage {title!r}")
    if not (kept.min() >= 0 and kept.max() <= 1):
        raise ValueError(f"kept of stage {title!r} must lie in 0..1")
    return kept


def checked_grid(grid: np.ndarray, name: str) -> np.ndarray:
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.size == 0 or grid.dtype.kind not in "fbiu":
        raise ValueError(f"{name} must be (grid_h, grid_w) numbers, not {grid.shape} {grid.dtype}")
    return grid.astype(np.float64)
