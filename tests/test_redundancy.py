"""Which units are left out before the encoder, and what stands for them, from their pixels alone."""

import numpy as np
import pytest

from star_edge.pruning.selection import REACH, between
from star_edge.vision.redundancy import masses, representatives, with_more


def test_representatives_by_hand():
    a, b, c = 0.0, 1.0, 2.0
    pixels = np.array([[a, a, b], [a, b, b], [c, a, a]], np.float32).reshape(9, 1)
    # a is the ground, and each a has four like it within reach: the first stays. No b is inside of b
    assert representatives(pixels, (3, 3)).tolist() == [0, 0, 2, 0, 4, 5, 6, 0, 0]
    kept, mass = masses(representatives(pixels, (3, 3)))
    assert kept.tolist() == [0, 2, 4, 5, 6] and mass.tolist() == [5, 1, 1, 1, 1]


def test_the_gap_between_two_columns_stays():
    """Words in columns 0 and 1, 3, and 6: the gap between the first two things is near both, that of two columns too.
    What is right of them all may go, and blank rows.
    """
    picture = np.zeros((6, 12), np.float32)
    words = [0, 1, 3, 6]
    picture[1:5, words] = 1 + np.arange(16, dtype=np.float32).reshape(4, 4)
    stands = representatives(picture.reshape(72, 1), (6, 12)).reshape(6, 12)
    stays = stands == np.arange(72).reshape(6, 12)
    assert stays[1:5, [*words, 2, 4, 5]].all() and stays[1:5, 7:].sum() <= 4 and stays[[0, 5]].sum() <= 4


def test_what_lies_between():
    """Against the definition, place by place, with tokens of a grid that has some of its cells only."""
    rng, grid = np.random.default_rng(0), (5, 9)
    cells = np.sort(rng.choice(45, 33, replace=False))
    cells[rng.choice(33, 3, replace=False)] = -1
    things = rng.random(33) < 0.5
    row, column = np.divmod(cells, grid[1])
    expected = []
    for i in range(33):
        steps = [column[j] - column[i] for j in range(33) if things[j] and cells[j] >= 0 and row[j] == row[i]]
        sides = [any(0 < side * step <= REACH for step in steps) for side in (-1, 1)]
        expected.append(cells[i] >= 0 and not things[i] and all(sides))
    assert between(things, cells, grid).tolist() == expected and 3 < sum(expected) < 20


def test_a_flat_area_keeps_one_unit_of_25():
    stands = representatives(np.zeros((100, 5), np.float32), (10, 10))
    assert np.flatnonzero(stands == np.arange(100)).tolist() == [22, 27, 72, 77]
    assert np.unique(stands, return_counts=True)[1].tolist() == [25] * 4


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_the_edge_of_a_thing_stays(tolerance):
    """A bar on paper: paper may go, and the inside of the bar, for which its edge stands."""
    picture = np.zeros((12, 12), np.float32)
    picture[2:, 3:7] = 1  # it touches the lower border
    picture += 0.02 * np.random.default_rng(5).random(picture.shape, np.float32) if tolerance else 0
    stands = representatives(picture.reshape(144, 1), (12, 12), tolerance).reshape(12, 12)
    stays = stands == np.arange(144).reshape(12, 12)
    inside = np.zeros((12, 12), bool)
    inside[3:, 4:6] = True
    assert stays[(picture > 0.5) & ~inside].all() and not stays[inside].any()
    assert stays[picture < 0.5].sum() <= 16


def test_steps_that_are_small_do_not_add_up():
    """A gradient: each unit is like the next, and the first is not like the last."""
    pixels = np.linspace(0, 1, 21, dtype=np.float32)[:, None]
    for grid in ((1, 21), (21, 1), (3, 7)):
        stands = representatives(pixels, grid, 0.101)
        assert np.abs(pixels[stands] - pixels).max() <= 0.101 and 5 <= len(np.unique(stands)) < 21


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
@pytest.mark.parametrize("grid", [(8, 9), (1, 72), (72, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize("n_values", [2, 200])
def test_what_stands_for_a_unit(tolerance, grid, n_values):
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(3)
    n = grid[0] * grid[1]
    pixels = np.repeat(rng.integers(0, 2, (n, 2)) * (rng.random((n, 1)) < 0.3), n_values // 2, axis=1)
    pixels = pixels.astype(np.float32) + 0.2 * rng.random((n, 1)).astype(np.float32).round()
    pixels[::7, -2] += 1  # a difference that a sample of the values does not see
    stands = representatives(pixels, grid, tolerance)
    place = np.stack(np.divmod(np.arange(n), grid[1]), axis=1)
    apart = np.abs(place[:, None] - place[None]).max(axis=2)
    alike = (np.abs(pixels[:, None] - pixels[None]) <= tolerance).all(axis=2) & (apart > 0)
    touching = apart == 1
    flat = (alike & touching).any(axis=1)
    inside = flat & (alike | ~touching).all(axis=1)
    same_colour = (np.abs(pixels[:, None] - pixels[None]) <= tolerance).all(axis=2) & flat & flat[:, None]
    ground = same_colour[same_colour.sum(axis=1).argmax()]
    beside = ~ground & (place[:, None, 0] == place[:, 0])  # things on the row of each
    steps = place[:, 1] - place[:, None, 1]
    gap = np.logical_and(*((beside & (side * steps > 0) & (side * steps <= REACH)).any(axis=1) for side in (-1, 1)))
    may = inside | (ground & ~gap)
    near = alike & (apart <= REACH)
    out = np.flatnonzero(stands != np.arange(n))
    assert (stands[stands] == stands).all() and may[out].all() and near[out, stands[out]].all()
    stays = stands == np.arange(n)
    assert not (near & stays)[np.ix_(may & stays, stays)].any()  # none stays that could have gone
    anyway = np.where(near & ~may, apart, n)[out].min(axis=1, initial=n)  # how far the nearest is that stays anyway
    assert (apart[out, stands[out]] == anyway)[anyway < n].all()


def test_with_more_units():
    stands = np.array([0, 0, 0, 3, 3, 0, 3, 0])
    assert with_more(stands, 2).tolist() == stands.tolist()
    for n in range(2, 9):
        more = with_more(stands, n)
        assert (more == np.arange(8)).sum() == n and masses(more)[1].sum() == 8
    for n in (1, 9):
        with pytest.raises(ValueError):
            with_more(stands, n)
