"""What a prompt leaves behind for the next one that begins alike: a further question about the same image, or the same
system prompt.

Kept are the rows up to the last image (without one, all rows), called the stem. What they are does not depend on the
text after
them: causal attention looks back only, and an image's rows look at each other within one decode.

    text before the first image  all layers are in their cells
    from the first image on      without a decoder stage as well; with one, layers < K are in their cells, whether the
                                 question that was asked then kept them or not, and the states that enter layer K in
                                 `hidden`

Invariants, on which `attach` relies and which it checks as far as llama.cpp can tell:

1. Row i of the stem is in cell i. Only such prompts are kept, and rows that come back are compared with it.
2. Its cells belong to sequence PARKED from the end of one prompt to the beginning of the next, beside whatever else
   they belong to. llama_kv_cache::find_slot gives out no cell that has a sequence, so nobody overwrites them; whoever
   clears the cache or cuts it takes them out of PARKED, which is seen in its positions.
3. The same rows come from the same decodes: pieces of n_ubatch rows, compared as the decoder got them (token ids or
   embeddings, positions, masses). Nothing is concluded from names, configs or hashes.
4. Layer K itself is not kept: resuming has overwritten the kept rows there, from decodes of fewer rows, which round
   differently. The stem comes back by a decode of the window [K, K), which computes K and V of that layer from `hidden`
   as the probe did, and gives each cell its position back, all without the layers below.
5. No cell holds anything else: whatever the last prompt left besides is freed first, so that all that follows goes to
   the cells, and runs over as many, as in a fresh context. That makes it equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..llamacpp.context import MAIN, N_SEQUENCES, PARKED, DecoderContext
from ..rows import Segment


@dataclass
class Stem:
    """Rows that may be used again.

    segments: as they were read. n_prefix: rows of the text before the first image, n_rows: all.
    layer: K of the first decoder stage, or None. hidden: with a stage, states that enter layer K, (n_rows - n_prefix,
        n_embd) float32.
    n_ubatch: rows of one decode. span: first and last position of sequence PARKED. buffer: see `attach`.
    """

    segments: list[Segment]
    n_prefix: int
    n_rows: int
    layer: int | None
    hidden: np.ndarray | None
    n_ubatch: int
    span: tuple[int, int]
    buffer: np.ndarray


@dataclass
class Attached:
    """n_main: rows of the new prompt that are in sequence MAIN, ready. hidden: states of the rows after the prefix that
    are in no sequence, and have to be brought back to theirs by decodes of the window [K, K), (n, n_embd) float32.
    """

    n_main: int = 0
    hidden: np.ndarray | None = None

    @property
    def n_rows(self) -> int:
        return self.n_main + (0 if self.hidden is None else len(self.hidden))


class RowsMovedError(Exception):
    """Rows that were kept did not come back to their cells: nothing of this cache may be used."""


def keep(
    context: DecoderContext,
    segments: Sequence[Segment],
    n_prefix: int,
    n_live: int,
    layer: int | None = None,
    hidden: np.ndarray | None = None,
) -> None:
    """Keeps a stem at the end of a prompt.

    segments: of the stem. n_live: how many of its rows are in MAIN, where they come first; dropped ones are in the
        sequences PARKED and after.
    layer, hidden: as in Stem.
    """
    for sequence in range(PARKED + 1, N_SEQUENCES):
        context.copy(sequence, PARKED, 0)
        context.remove(sequence, 0)
    context.copy(MAIN, PARKED, 0, n_live)
    n_rows = sum(len(s.rows) for s in segments)
    owner = context.owner
    span, buffer = context.span(PARKED), context.buffer
    owner.stem = Stem(list(segments), n_prefix, n_rows, layer, hidden, context.n_ubatch, span, buffer)
    owner.n_parked = n_rows - n_live


def attach(context: DecoderContext, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> Attached:
    """Puts what the stem and a new prompt have in common into MAIN, and frees all other cells. The stem is gone then.

    n_prefix: rows of the prompt before its first image. layer: K of its first decoder stage, or None.
    """
    owner = context.owner
    stem, owner.stem, owner.n_parked = owner.stem, None, 0
    others = [MAIN, *range(PARKED + 1, N_SEQUENCES)]
    if (
        stem is None
        or stem.buffer is not context.buffer  # Llama.load_state replaces it, and the cache with it
        or stem.n_ubatch != context.n_ubatch
        or context.span(PARKED) != stem.span
        or any(context.span(sequence) != (-1, -1) for sequence in others)
    ):
        context.clear()
        return Attached()
    n = _common_rows(stem, segments)
    if n > n_prefix and layer != stem.layer:
        n = n_prefix  # whole pieces, as the prefix ends with one
    n_main = n if layer is None else min(n, n_prefix)
    context.copy(PARKED, MAIN, 0, n_main)
    context.remove(PARKED, 0)
    return Attached(n_main, stem.hidden[: n - n_main]) if n > n_main else Attached(n_main)


def _common_rows(stem: Stem, segments: Sequence[Segment]) -> int:
    """Rows of the whole decodes that both begin with. The prompt's last one is not among them: its logits are
    wanted.
    """
    n = 0
    for s, (old, new) in enumerate(zip(stem.segments, segments)):
        for a, b in zip(old.pieces(stem.n_ubatch), new.pieces(stem.n_ubatch)):
            is_final = s == len(segments) - 1 and b[1] == len(new.rows)
            if a != b or is_final or not _equal(old, new, *a):
                return n
            n += a[1] - a[0]
        if len(old.rows) != len(new.rows):
            return n
    return n


def _equal(one: Segment, other: Segment, first: int, last: int) -> bool:
    if (one.image is None) != (other.image is None) or one.causal != other.causal:
        return False
    a, b = one.rows.slice(first, last), other.rows.slice(first, last)
    mass = lambda s: None if s.mass is None else s.mass[first:last]
    pairs = ((a.tokens, b.tokens), (a.embeddings, b.embeddings), (a.positions, b.positions), (mass(one), mass(other)))
    return all(x is y if x is None or y is None else np.array_equal(x, y) for x, y in pairs)
