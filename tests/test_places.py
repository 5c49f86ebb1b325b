"""Where the images of a picture lie on it, against pixels: a square of another colour is moved over the picture, and
what the encoder gets changes in the images that are said to show the square, at its place, and in no other.

What is expected comes from comparing the pixels of two pictures. The code under test measures a picture of ramps.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.chatting import data_url, load, user
from helpers.families import load_fixtures

from star_edge import StarChatHandler
from star_edge.errors import ImageError
from star_edge.vision.places import Place, Places, locate, places_or_none

# Pictures that are cut, padded and stretched, as far as the family does so; lfm2's tiles have 512 pixels whatever the
# file says
SIZES = {"lfm2-vl": [(700, 1100)], "lfm2.5-vl": [(1100, 700)]}
DEFAULT_SIZES = [(120, 240), (250, 130)]
TILED = {
    "granite-docling": (2, 2),
    "granite-vision": (2, 2),
    "internvl": (3, 2),
    "internvl3.5": (3, 2),
    "lfm2-vl": (2, 3),
    "lfm2.5-vl": (3, 2),
    "llava-next": (2, 2),
    "minicpmv": (2, 1),
    "minicpmv4.5": (2, 1),
    "smolvlm": (2, 2),
}  # (rows, columns) of tiles of the last of the sizes: those of the models' papers and processors for that shape


def pixels_of(places: Places, picture: np.ndarray) -> list[np.ndarray]:
    return places._look(picture)


def changed(before: np.ndarray, after: np.ndarray, share: float = 0.5) -> tuple[int, int, int, int] | None:
    """Rows and columns that have changed by more than a share of the largest change: top, left, bottom, right."""
    difference = np.abs(after - before).max(axis=0)
    if not difference.max() > 1e-6:
        return None
    y, x = np.nonzero(difference > share * difference.max())
    return y.min(), x.min(), y.max() + 1, x.max() + 1


@pytest.mark.parametrize("name", sorted(load_fixtures()))
def test_a_marked_square_changes_the_images_that_show_it(name):
    fixture = load_fixtures()[name]
    with fixture.engine() as engine:
        places = Places(engine.encoder)
        for height, width in SIZES.get(name, DEFAULT_SIZES):
            found = places.of(height, width)
            assert None not in found
            gray = np.full((height, width, 3), 128, np.uint8)
            before = pixels_of(places, gray)
            assert len(before) == len(found)
            size = min(height, width) // 8
            for row in range(1, 8, 2):
                for column in range(1, 8, 2):
                    top, left = round(row * height / 8 - size / 2), round(column * width / 8 - size / 2)
                    marked = gray.copy()
                    marked[top : top + size, left : left + size] = 255
                    for place, old, new in zip(found, before, pixels_of(places, marked)):
                        rows, columns = old.shape[1:]
                        down, across = rows / (place.bottom - place.top), columns / (place.right - place.left)
                        expected = (
                            (top / height - place.top) * down,
                            (left / width - place.left) * across,
                            ((top + size) / height - place.top) * down,
                            ((left + size) / width - place.left) * across,
                        )
                        shown = np.clip(expected, 0, [rows, columns, rows, columns])
                        is_in = shown[2] - shown[0] > 2 and shown[3] - shown[1] > 2
                        is_out = (
                            max(expected[0] - rows, expected[1] - columns, -expected[2], -expected[3]) > 8
                        )  # filters reach over a border
                        box = changed(old, new)
                        if is_in:
                            assert box is not None, (place, expected)
                            # the change is half at the square's edge, give or take a pixel of either size
                            slack = 1.5 + 0.7 * max(down / height, across / width)
                            assert np.abs(np.subtract(box, shown)).max() <= slack, (place, box, shown)
                        elif is_out:
                            assert box is None, (place, box)


@pytest.mark.parametrize("name", sorted(TILED))
def test_tiles_cover_the_picture_once(name):
    """Beside the overview the tiles form a grid, each point of the picture is in one of them, in reading order."""
    fixture = load_fixtures()[name]
    with fixture.engine() as engine:
        found = Places(engine.encoder).of(*SIZES.get(name, DEFAULT_SIZES)[-1])
    whole = [p for p in found if p.top < 0.01 and p.left < 0.01 and p.bottom > 0.99 and p.right > 0.99]
    tiles = [p for p in found if p not in whole]
    rows, columns = TILED[name]
    assert len(whole) == 1 and len(tiles) == rows * columns
    for y in (np.arange(rows) + 0.5) / rows:
        for x in (np.arange(columns) + 0.5) / columns:
            inside = [i for i, p in enumerate(tiles) if p.top < y < p.bottom and p.left < x < p.right]
            assert inside == [int(y * rows) * columns + int(x * columns)]


def test_what_is_no_rectangle_has_no_place():
    """Tiles that a model stacks, padding alone, and mirrored pixels are told from a part of the picture."""
    n = 64
    ramp = (np.arange(n) + 0.5) / n
    image = np.stack([np.tile(ramp, (n, 1)), np.tile(ramp[:, None], (1, n)), np.ones((n, n))]).astype(np.float32)
    assert np.allclose(locate(image, n, n), (0, 0, 1, 1), atol=1e-3)
    assert np.allclose(locate(image[:, 16:48, 8:], n, n), (0.25, 0.125, 0.75, 1), atol=1e-3)
    stacked = np.concatenate([image[:, :, :32], image[:, :, 32:]], axis=1)
    assert locate(stacked, n, n) is None
    assert locate(image[:, :, ::-1], n, n) is None
    padded = image.copy()
    padded[2] = 0.5
    assert locate(padded, n, n) is None
    framed = np.full((3, n + 32, n), 0.4, np.float32)
    framed[:, 16 : 16 + n] = image
    assert np.allclose(locate(framed, n, n), (-0.25, 0, 1.25, 1), atol=1e-3)


def test_places_that_cannot_be_told_are_none(monkeypatch):
    fixture = load_fixtures()["gemma4"]
    with fixture.engine() as engine:
        places = Places(engine.encoder)
        with pytest.raises(ImageError):
            places.of(1200, 20)
        assert places_or_none(places, 1200, 20, 3) == [None] * 3
        assert places_or_none(places, 96, 96, 2) == [None] * 2  # more images than it makes of such a picture
        assert places_or_none(places, 96, 96, 1) == [Place(*places.of(96, 96)[0])]
    assert places_or_none(places, 97, 96, 1) == [None]  # the engine is closed


def test_asking_leaves_the_engine_as_it_was():
    """The answer after a question about places is that of an engine that was never asked."""
    fixture = load_fixtures()["llava-next"]
    prompt = fixture.prompts[1]
    logits = []
    for asks in (False, True):
        with fixture.engine() as engine:
            _, report = engine.read_prompt(prompt.text, prompt.pictures, "off", chat=False)
            if asks:
                assert None not in report.places
            state, _ = engine.read_prompt(prompt.text, prompt.pictures, "off", chat=False)
            logits.append(state.logits.copy())
    assert np.array_equal(*logits)


def test_both_fronts_say_the_same():
    """StarChatHandler's report knows the places of crops as StarVLM's does: of the picture as it was asked about."""
    fixture = load_fixtures()["llava-next"]
    picture = fixture.prompts[1].pictures[1]
    with fixture.engine() as engine:
        _, report = engine.read_prompt("<__media__> what is it?", [picture], "balanced", chat=False)
        expected = report.places
    handler = StarChatHandler(fixture.mmproj, chat_template="vicuna")
    llm = load(handler, fixture.text, n_ctx=1024)
    try:
        llm.create_chat_completion([user(data_url(picture), "what is it?")], max_tokens=1)
        assert handler.last_report.places == expected and None not in expected and len(expected) == 5
        assert handler.last_report.picture(picture).height > 2 * 336
    finally:
        llm.close()
