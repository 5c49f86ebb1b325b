"""What a prompt leaves for the next one that begins alike: the same image with another question, or the same system
prompt.

The rows up to the last image are kept; without an image, all rows. They are called the stem. They do not depend on the
text after them: causal attention only looks back, and an image's rows look at each other within one decode.

    text before the first image  all layers are in the cells
    from the first image on      without a decoder stage: all layers are in the cells
                                 with one: layers < K are in the cells, of dropped rows too, and the states that enter
                                 layer K are in `hidden`

Hybrid decoders keep a stem in another way: hybrid.py. One stem is in the cache at a time; those of other conversations
wait in host memory: saved.py.

`attach` relies on these invariants, and checks all that llama.cpp lets it see:

1. Row i of the stem is in cell i. Only such prompts are kept, and the cells of rows that come back are compared.
2. Between two prompts the stem's cells belong to sequence PARKED, and perhaps to others. llama_kv_cache::find_slot
   gives out no cell that has a sequence, so nothing overwrites them. Clearing or cutting the cache takes cells out of
   PARKED, which shows in its positions.
3. The same rows come from the same decodes, compared as the decoder got them (token ids or embeddings, positions,
   masses). What is in one decode follows from the rows after it too: images may share decodes (rows.decode_groups).
   Names, configs and hashes prove nothing.
4. Layer K itself is not kept. Resuming has overwritten it for the kept rows, from decodes of fewer rows, which round
   differently. A decode of the window [K, K) computes K and V of that layer from `hidden`, as the probe did, and gives
   each cell its position back. The layers below are not computed.
5. No cell holds anything else. All other cells are freed first, so later rows get the same cells, and attend over as
   many, as in a fresh context. The results are therefore bit-identical.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..llamacpp import saved_rows
from ..llamacpp.context import MAIN, N_SEQUENCES, PARKED, DecoderContext
from ..rows import Part, Segment, decodes


@dataclass
class KeptRows(ABC):
    """Rows that may be used again.

    Attributes:
        segments: The rows, as they were read.
        n_prefix: Rows of the text before the first image.
        n_rows: All rows.
        layer: K of the first decoder stage, or None.
        hidden: With a decoder stage, the states that enter layer K, (n_rows - n_prefix, n_embd) float32.
        n_ubatch: Rows of one decode.
        buffer: `Llama.input_ids` at that time. Llama.load_state replaces it, and the cache with it.
    """

    segments: list[Segment]
    n_prefix: int
    n_rows: int
    layer: int | None
    hidden: np.ndarray | None
    n_ubatch: int
    buffer: np.ndarray

    @abstractmethod
    def is_intact(self, context: DecoderContext) -> bool:
        """Whether the cache still holds these rows, as far as llama.cpp lets it be seen."""

    @abstractmethod
    def n_usable(self, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> int:
        """Rows that a new prompt may use. n_prefix: its rows before its first image. layer: K of its first decoder
        stage, or None.
        """

    @abstractmethod
    def save(self, context: DecoderContext, most: int) -> np.ndarray | None:
        """What the cache holds of these rows, (n,) uint8, or None if that is more than `most` bytes."""

    @abstractmethod
    def restore(self, context: DecoderContext, data: np.ndarray) -> None:
        """Puts them back into an empty cache, as they were when `save` gave the data."""

    @property
    def arrays(self) -> list[np.ndarray]:
        """What these rows hold in host memory."""
        of_segments = [(s.rows.tokens, s.rows.embeddings, s.rows.positions, s.mass) for s in self.segments]
        return [array for four in (*of_segments, (self.hidden,)) for array in four if array is not None]


@dataclass
class Stem(KeptRows):
    """Rows in sequence PARKED. span: its first and last position."""

    span: tuple[int, int]

    def is_intact(self, context: DecoderContext) -> bool:
        others = [MAIN, *range(PARKED + 1, N_SEQUENCES)]
        return (
            self.buffer is context.buffer
            and self.n_ubatch == context.n_ubatch
            and context.span(PARKED) == self.span
            and all(context.span(sequence) == (-1, -1) for sequence in others)
        )

    def n_usable(self, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> int:
        n = common_rows(self.segments, segments, self.n_ubatch)
        # whole pieces, as the prefix ends with one
        return n_prefix if n > n_prefix and layer != self.layer else n

    def save(self, context: DecoderContext, most: int) -> np.ndarray | None:
        return saved_rows.save_rows(context.llama, PARKED, most)

    def restore(self, context: DecoderContext, data: np.ndarray) -> None:
        saved_rows.restore_rows(context.llama, PARKED, data)


@dataclass
class Attached:
    """What a new prompt gets from the stem.

    Attributes:
        n_main: Rows of the new prompt that are ready, in sequence MAIN.
        hidden: States that enter layer K of further rows, (n, n_embd) float32. Decodes of the window [K, K) bring these
            rows back to their cells.
    """

    n_main: int = 0
    hidden: np.ndarray | None = None

    @property
    def n_rows(self) -> int:
        return self.n_main + (0 if self.hidden is None else len(self.hidden))


class RowsMovedError(Exception):
    """Kept rows did not come back to their cells, so nothing in this cache may be used."""


def keep(
    context: DecoderContext,
    segments: Sequence[Segment],
    n_prefix: int,
    n_live: int,
    layer: int | None = None,
    hidden: np.ndarray | None = None,
) -> None:
    """Keeps a stem at the end of a prompt.

    Args:
        context: The decoder.
        segments: The stem's segments.
        n_prefix: Rows of the text before the first image.
        n_live: The stem's rows in MAIN, where they come first. Dropped rows are in the sequences from PARKED on.
        layer: K of the first decoder stage, or None.
        hidden: As in Stem.
    """
    for sequence in range(PARKED + 1, N_SEQUENCES):
        context.copy(sequence, PARKED, 0)
        context.remove(sequence, 0)
    context.copy(MAIN, PARKED, 0, n_live)
    n_rows = sum(len(s.rows) for s in segments)
    owner = context.owner
    span, buffer = context.span(PARKED), context.buffer
    owner.stem = Stem(list(segments), n_prefix, n_rows, layer, hidden, context.n_ubatch, buffer, span)
    owner.n_parked = n_rows - n_live


def attach(context: DecoderContext, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> Attached:
    """Moves the rows that the stem and a new prompt share into MAIN, and frees all other cells. The stem is then gone.

    Args:
        context: The decoder.
        segments: The new prompt.
        n_prefix: Rows of the prompt before its first image.
        layer: K of its first decoder stage, or None.
    """
    owner = context.owner
    stem, owner.stem, owner.n_parked = owner.stem, None, 0
    if stem is None or not stem.is_intact(context):
        context.clear()
        return Attached()
    n = stem.n_usable(segments, n_prefix, layer)
    n_main = n if layer is None else min(n, n_prefix)
    context.copy(PARKED, MAIN, 0, n_main)
    context.remove(PARKED, 0)
    return Attached(n_main, stem.hidden[: n - n_main]) if n > n_main else Attached(n_main)


def common_rows(stem: Sequence[Segment], segments: Sequence[Segment], n_ubatch: int) -> int:
    """Rows of the whole decodes that both begin with, without the prompt's last decode, whose logits are needed."""
    n, n_rows = 0, sum(len(s.rows) for s in segments)
    for old, new in zip(decodes(stem, n_ubatch), decodes(segments, n_ubatch)):
        n_read = n + sum(last - first for _, first, last in new)
        if n_read == n_rows or len(old) != len(new) or not all(map(_equal, old, new)):
            return n
        n = n_read
    return n


def _equal(old: Part, new: Part) -> bool:
    (one, first, last), (other, *span) = old, new
    if span != [first, last] or (one.image is None) != (other.image is None) or one.causal != other.causal:
        return False
    a, b = one.rows.slice(first, last), other.rows.slice(first, last)
    if a.embeddings is not None and b.embeddings is not None and not np.array_equal(a.embeddings[0], b.embeddings[0]):
        return False  # another picture, mostly: no need to compare megabytes

    def mass(s: Segment) -> np.ndarray | None:
        return None if s.mass is None else s.mass[first:last]

    pairs = ((a.tokens, b.tokens), (a.embeddings, b.embeddings), (a.positions, b.positions), (mass(one), mass(other)))
    return all(x is y if x is None or y is None else np.array_equal(x, y) for x, y in pairs)
