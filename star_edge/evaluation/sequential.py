"""Stops a comparison early: what no further question can change, and odds that are too long.

Questions are asked a few at a time. A config that loses many answers shows it long before the last question. A fixed
test that is looked at after every batch rejects too often, so this one may be looked at at any time.
"""

from __future__ import annotations

from collections.abc import Iterable

# Shares of the capital that are staked: large ones see a large loss at once, small ones a small loss later
_STAKES = (0.95, 0.8, 0.5, 0.25, 0.1, 0.05)
ALPHA = 0.05  # at most so many good configs are rejected by odds


def odds_against(values: Iterable[float]) -> float:
    """Evidence against "the mean is 0 or more", from values of -1..1 in a random order.

    A gambler begins with 1 and stakes a share s of it on each value being below 0. The capital becomes
    prod(1 - s x). If the mean is 0 or more, it does not grow on average, whatever the distribution, and the
    probability that it ever reaches 1 / alpha is at most alpha (Ville's inequality). So it may be looked at after
    every value. The capital is spread evenly over several stakes, which keeps the property.

    Waudby-Smith and Ramdas (2024), Estimating means of bounded random variables by betting, J. R. Stat. Soc. B 86:1,
    section 4. Ville (1939), Etude critique de la notion de collectif.

    Args:
        values: Values of -1..1. Those of one image are one value, since they are not independent.

    Returns:
        The largest capital so far, >= 1. 1 / ALPHA or more rejects.
    """
    capitals = [1.0 / len(_STAKES)] * len(_STAKES)
    most = 1.0
    for x in values:
        capitals = [capital * (1.0 - stake * x) for capital, stake in zip(capitals, _STAKES)]
        most = max(most, sum(capitals))
    return most


def cannot_reach_zero(total: float, most_to_come: float) -> bool:
    """Whether a sum stays below 0 even if all that is to come is as high as it can be (curtailed sampling).

    The decision is then the one that all questions would have led to.
    """
    return total + most_to_come < -1e-9
