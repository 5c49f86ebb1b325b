"""Rows of a decoder: what a decode is given, and what a prompt is made of. Knows no pixels, no strings, no library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SomeRows = slice | np.ndarray


@dataclass
class Rows:
    """Rows of one decode: token ids or embeddings, with the positions that RoPE should see.

    tokens: (n,) int32, or None.
    embeddings: (n, n_embd_inp) float32, or None. Where a window starts past layer 0 they are read too by models that
        bring more of them in at later layers (DeepStack, Gemma 4); without both, zeros stand for them.
    positions: (n,) int32, or (4, n) for M-RoPE.
    """

    positions: np.ndarray
    tokens: np.ndarray | None = None
    embeddings: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.positions.shape[-1])

    def slice(self, start: int, stop: int) -> Rows:
        return self.take(slice(start, stop))

    def take(self, rows: _SomeRows) -> Rows:
        """Some of the rows."""

        def part(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        return Rows(np.ascontiguousarray(self.positions[..., rows]), part(self.tokens), part(self.embeddings))


@dataclass
class Segment:
    """A run of text tokens or the tokens of one image, in prompt order.

    image: index of the image, or None for text.
    causal: False for images whose rows attend to each other both ways (Gemma 3).
    mass: original tokens that each row stands for, (n,), or None for one each. Its cell gets log(mass) added to its
        attention logits.
    pruned: Tokens of the image have been dropped.
    """

    rows: Rows
    image: int | None = None
    causal: bool = True
    mass: np.ndarray | None = None
    pruned: bool = False


Part = tuple[Segment, int, int]  # first row of the segment, and the one after the last


def decode_groups(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that share decodes from layer 0 on.

    Images with no text between them do, once tokens of one of them have been dropped. A GPU reads all weights and is
    waited for at each decode, however few its rows are. While the images are whole, each has decodes of its own, as on
    stock: kernels round differently for another number of rows. Images whose rows attend to each other never share
    decodes. Text and images cannot at layer 0: a batch holds tokens or embeddings.
    """
    adjacent: list[list[Segment]] = []
    for segment in segments:
        if adjacent and all(s.image is not None and s.causal for s in (adjacent[-1][-1], segment)):
            adjacent[-1].append(segment)
        else:
            adjacent.append([segment])
    groups = []
    for images in adjacent:
        groups += [images] if any(s.pruned for s in images) else [[s] for s in images]
    return groups


def pieces(group: Sequence[Segment], size: int) -> Iterator[list[Part]]:
    """The parts of each decode of a group: at most `size` rows (n_ubatch) together, so that one decode is one graph."""
    parts: list[Part] = []
    room = size
    for segment in group:
        at, n = 0, len(segment.rows)
        while at < n:
            end = min(n, at + room)
            parts.append((segment, at, end))
            at, room = end, room - (end - at)
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


def decodes(segments: Sequence[Segment], size: int) -> Iterator[list[Part]]:
    """The parts of each decode from layer 0 on."""
    for group in decode_groups(segments):
        yield from pieces(group, size)
