"""The parts of a prompt, as the decoder sees them. Knows no pixels and no strings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..llamacpp.context import Rows


@dataclass
class Segment:
    """A run of text tokens, or the tokens of one image, in prompt order.

    Attributes:
        rows: The rows.
        image: Index of the image, or None for text.
        causal: False for images whose rows attend to each other both ways (Gemma 3).
        mass: Original tokens that each row stands for, (n,) float64. None: one each. log(mass) is added to the
            attention logits of the row's KV cell.
    """

    rows: Rows
    image: int | None = None
    causal: bool = True
    mass: np.ndarray | None = None

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """[first, last) rows of each decode. A decode of at most `size` (n_ubatch) rows is one graph."""
        n = len(self.rows)
        return ((at, min(n, at + size)) for at in range(0, n, size))
