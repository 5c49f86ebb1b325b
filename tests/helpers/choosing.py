"""Distances between tokens, choices of a decoder stage that are easy to reason about, greedy generation after it."""

import numpy as np

from helpers import stock
from star_edge.pruning.representatives import select
from star_edge.pruning.selection import PLACE_WEIGHT, Selection, Tokens


def distances(tokens):
    """Of all pairs, (n, n) float64: 1 - cosine divided by its mean, plus PLACE_WEIGHT times that on the grid."""
    unit = tokens.unit_vectors.astype(np.float64)
    far = np.maximum(1 - unit @ unit.T, 0)
    far /= far.mean()
    places = tokens.place_distances()
    if places is not None:
        far += PLACE_WEIGHT * places
    np.fill_diagonal(far, 0)
    return far


def keep_all(seen, n):
    return Selection(np.arange(len(seen.attention)))


def by_share(seen, n, share=0.0):
    """The n best by attention; with a share, that part of n stands for the rest, spread evenly."""
    tokens = Tokens(seen.hidden, seen.rows, mass=seen.mass)
    return select("even" if share else "none", tokens, seen.attention, n, share)


def by_score(seen, n):
    return by_share(seen, n)


def generate(context, state, n):
    """Greedy continuation through llama_cpp's own decode path, with the tap's position shift."""
    first = state.n_cells + state.gap
    context.tap.set_position_shift(first, state.next_position - first)
    out, history, tokens = state.logits, [state.logits], []
    for i in range(n):
        tokens.append(int(out.argmax()))
        context.tap.begin()
        out = stock.decode(context.llama, tokens=tokens[-1:], positions=[first + i])
        history.append(out)
    return history, tokens
