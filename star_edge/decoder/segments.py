"""What a prompt is made of for the decoder. Knows no pixels and no strings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..llamacpp.context import Rows


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
