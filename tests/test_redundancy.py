"""Which units are like a neighbour that stays, from their pixels alone."""

import numpy as np
import pytest

from star_edge.vision.redundancy import masses, representatives, with_more


def test_representatives_by_hand():
    a, b, c = 0.0, 1.0, 2.0
    pixels = np.array([[a, a, b], [a, b, b], [c, b, a]], np.float32).reshape(9, 1)
    assert representatives(pixels, (3, 3)).tolist() == [0, 0, 2, 0, 4, 4, 6, 4, 8]
    kept, mass = masses(representatives(pixels, (3, 3)))
    assert kept.tolist() == [0, 2, 4, 6, 8] and mass.tolist() == [3, 1, 3, 1, 1]


def test_steps_that_are_small_do_not_add_up():
    """A gradient: each unit is like the next, and the first is not like the last."""
    pixels = np.linspace(0, 1, 21, dtype=np.float32)[:, None]
    for grid in ((1, 21), (21, 1), (3, 7)):
        stands = representatives(pixels, grid, 0.101)
        assert np.abs(pixels[stands] - pixels).max() <= 0.101 and 7 <= len(np.unique(stands)) < 21


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_each_is_like_what_stands_for_it(tolerance):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 2, (8 * 9, 2)).astype(np.float32) + 0.2 * rng.random((8 * 9, 1)).astype(np.float32).round()
    stands = representatives(pixels, (8, 9), tolerance)
    assert (np.abs(pixels[stands] - pixels).max(axis=1) <= tolerance).all()
    assert (stands[stands] == stands).all() and (stands <= np.arange(72)).all()
    for unit in np.flatnonzero(stands == np.arange(72)):  # nothing that stays is like what stands for a neighbour
        row, column = divmod(int(unit), 9)
        for there, neighbour in ((column > 0, unit - 1), (row > 0, unit - 9)):
            assert not there or np.abs(pixels[unit] - pixels[stands[neighbour]]).max() > tolerance


def test_with_more_units():
    stands = np.array([0, 0, 0, 3, 3, 0, 3, 0])
    assert with_more(stands, 2).tolist() == stands.tolist()
    for n in range(2, 9):
        more = with_more(stands, n)
        assert (more == np.arange(8)).sum() == n and masses(more)[1].sum() == 8
    for n in (1, 9):
        with pytest.raises(ValueError):
            with_more(stands, n)
