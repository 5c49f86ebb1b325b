"""Pictures that show what pruning did to a picture: which grid cells were kept, and where attention lay.

Knows how to draw grids over pixels. Knows nothing of models, tokens or how the grids were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from ..errors import ConfigError
from .panels import (
    BACKGROUND,
    LEGEND_WIDTH,
    LUMINANCE,
    MARGIN,
    PADDING,
    TITLE_HEIGHT,
    WHOLE,
    Canvas,
    Region,
    checked_grid,
    checked_image,
    checked_share,
    colours,
    dim_dropped,
    draw_legend,
    fit,
    mosaic,
    sheet,
    under_header,
    with_lines,
)

MAX_SHEET = 16_000  # pixels that pictures under each other may be high
_OVERLAP = 0.05  # of the smaller of two regions: they do not lie beside each other
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


@dataclass(eq=False)
class Layer:
    """Images that lie beside each other on a picture: one that shows all of it, or its tiles.

    Attributes:
        title: Shown under the picture.
        regions: What each image shows of the picture.
        stages: Of each step of pruning its title, and for each image (grid_h, grid_w) values in 0..1, as in `Stage`.
            None: an image without a grid.
    """

    title: str
    regions: Sequence[Region]
    stages: Sequence[tuple[str, Sequence[np.ndarray | None]]]


@dataclass(eq=False)
class Shown:
    """An image that a model got of a picture: all of it, or one crop.

    Attributes:
        n_tokens: Its tokens.
        grid: (rows, columns) of them, or None.
        region: What it shows of the picture. None: that is not known.
        kept: Of each step of pruning how many tokens stayed, and which, (rows, columns) of 0 and 1, or None without a
            grid.
    """

    n_tokens: int
    grid: tuple[int, int] | None
    region: Region | None
    kept: Sequence[tuple[int, np.ndarray | None]]


def draw_shown(pixels: np.ndarray, titles: Sequence[str], images: Sequence[Shown]) -> PIL.Image.Image:
    """Draws a picture and what pruning kept of its images, each where it lies.

    Where nobody knows that, the grids of several images stand beside the picture, and their titles say so. Where tokens
    have no grid, the share of each image's tokens that stayed is drawn.

    Args:
        pixels: The picture, (height, width, 3) uint8.
        titles: Of each step of pruning.
        images: It, or its crops.

    Returns:
        An RGB picture.

    Raises:
        ConfigError: The tokens have no place on the picture.
    """
    placed = [(image, image.region) for image in images if image.region is not None]
    on_grid = [image for image in images if image.grid is not None]
    if not on_grid and (len(images) == 1 or not placed):
        raise ConfigError(
            "this model's image tokens have no place on the picture: they have no grid",
            "leave the picture (--overlay) out: report.images has the kept indices",
        )
    if not placed:
        return _draw_unplaced(pixels, titles, images)
    layers: list[Layer] = []
    for group in apart([region for _, region in placed]):
        some = [placed[i][0] for i in group]
        name = "image" if len(images) == 1 else "whole picture" if len(group) == 1 else f"{len(group)} tiles"
        if not layers and len(placed) < len(images):
            name += f"; places of {len(images) - len(placed)} more are not known"
        how = "" if on_grid else ", share of each"
        stages = []
        for step, title in enumerate(titles):
            grids = [
                image.kept[step][1] if on_grid else np.array([[image.kept[step][0] / image.n_tokens]]) for image in some
            ]
            stages.append((f"{title}: {_count(some, step)}{how}", grids))
        layers.append(Layer(name, [placed[i][1] for i in group], stages))
    return draw_layers(pixels, layers)


def _count(images: Sequence[Shown], step: int) -> str:
    return f"{sum(image.kept[step][0] for image in images)} of {sum(image.n_tokens for image in images)}"


def _draw_unplaced(pixels: np.ndarray, titles: Sequence[str], images: Sequence[Shown]) -> PIL.Image.Image:
    where = f"; places of the {len(images)} crops are not known" if len(images) > 1 else ""
    stages = []
    for step, title in enumerate(titles):
        grids = [grid for image in images if (grid := image.kept[step][1]) is not None]
        stages.append((f"{title}: {_count(images, step)}{where}", grids))
    if len(images) > 1:
        return draw_crops(pixels, stages)
    assert images[0].grid is not None  # draw_shown has looked
    return draw_overlay(fit_to_grid(pixels, images[0].grid), [Stage(title, grids[0]) for title, grids in stages])


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
    return draw_layers(image, [Layer("image", [WHOLE], [(stage.title, [stage.kept]) for stage in stages])])


def draw_layers(image: np.ndarray, layers: Sequence[Layer]) -> PIL.Image.Image:
    """Like `draw_overlay`, with a row of panels for each layer. Lines show where tiles meet.

    Where images reach over the picture's edges, as padded ones do, the panels show the padding in grey.

    Args:
        image: (height, width, 3) uint8.
        layers: The layers, such as the whole picture and its tiles.

    Returns:
        An RGB picture.

    Raises:
        ValueError: As `draw_overlay`.
    """
    canvas = Canvas(checked_image(image), [region for layer in layers for region in layer.regions])
    rows = []
    for layer in layers:
        lines = canvas.lines(layer.regions)
        rows.append([(layer.title, with_lines(canvas.pixels, lines))])
        for title, grids in layer.stages:
            checked = [None if grid is None else checked_share(grid, title) for grid in grids]
            share = canvas.spread(list(zip(layer.regions, checked)), 1.0)
            panel = dim_dropped(canvas.pixels, share, canvas.line_width(layer.regions, checked))
            rows[-1].append((title, with_lines(panel, lines)))
    return sheet(rows)


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
    pixels = fit(checked_image(image))
    panels = [("image", pixels)]
    for title, grids in stages:
        checked = [checked_share(grid, title) for grid in grids]
        if not checked:
            raise ValueError(f"stage {title!r} has no grid")
        panels.append((title, mosaic(checked, pixels.shape[:2])))
    return sheet([panels])


def apart(regions: Sequence[Region]) -> list[list[int]]:
    """Indices of regions, in groups whose members lie beside each other; the group of the largest region first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(regions)), key=lambda i: -_area(regions[i])):
        for group in groups:
            if all(_beside(regions[i], regions[j]) for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def _area(region: Region) -> float:
    return max(0.0, region[2] - region[0]) * max(0.0, region[3] - region[1])


def _beside(a: Region, b: Region) -> bool:
    common = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return _area(common) <= _OVERLAP * min(_area(a), _area(b))


def stack(pictures: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures under each other, such as the overlays of the frames of a video; of many each is smaller."""
    scale = min(1.0, MAX_SHEET / sum(picture.height for picture in pictures))
    scaled = [
        picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        if scale < 1
        else picture
        for picture in pictures
    ]
    paper = PIL.Image.new("RGB", (max(p.width for p in scaled), sum(p.height for p in scaled)), BACKGROUND)
    top = 0
    for picture in scaled:
        paper.paste(picture, (0, top))
        top += picture.height
    return paper


def draw_heatmap(
    image: np.ndarray,
    values: np.ndarray | Sequence[np.ndarray],
    title: str,
    *,
    regions: Sequence[Region] = (WHOLE,),
    header: str = "",
    unit: str = "",
) -> PIL.Image.Image:
    """Draws the image and, right of it, values as colours over a grey copy, with a colour scale.

    Args:
        image: (height, width, 3) uint8, scaled as in `draw_overlay`.
        values: (grid_h, grid_w) finite floats in any unit, or several such grids. The lowest of all is darkest, the
            highest brightest, linearly.
        title: Shown under the coloured panel.
        regions: What each grid covers of the image. Those that overlap, such as the whole and its tiles, get a row
            each.
        header: Text above all, such as the question. It is wrapped.
        unit: What the values are, beside the colour scale.

    Returns:
        An RGB picture.

    Raises:
        ValueError: An image or a grid has another shape or type, or values are not finite.
    """
    grids = [checked_grid(grid, "values") for grid in ([values] if isinstance(values, np.ndarray) else values)]
    if not grids or not all(np.isfinite(grid).all() for grid in grids):
        raise ValueError("values must be finite")
    canvas = Canvas(checked_image(image), regions)
    low, high = min(float(grid.min()) for grid in grids), max(float(grid.max()) for grid in grids)
    grey = (canvas.pixels @ LUMINANCE)[:, :, None]
    rows = []
    for group in apart(regions):
        level = canvas.spread([(regions[i], grids[i]) for i in group], np.nan)[:, :, None]
        level = np.clip((level - low) / (high - low), 0, 1) if high > low else np.zeros_like(level)
        heat = np.where(
            np.isnan(level), grey, _HEAT_OPACITY * colours(np.nan_to_num(level[:, :, 0])) + (1 - _HEAT_OPACITY) * grey
        )
        lines = canvas.lines([regions[i] for i in group])
        name = "image" if len(regions) == 1 else "whole picture" if len(group) == 1 else f"{len(group)} tiles"
        rows.append(
            [
                (name, with_lines(canvas.pixels, lines)),
                (title, with_lines((heat + 0.5).astype(np.uint8), lines)),
            ]
        )
    picture = sheet(rows, extra_width=LEGEND_WIDTH)
    draw_legend(picture, canvas.pixels.shape[0], low, high, unit)
    return under_header(picture, header)


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
    canvas = np.full((full_height, full_width, 3), PADDING, np.uint8)
    top, left = (full_height - height) // 2, (full_width - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def draw_matrix(values: np.ndarray, title: str, *, header: str = "") -> PIL.Image.Image:
    """Draws a matrix as colours, such as the attention of a text prompt (query rows down, key columns across).

    Args:
        values: (rows, columns) finite floats. Each row is scaled to its own maximum, since softmax rows sum to one.
        title: Shown under the matrix.
        header: Text above it, such as the prompt. It is wrapped.

    Returns:
        An RGB picture.

    Raises:
        ValueError: The values have another shape, or are not finite.
    """
    grid = checked_grid(values, "values")
    if not np.isfinite(grid).all():
        raise ValueError("values must be finite")
    top = grid.max(axis=1, keepdims=True)
    level = np.divide(np.maximum(grid, 0), top, out=np.zeros_like(grid), where=top > 0)
    picture = sheet([[(title, fit((colours(level) + 0.5).astype(np.uint8)))]], extra_width=LEGEND_WIDTH)
    draw_legend(picture, picture.height - MARGIN - TITLE_HEIGHT, 0.0, 1.0, "attention, of the row's maximum")
    return under_header(picture, header)
