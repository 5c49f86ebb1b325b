"""Pictures of what pruning kept, and of attention: every pixel of a panel."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from star_edge.io import panels
from star_edge.io.overlay import Stage, draw_heatmap, draw_overlay

PANEL_GAP = panels.MARGIN


def panels_of(picture: PIL.Image.Image, count: int, height: int, width: int) -> list[np.ndarray]:
    pixels = np.asarray(picture).astype(int)
    assert picture.mode == "RGB"
    assert picture.size == (PANEL_GAP + count * (width + PANEL_GAP), PANEL_GAP + height + panels.TITLE_HEIGHT)
    lefts = [PANEL_GAP + i * (width + PANEL_GAP) for i in range(count)]
    return [pixels[PANEL_GAP : PANEL_GAP + height, left : left + width] for left in lefts]


def bright(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(120, 256, (height, width, 3), dtype=np.uint8)


def test_overlay_enlarges_by_an_integer_and_keeps_kept_pixels():
    image = bright(168, 168)
    kept = np.zeros((6, 6))
    kept[1, 2] = kept[4, 4] = kept[4, 5] = 1
    original, panel = panels_of(draw_overlay(image, [Stage("stage", kept)]), 2, 336, 336)
    enlarged = image.repeat(2, 0).repeat(2, 1)
    assert (original == enlarged).all()
    for row in range(6):
        for column in range(6):
            cell = np.s_[row * 56 : (row + 1) * 56, column * 56 : (column + 1) * 56]
            inside = np.s_[row * 56 + 8 : row * 56 + 48, column * 56 + 8 : column * 56 + 48]
            if kept[row, column]:
                assert (panel[cell] == enlarged[cell]).all()
            else:
                assert (panel[inside] < 0.8 * enlarged[inside]).all()
                assert panel[inside].std() > 3  # the content is still there
    line = panel[1 * 56 + 28, 2 * 56 - 1]
    assert (line == panel[1 * 56 + 28, 3 * 56]).all() and (line == panels._LINE).all()
    assert (panel[4 * 56 + 28, 5 * 56 - 1] == enlarged[4 * 56 + 28, 5 * 56 - 1]).all()  # no line between two kept cells


def test_overlay_of_a_grid_that_does_not_divide_the_image():
    image = bright(400, 501)
    kept = np.zeros((7, 9))
    kept[2, 3] = kept[6, 8] = 1
    original, panel = panels_of(draw_overlay(image, [Stage("a", kept)]), 2, 400, 501)
    assert (original == image).all()
    for row in range(7):
        for column in range(9):
            y, x = int((row + 0.5) * 400 / 7), int((column + 0.5) * 501 / 9)
            assert (panel[y, x] == image[y, x]).all() == bool(kept[row, column])
    assert (panel[-1, -1] == image[-1, -1]).all()


def test_overlay_all_kept_all_dropped_fractions_and_bool():
    image = bright(336, 336)
    stages = [
        Stage("all", np.ones((4, 4))),
        Stage("none", np.zeros((4, 4))),
        Stage("half", np.full((4, 4), 0.5)),
        Stage("bool", np.ones((1, 1), bool)),
    ]
    original, all_kept, none, half, as_bool = panels_of(draw_overlay(image, stages), 5, 336, 336)
    assert (all_kept == image).all() and (original == image).all() and (as_bool == image).all()
    assert (none < image).all()
    assert (half < image).all() and (half > none).all()


def test_overlay_sizes():
    _ = panels_of(draw_overlay(bright(100, 200), []), 1, 400, 800)
    _ = panels_of(draw_overlay(bright(1000, 2048), [Stage("s", np.ones((2, 3)))]), 2, 500, 1024)
    _ = panels_of(draw_overlay(bright(337, 1024), []), 1, 337, 1024)
    for shape in ((1, 1), (1, 3000), (3000, 1), (5, 900)):
        picture = draw_overlay(
            bright(*shape), [Stage("narrow, and with a title that no panel can hold " * 5, np.eye(3))]
        )
        assert max(picture.size) <= 2 * 1024 + 3 * PANEL_GAP and min(picture.size) > 40
    fine = draw_overlay(bright(336, 336), [Stage("finer than pixels", np.eye(1000))])
    assert fine.size[0] == 2 * 336 + 3 * PANEL_GAP


def test_titles_are_drawn_below_and_nothing_else():
    def bar(title: str) -> np.ndarray:
        picture = np.asarray(draw_overlay(bright(336, 336), [Stage(title, np.ones((2, 2)))]))
        return picture[PANEL_GAP + 336 :, PANEL_GAP + 336 + PANEL_GAP :]

    assert len(np.unique(bar(""))) == 1
    assert (bar("layer 2").min() < 100) and (bar("layer 2") != bar("layer 3")).any()
    two_lines = bar("layer\n2")
    assert (two_lines == bar("layer 2")).all()


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_overlay_refuses_other_images(image):
    with pytest.raises(ValueError, match="image must be"):
        draw_overlay(image, [])
    with pytest.raises(ValueError, match="image must be"):
        draw_heatmap(image, np.ones((2, 2)), "t")


@pytest.mark.parametrize(
    "grid", [np.ones(4), np.ones((2, 2, 1)), np.ones((0, 3)), np.array([["a"]]), np.array([[np.nan]])]
)
def test_overlay_refuses_other_grids(grid):
    with pytest.raises(ValueError, match="stage 's'"):
        draw_overlay(bright(10, 10), [Stage("s", grid)])
    with pytest.raises(ValueError, match="values"):
        draw_heatmap(bright(10, 10), grid, "t")


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_overlay_refuses_grids_out_of_range(value):
    with pytest.raises(ValueError, match="0..1"):
        draw_overlay(bright(10, 10), [Stage("s", np.full((2, 2), value))])


def test_heatmap():
    image = np.full((168, 168, 3), 128, np.uint8)
    values = np.linspace(0.001, 0.3, 16).reshape(4, 4)
    picture = draw_heatmap(image, values, "attention")
    assert picture.mode == "RGB"
    assert picture.size == (3 * PANEL_GAP + 2 * 336 + panels.LEGEND_WIDTH, PANEL_GAP + 336 + panels.TITLE_HEIGHT)
    pixels = np.asarray(picture).astype(int)
    assert (pixels[PANEL_GAP : PANEL_GAP + 336, PANEL_GAP : PANEL_GAP + 336] == 128).all()
    heat = pixels[PANEL_GAP : PANEL_GAP + 336, 2 * PANEL_GAP + 336 : 2 * PANEL_GAP + 2 * 336]
    lightness = (heat[42::84, 42::84] @ [0.299, 0.587, 0.114]).ravel()
    assert (np.diff(lightness) > 0).all() and lightness[-1] - lightness[0] > 100
    scaled = np.asarray(draw_heatmap(image, values * 1000, "attention"))[:, : 2 * (PANEL_GAP + 336)]
    assert (scaled == pixels[:, : 2 * (PANEL_GAP + 336)]).all()


def test_heatmap_of_equal_values():
    picture = np.asarray(draw_heatmap(bright(336, 336), np.full((3, 3), 0.2), "flat"))
    assert picture.shape[0] == PANEL_GAP + 336 + panels.TITLE_HEIGHT
