"""Rows of a decoder: what a decode is given, and what a prompt is made of. Knows no pixels, no strings, no library."""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    rows: Rows
    image: int | None = None
    causal: bool = True
    mass: np.ndarray | None = None

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """First row, and the one after the last, of each decode: at most `size` rows (n_ubatch), so that one decode is
        one graph.
        """
        n = len(self.rows)
        return ((at, min(n, at + size)) for at in range(0, n, size))
