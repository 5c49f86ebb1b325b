"""How several images share a budget: the crops of one picture, or all images of a prompt (frames of a video).

A budget is divided first, by what each image would contribute to one choice over all of them; each then keeps its own
tokens with its own part, as an image alone does. Knows nothing of models and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .selection import Tokens, top_k

FLOOR = 0.25  # of an equal share, which an image gets whatever it contributes
MAX_JOINT = 1024  # tokens that are all compared with each other


@dataclass
class JointTokens(Tokens):
    """Tokens of several images, one image after the other.

    image: which one each token is of, (n,) int64, ascending. picture: (n,) int64; images of one picture are its crops.
    places: (row, column) of each on the largest grid, (n, 2) float32, NaN for none.
    """

    image: np.ndarray = field(kw_only=True)
    picture: np.ndarray = field(kw_only=True)
    places: np.ndarray = field(kw_only=True)

    def place_distances(self) -> np.ndarray | None:
        """Over their mean, (n, n) float32; 1 to and from tokens without a place and between crops of one picture, which
        show other places.

        Places are those within an image: what comes again in a later frame at the same place is near, whenever that is.
        """
        row, column = np.nan_to_num(self.places.T)
        apart: np.ndarray = (row[:, None] - row) ** 2
        apart += (column[:, None] - column) ** 2
        np.sqrt(apart, out=apart)
        nowhere = np.isnan(self.places[:, 0])
        unknown = (self.picture[:, None] == self.picture) & (self.image[:, None] != self.image)
        unknown[nowhere] = unknown[:, nowhere] = True
        np.copyto(apart, 0.0, where=unknown)
        total = float(apart.sum())
        if not total:
            return None
        apart /= total / (apart.size - np.count_nonzero(unknown))
        np.copyto(apart, 1.0, where=unknown)
        return apart


def join(parts: Sequence[Tokens], pictures: Sequence[int], most: int | None = None) -> JointTokens:
    """parts: the tokens of each image; of more than `most` in all, evenly chosen ones of each, the same ones of images
    of equal size.
    """
    n = sum(len(part) for part in parts)
    if most is not None and n > most:
        sampled = []
        for part in parts:
            m = max(1, round(len(part) * most / n))
            sampled.append(part.part(((np.arange(m) + 0.5) * len(part) / m).astype(np.int64)))
        parts = sampled
    sizes = [len(part) for part in parts]
    side = np.max([part.grid or (1, 1) for part in parts], axis=0)
    places = []
    for part in parts:
        where = np.full((len(part), 2), np.nan, np.float32)
        if part.grid is not None:
            on_grid = part.cells >= 0
            rows_columns = np.stack(np.divmod(part.cells[on_grid], part.grid[1]), axis=1)
            where[on_grid] = rows_columns * (side / part.grid)
        places.append(where)

    def joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        there = [array for array in arrays if array is not None]
        return np.concatenate(there, axis=-1) if len(there) == len(arrays) else None

    return JointTokens(
        np.concatenate([part.vectors for part in parts]),
        np.full(sum(sizes), -1),
        None,
        None if all(part.mass is None for part in parts) else np.concatenate([part.masses for part in parts]),
        joined([part.attention for part in parts]),
        joined([part.row_attention for part in parts]),
        parts[0].text_vectors,
        parts[0].seed,
        image=np.repeat(np.arange(len(parts)), sizes),
        picture=np.repeat(np.asarray(pictures), sizes),
        places=np.concatenate(places),
    )


def by_score(tokens: JointTokens, scores: np.ndarray, k: int) -> np.ndarray:
    """Of the k best by score / sqrt(mass), how many each image has, (n_images,) int64."""
    best = top_k(np.asarray(scores, np.float64) / np.sqrt(tokens.masses), k)
    return np.bincount(tokens.image[best], minlength=tokens.image[-1] + 1)


def by_distinctness(tokens: JointTokens, k: int) -> np.ndarray:
    """Of k tokens that are far from each other, how many each image shows first, (n_images,) int64.

    The tokens are chosen one by one, each the farthest from all before it, as `representatives.cluster` does. They end
    up at least a distance r apart. A token within r / 2 of one of them shows the same, and the one that counts for an
    image is the first to show it: a frame that repeats an earlier one, up to noise, has nothing of its own.
    """
    far = tokens.distances()
    pick = int(far.sum(axis=1).argmax())
    picks, nearest = [pick], far[pick].copy()
    nearest[pick] = -1.0
    radius = np.inf
    for _ in range(k - 1):
        pick = int(nearest.argmax())
        radius = max(0.0, float(nearest[pick]))
        picks.append(pick)
        np.minimum(nearest, far[pick], out=nearest)
        nearest[pick] = -1.0
    if np.isinf(radius):  # a single one
        radius = 0.0
    first = (far[picks] <= radius / 2).argmax(axis=1)  # images come in order
    return np.bincount(tokens.image[first], minlength=tokens.image[-1] + 1)


def divide(
    parts: Sequence[Tokens],
    pictures: Sequence[int],
    n_original: Sequence[int],
    total: int,
    count: Callable[[JointTokens, int], np.ndarray],
    compares: bool,
) -> list[int]:
    """Tokens of each image that stay, `total` in all.

    parts: the tokens that each has. pictures: which picture each is of. n_original: tokens that each had, by which an
        equal share is
    reckoned. count(tokens, k): of k chosen ones, how many each image has; its budget is in proportion to that, with a
    floor of FLOOR of an equal share and one token. compares: count takes time and memory in the square of the tokens,
    of which it gets
        MAX_JOINT at most.

    Raises:
        ValueError: total is not within the number of parts and that of their tokens.
    """
    sizes = np.array([len(part) for part in parts])
    if not np.count_nonzero(sizes) <= total <= sizes.sum():
        raise ValueError(f"cannot keep {total} of {sizes.sum()} tokens of {len(parts)} images")
    if not sizes.all():  # a crop of nothing but special tokens
        some = np.flatnonzero(sizes).tolist()
        counts = np.zeros(len(parts), int)
        counts[some] = divide(
            [parts[i] for i in some], [pictures[i] for i in some], [n_original[i] for i in some], total, count, compares
        )
        return [int(n) for n in counts]
    if total == sizes.sum():
        return [int(n) for n in sizes]
    tokens = join(parts, pictures, MAX_JOINT if compares else None)
    k = max(1, round(total * len(tokens) / int(sizes.sum())))
    wanted = np.asarray(count(tokens, k), np.float64)
    equal = total * np.asarray(n_original) / sum(n_original)
    floors = np.minimum(sizes, np.maximum(1, np.floor(FLOOR * equal)))
    if floors.sum() > total:  # few tokens for many images: one each comes first
        floors = np.ones(len(parts))
    return _apportion(wanted * total / wanted.sum(), floors, sizes, total)


def in_proportion(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to `sizes`, of which none is exceeded and none but 0 gets nothing.

    total: from the number of sizes other than 0 to their sum.
    """
    most = np.asarray(sizes)
    return _apportion(total * most / max(1, most.sum()), np.minimum(most, 1), most, total)


def _apportion(wanted: np.ndarray, floors: np.ndarray, most: np.ndarray, total: int) -> list[int]:
    """Whole numbers near `wanted` within floors..most, `total` in all; fractions go by the largest remainder."""
    counts = np.clip(wanted, floors, most)
    room = most - counts if counts.sum() < total else counts - floors
    if room.sum() > 0:
        counts += (total - counts.sum()) * room / room.sum()
    whole = np.floor(counts + 1e-9)
    for i in np.argsort(whole - counts, kind="stable")[: total - int(whole.sum())]:
        whole[i] += 1
    return [int(n) for n in whole]
