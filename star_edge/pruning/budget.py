"""How several images share a budget: the crops of one picture, or all images of a prompt (frames of a video).

The budget is divided first, by what each image would contribute to one choice over all of them. Each image then chooses
its own tokens with its part, as a single image does. Knows nothing of models and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from .core import Points
from .selection import PLACE_WEIGHT, Tokens, top_k

FLOOR = 0.25  # of an equal share: every image gets it
MAX_JOINT = 1024  # tokens that are compared with each other


@dataclass
class JointTokens(Tokens):
    """Tokens of several images, one image after the other.

    Attributes:
        image: Index of each token's image, ascending, (n,) int64.
        picture: Index of each token's picture, (n,) int64. Images of one picture are its crops.
        places: (row, column) of each token on the largest grid, (n, 2) float32, NaN for none.
        parts: The tokens of each image.
    """

    image: np.ndarray = field(kw_only=True)
    picture: np.ndarray = field(kw_only=True)
    places: np.ndarray = field(kw_only=True)
    parts: Sequence[Tokens] = field(kw_only=True)

    @cached_property
    def unit_vectors(self) -> np.ndarray:
        return np.concatenate([part.unit_vectors for part in self.parts])

    def place_distances(self) -> np.ndarray | None:
        """Distances within the images divided by their mean, (n, n) float32, or None if all are 0.

        A place is a place within its image: what returns at the same place of a later frame is near. The distance is 1
        to and from tokens without a place, and between crops of one picture, which show different places.
        """
        return _recent_places(self.places.tobytes(), self.image.tobytes(), self.picture.tobytes())


# Pictures of one size are sampled at the same places. Of at most MAX_JOINT tokens: 4 MiB each
@lru_cache(maxsize=2)
def _recent_places(places: bytes, image: bytes, picture: bytes) -> np.ndarray | None:
    """`JointTokens.place_distances`, from the bytes of its attributes."""
    where = np.frombuffer(places, np.float32).reshape(-1, 2)
    of_image, of_picture = np.frombuffer(image, np.int64), np.frombuffer(picture, np.int64)
    row, column = np.nan_to_num(where.T)
    apart: np.ndarray = (row[:, None] - row) ** 2
    apart += (column[:, None] - column) ** 2
    np.sqrt(apart, out=apart)
    nowhere = np.isnan(where[:, 0])
    unknown = (of_picture[:, None] == of_picture) & (of_image[:, None] != of_image)
    unknown[nowhere] = unknown[:, nowhere] = True
    np.copyto(apart, 0.0, where=unknown)
    total = float(apart.sum())
    if not total:
        return None
    apart /= total / (apart.size - np.count_nonzero(unknown))
    np.copyto(apart, 1.0, where=unknown)
    return apart


def join(
    parts: Sequence[Tokens], pictures: Sequence[int], most: int | None = None, with_vectors: bool = True
) -> JointTokens:
    """Joins the tokens of several images.

    Args:
        parts: Tokens of each image.
        pictures: Index of each image's picture.
        most: If there are more tokens than this in all, each image is sampled evenly. Images of equal size are sampled
            at the same places.
        with_vectors: False: `vectors` is (n, 0). Long ones are many bytes, and few counts read them.
    """
    if not with_vectors and all("unit_vectors" in vars(part) for part in parts):
        parts = [part.changed(vectors=part.vectors[:, :0]) for part in parts]
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
        np.concatenate([part.vectors if with_vectors else part.vectors[:, :0] for part in parts]),
        np.full(sum(sizes), -1),
        None,
        None if all(part.mass is None for part in parts) else np.concatenate([part.masses for part in parts]),
        joined([part.attention for part in parts]),
        joined([part.row_attention for part in parts]),
        parts[0].text_vectors,
        parts[0].seed,
        image=np.repeat(np.arange(len(parts)), sizes),
        picture=np.repeat(np.asarray(pictures, np.int64), sizes),
        places=np.concatenate(places),
        parts=parts,
    )


def by_score(tokens: JointTokens, scores: np.ndarray, k: int) -> np.ndarray:
    """How many of the k best tokens, by score / sqrt(mass), each image has, (n_images,) int64."""
    best = top_k(np.asarray(scores, np.float64) / np.sqrt(tokens.masses), k)
    return np.bincount(tokens.image[best], minlength=tokens.image[-1] + 1)


def by_distinctness(tokens: JointTokens, k: int, n_threads: int = 1) -> np.ndarray:
    """How many of k distant tokens each image shows first, (n_images,) int64.

    The k tokens are picked one by one, each the farthest from all before it, as in `representatives.cluster`. They are
    at least a distance r apart. A token within r / 2 of a pick shows the same thing, and the pick counts for the first
    image that shows it. A frame that repeats an earlier one, up to noise, therefore counts nothing.
    """
    points = Points(tokens.unit_vectors, tokens.place_distances(), PLACE_WEIGHT, n_threads)
    first = points.farthest(k)  # images come in order
    return np.bincount(tokens.image[first], minlength=tokens.image[-1] + 1)


def divide(
    parts: Sequence[Tokens],
    pictures: Sequence[int],
    n_original: Sequence[int],
    total: int,
    count: Callable[[JointTokens, int], np.ndarray],
    compares: bool,
    reads_vectors: bool = False,
) -> list[int]:
    """Divides a budget of `total` tokens among images.

    Args:
        parts: Tokens that each image has.
        pictures: Index of each image's picture.
        n_original: Tokens that each image had at first. Equal shares are in proportion to them.
        total: Tokens that stay of all images.
        count: count(tokens, k) says how many of k chosen tokens each image has. An image's budget is in proportion, and
            at least FLOOR of an equal share and one token.
        compares: `count` takes time and memory in the square of the tokens, so it gets at most MAX_JOINT of them.
        reads_vectors: `count` reads `Tokens.vectors`, and not `unit_vectors` alone.

    Returns:
        Tokens that stay of each image.

    Raises:
        ValueError: `total` is less than the number of images with tokens, or more than all tokens.
    """
    sizes = np.array([len(part) for part in parts])
    if not np.count_nonzero(sizes) <= total <= sizes.sum():
        raise ValueError(f"cannot keep {total} of {sizes.sum()} tokens of {len(parts)} images")
    if not sizes.all():  # a crop of nothing but special tokens
        some = np.flatnonzero(sizes).tolist()
        counts = np.zeros(len(parts), int)
        counts[some] = divide(
            [parts[i] for i in some],
            [pictures[i] for i in some],
            [n_original[i] for i in some],
            total,
            count,
            compares,
            reads_vectors,
        )
        return [int(n) for n in counts]
    if total == sizes.sum():
        return [int(n) for n in sizes]
    tokens = join(parts, pictures, MAX_JOINT if compares else None, reads_vectors)
    k = max(1, round(total * len(tokens) / int(sizes.sum())))
    wanted = np.asarray(count(tokens, k), np.float64)
    equal = total * np.asarray(n_original) / sum(n_original)
    floors = np.minimum(sizes, np.maximum(1, np.floor(FLOOR * equal)))
    if floors.sum() > total:  # few tokens for many images: one each
        floors = np.ones(len(parts))
    return _apportion(wanted * total / wanted.sum(), floors, sizes, total)


def in_proportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to `sizes`. Each part is at most its size, and at least 1 unless the size is 0.

    total: between the number of sizes other than 0 and the sum of all.
    """
    most = np.asarray(sizes)
    return _apportion(total * most / max(1, most.sum()), np.minimum(most, 1), most, total)


def _apportion(wanted: np.ndarray, floors: np.ndarray, most: np.ndarray, total: int) -> list[int]:
    """Whole numbers near `wanted` within floors..most that add up to `total`, rounded by the largest remainder."""
    counts = np.clip(wanted, floors, most)
    room = most - counts if counts.sum() < total else counts - floors
    if room.sum() > 0:
        counts += (total - counts.sum()) * room / room.sum()
    whole = np.floor(counts + 1e-9)
    for i in np.argsort(whole - counts, kind="stable")[: total - int(whole.sum())]:
        whole[i] += 1
    return [int(n) for n in whole]
