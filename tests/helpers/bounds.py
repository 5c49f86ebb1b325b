"""How far a result may lie from its reference: what the backend itself rounds, measured in the test, times a factor.

No number seen on one processor is a bound here: AVX2 and AVX-512 add up in other orders, some kernels take activations
as bf16, f16 or 8-bit blocks, GPUs multiply in TF32, flash attention adds up in f16. The scheme:

1. Stock llama.cpp, without star_edge, computes on this backend something whose right value is known: the logits of the
   unpruned prompt, of which transformers or the float64 reference says what they are. `rounding` is the root mean
   square of its error, in units of the reference's standard deviation. It is made of hundreds of values, so that luck
   with a few does not matter.
2. The error of what star_edge computes in the same mode may have MEAN_FACTOR times that root mean square: with other
   rows, and fewer of them, errors average out less, up to 2.7 times has been seen. No single value may be off by more
   than FACTOR times: the largest of some hundred normal errors is four times their root mean square, and 7.9 times has
       been seen. The rest of both is reserve.
3. FLOOR stands for the measured value where that is smaller: 16 units in the last place of float32.
4. Each test also shows that a wrong result (a lost position, another row, another layer, nothing pruned) lies outside
   of its bound, so that a bound that has grown too wide fails the test as well.

Probabilities and what is made of them (scores) are bounded by the same share, of the highest one: d p = p d(logit).

Where both sides compute the same numbers with the same kernels no bound is needed: equality is bit for bit. Where
star_edge works something out in float32 from numbers that stock has too (scores from q and k), the bound is that of
float32 arithmetic: FLOAT32.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from llama_cpp import Llama

from helpers import stock

FACTOR, MEAN_FACTOR = 24.0, 6.0
FLOOR = 2.0**-20
FLOAT32 = 2.0**-16  # of the highest: sums of some hundred terms in float32, and an exponential of them


def rounding(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Root mean square of (got - right) in units of the standard deviation of `right`, over all pairs of equal
    shapes.
    """
    errors = [((np.asarray(got, np.float64) - right) / np.std(right)).ravel() for got, right in pairs]
    return max(FLOOR, float(np.sqrt(np.mean(np.square(np.concatenate(errors))))))


def relative(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Root mean square of (got - right) over that of `right`: what an encoder rounds, from its features, which must be
    known to be right (`are_features`). Its scores may be off by as much (`share`)."""
    pairs = [(np.asarray(got, np.float64), np.asarray(right, np.float64)) for got, right in pairs]
    error, size = (sum(np.square(x).sum() for x in xs) for xs in ([g - r for g, r in pairs], [r for _, r in pairs]))
    return max(FLOOR, float(np.sqrt(error / size)))


def are_features(got: np.ndarray, right: np.ndarray) -> bool:
    """Whether all rows point where the right ones do: cosines of 0.999, which is off by 4.5% of the length. An encoder
    that rounds what it multiplies to f16 is off by 0.1%, to bf16 by 1%; one with a wrong position or a layer less by
    half and more."""
    return bool((cosines(got, right) >= 0.999).all())


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def share(rounding: float) -> float:
    """Of the highest score (or of 1, for probabilities)."""
    return FACTOR * rounding


def of(right: np.ndarray, rounding: float) -> float:
    """The largest difference from `right` that rounding explains."""
    return FACTOR * rounding * float(np.std(right))


def are_close(got: np.ndarray, right: np.ndarray, rounding: float) -> bool:
    """Whether rounding explains all differences of two arrays of some hundred values, logits as a rule. False if there
    is a NaN.
    """
    error = (np.asarray(got, np.float64) - right) / np.std(right)
    return bool(
        np.sqrt(np.mean(np.square(error))) <= MEAN_FACTOR * rounding and np.abs(error).max() <= FACTOR * rounding
    )


def of_decoder(llama: Llama, prompt: object, reference: object, n_generate: int = 8) -> float:
    """`rounding` of a stock Llama with an unpruned prompt (conftest.RandomPrompt) and the answer, against the float64
    reference.
    """
    stock.clear(llama)
    history, tokens = stock.run_segments(llama, prompt.segments, prompt.next_position, n_generate)
    unpruned = reference.prune(prompt.embed(reference), prompt.positions, prompt.image_of_row)
    _, right = reference.generate(unpruned, n_generate + 1, prompt.next_position, forced=[*tokens, 0])
    return rounding(zip(history, right))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; NaN is infinitely far."""
    d = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
    return float(d) if np.isfinite(d) else np.inf


def assert_best(kept: np.ndarray, scores: np.ndarray, limit: float) -> None:
    """Nothing that is kept scores less than what is dropped, but for ties: by less than twice the limit."""
    assert (scores[kept] >= np.sort(scores)[-len(kept)] - 2 * limit).all()
