"""Pictures that show what pruning did to an image: which grid cells were kept, and where attention lay.

Knows how to draw grids over pixels. Knows nothing of models, tokens or how the grids were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

MIN_SHORT_SIDE = 336  # pixels; smaller images are enlarged by an integer factor
MAX_LONG_SIDE = 1024  # pixels; larger images are shrunk
MIN_COLUMN_WIDTH = 160  # pixels; leaves room for a title under a very narrow image
MARGIN = 12  # pixels around and between panels
TITLE_HEIGHT = 34  # pixels below each panel
LEGEND_WIDTH = 72  # pixels right of a heatmap

_BACKGROUND = (250, 250, 250)
_TEXT = (30, 30, 30)
_LINE = (255, 176, 0)
_KEPT, _DROPPED = (
    np.array((255, 224, 150), np.float32),
    np.array((70, 70, 80), np.float32),
)  # cells that are drawn without pixels
_GAP = 6  # pixels between crops
_TITLE_SIZES = (18, 16, 14, 12, 11)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)

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
_HEAT_OPACITY = 0.55


@dataclass(eq=False)
class Stage:
    """One step of pruning.

    Attributes:
        title: Shown under the panel.
        kept: (grid_h, grid_w) float in 0..1. 1 is kept, 0 is dropped, a fraction is the share of the cell that was
            kept.
    """

    title: str
    kept: np.ndarray


def draw_overlay(image: np.ndarray, stages: Sequence[Stage]) -> PIL.Image.Image:
    """Draws the image and, right of it, one panel for each stage.

    Kept cells show their pixels unchanged. Dropped cells are dimmed towards grey; fractions lie between. A line runs
    along the border of what was dropped entirely, inside the dropped cells. Grids stretch over the whole image, whether
    or not they divide it.

    Args:
        image: (height, width, 3) uint8. It is enlarged by an integer factor (nearest pixel) until its shorter side has
            MIN_SHORT_SIDE pixels, within MAX_LONG_SIDE, and shrunk if its longer side exceeds MAX_LONG_SIDE.
        stages: The steps.

    Returns:
        An RGB picture.

    Raises:
        ValueError: An image or a grid has another shape or type, or grid values are outside 0..1.
    """
    pixels = _fit(_checked_image(image))
    panels = [("image", pixels)]
    for stage in stages:
        kept = _checked_grid(stage.kept, f"kept of stage {stage.title!r}")
        if not (kept.min() >= 0 and kept.max() <= 1):
            raise ValueError(f"kept of stage {stage.title!r} must lie in 0..1")
        panels.append((stage.title, _dim_dropped(pixels, kept)))
    return _side_by_side(panels)


def draw_crops(image: np.ndarray, stages: Sequence[tuple[str, Sequence[np.ndarray]]]) -> PIL.Image.Image:
    """Like `draw_overlay`, for an image that is taken in crops whose places are unknown.

    Each stage shows the grids of the crops on their own, in order, row by row. Kept cells are light and dropped cells
    dark, without pixels.

    Args:
        image: (height, width, 3) uint8.
        stages: Title and the crops' (grid_h, grid_w) values in 0..1.

    Returns:
        An RGB picture.

    Raises:
        ValueError: As `draw_overlay`.
    """
    pixels = _fit(_checked_image(image))
    panels = [("image", pixels)]
    for title, grids in stages:
        checked = [_checked_grid(grid, f"kept of stage {title!r}") for grid in grids]
        if not checked or not all(grid.min() >= 0 and grid.max() <= 1 for grid in checked):
            raise ValueError(f"kept of stage {title!r} must lie in 0..1")
        panels.append((title, _mosaic(checked, pixels.shape[:2])))
    return _side_by_side(panels)


def draw_heatmap(image: np.ndarray, values: np.ndarray, title: str) -> PIL.Image.Image:
    """Draws the image and, right of it, values as colours over a grey copy, with a colour scale.

    Args:
        image: (height, width, 3) uint8, scaled as in `draw_overlay`.
        values: (grid_h, grid_w) finite floats in any unit. The lowest is darkest, the highest brightest, linearly.
        title: Shown under the coloured panel.

    Returns:
        An RGB picture.

    Raises:
        ValueError: An image or a grid has another shape or type, or values are not finite.
    """
    pixels = _fit(_checked_image(image))
    grid = _checked_grid(values, "values")
    if not np.isfinite(grid).all():
        raise ValueError("values must be finite")
    low, high = float(grid.min()), float(grid.max())
    level = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
    colours = _over_pixels(_colours(level), pixels)
    grey = (pixels @ _LUMINANCE)[:, :, None]
    heat = (_HEAT_OPACITY * colours + (1 - _HEAT_OPACITY) * grey + 0.5).astype(np.uint8)
    picture = _side_by_side([("image", pixels), (title, heat)], extra_width=LEGEND_WIDTH)
    _draw_legend(picture, len(pixels), low, high)
    return picture


def fit_to_grid(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pads an image to the aspect of a token grid, centred, as llama.cpp's preprocessors do before they resize.

    Args:
        image: (height, width, 3) uint8.
        grid: (rows, columns).

    Returns:
        (height', width', 3) uint8 with grey borders.
    """
    height, width = image.shape[:2]
    side = max(height / grid[0], width / grid[1])  # pixels of one cell
    full_height, full_width = max(height, round(side * grid[0])), max(width, round(side * grid[1]))
    canvas = np.full((full_height, full_width, 3), 118, np.uint8)
    top, left = (full_height - height) // 2, (full_width - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def draw_matrix(values: np.ndarray, title: str) -> PIL.Image.Image:
    """Draws a matrix as colours, such as the attention of a text prompt (query rows down, key columns across).

    Args:
        values: (rows, columns) finite floats. Each row is scaled to its own maximum, since softmax rows sum to one.
        title: Shown under the matrix.

    Returns:
        An RGB picture.

    Raises:
        ValueError: The values have another shape, or are not finite.
    """
    grid = _checked_grid(values, "values")
    if not np.isfinite(grid).all():
        raise ValueError("values must be finite")
    top = grid.max(axis=1, keepdims=True)
    level = np.divide(np.maximum(grid, 0), top, out=np.zeros_like(grid), where=top > 0)
    return _side_by_side([(title, _fit((_colours(level) + 0.5).astype(np.uint8)))])


# --- panels ---


def _dim_dropped(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    share = _over_pixels(kept.astype(np.float32), pixels)[:, :, None]
    half_grey = 0.5 * pixels + 0.5 * (pixels @ _LUMINANCE)[:, :, None]
    dimmed = 0.4 * half_grey + 20
    panel: np.ndarray = (share * pixels + (1 - share) * dimmed + 0.5).astype(np.uint8)
    panel[_border(share[:, :, 0] > 0, _line_width(kept.shape, pixels.shape))] = _LINE
    return panel


def _mosaic(grids: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The grids in as many columns as rows, or one more, with gaps between: (*size, 3) uint8."""
    n_columns = int(np.ceil(np.sqrt(len(grids))))
    n_rows = -(-len(grids) // n_columns)
    panel = np.full((*size, 3), _BACKGROUND, np.uint8)
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


def _line_width(grid: tuple[int, ...], panel: tuple[int, ...]) -> int:
    """Pixels; none where cells are so small that lines would hide them."""
    cell = min(panel[0] / grid[0], panel[1] / grid[1])
    return 0 if cell < 5 else 1 if cell < 16 else 2


def _over_pixels(grid: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Gives each pixel the value of the cell that its centre falls into."""
    rows, columns = (
        ((np.arange(size) + 0.5) * cells / size).astype(int) for size, cells in zip(pixels.shape[:2], grid.shape[:2])
    )
    spread: np.ndarray = grid[rows[:, None], columns]
    return spread


def _colours(level: np.ndarray) -> np.ndarray:
    """Values in 0..1 to colours: any shape to (*shape, 3) float32 in 0..255."""
    anchors = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(level, anchors, channel) for channel in _COLOURS.T], axis=-1).astype(np.float32)


# --- composition ---


def _side_by_side(panels: list[tuple[str, np.ndarray]], extra_width: int = 0) -> PIL.Image.Image:
    height, width = panels[0][1].shape[:2]
    column = max(width, MIN_COLUMN_WIDTH)
    size = (MARGIN + len(panels) * (column + MARGIN) + extra_width, MARGIN + height + TITLE_HEIGHT)
    picture = PIL.Image.new("RGB", size, _BACKGROUND)
    draw = PIL.ImageDraw.Draw(picture)
    for index, (title, pixels) in enumerate(panels):
        left = MARGIN + index * (column + MARGIN)
        picture.paste(PIL.Image.fromarray(pixels), (left + (column - width) // 2, MARGIN))
        text, font = _fit_title(title, column)
        draw.text((left + column / 2, MARGIN + height + TITLE_HEIGHT / 2), text, _TEXT, font, anchor="mm")
    return picture


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


def _draw_legend(picture: PIL.Image.Image, height: int, low: float, high: float) -> None:
    left = picture.width - LEGEND_WIDTH - MARGIN + 8
    ramp = np.repeat(_colours(np.linspace(1, 0, height))[:, None], 14, axis=1)
    picture.paste(PIL.Image.fromarray((ramp + 0.5).astype(np.uint8)), (left, MARGIN))
    draw = PIL.ImageDraw.Draw(picture)
    font = PIL.ImageFont.load_default(size=12)
    draw.text((left + 19, MARGIN), f"{high:.3g}", _TEXT, font, anchor="lt")
    draw.text((left + 19, MARGIN + height), f"{low:.3g}", _TEXT, font, anchor="lb")


# --- input ---


def _fit(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    if max(height, width) > MAX_LONG_SIDE:
        scale = MAX_LONG_SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.LANCZOS))
    factor = min(-(-MIN_SHORT_SIDE // min(height, width)), MAX_LONG_SIDE // max(height, width))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _checked_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be (height, width, 3) uint8, not {image.shape} {image.dtype}")
    return np.ascontiguousarray(image)


def _checked_grid(grid: np.ndarray, name: str) -> np.ndarray:
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.size == 0 or grid.dtype.kind not in "fbiu":
        raise ValueError(f"{name} must be (grid_h, grid_w) numbers, not {grid.shape} {grid.dtype}")
    return grid.astype(np.float64)
