"""Stems of other conversations, in host memory.

The cache holds one stem, that of the last prompt (reuse.py). When a prompt does not begin with all of it, the stem is
copied out before its cells are given up, and copied back when a prompt comes that begins with it:

    prompt of A   the stem of A is in the cache
    prompt of B   the stem of A is saved; that of B is in the cache
    prompt of A   the stem of B is saved; that of A is restored, and attached as if B had never been

What is copied is what llama.cpp writes of a sequence: K and V of its cells, bit for bit. A restored row is in its own
cell again, so the results stay bit-identical to a fresh context's. Nothing is copied while prompts of one conversation
follow each other. A conversation is known by its content alone: whoever asks about the same picture shares its stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import EngineError
from ..llamacpp.context import DecoderContext
from ..rows import Segment
from .reuse import KeptRows


@dataclass
class _Saved:
    """A stem that is not in the cache. data: what the cache held of it."""

    stem: KeptRows
    data: np.ndarray

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes + sum(array.nbytes for array in self.stem.arrays)


class SavedStems:
    """Stems, the least recently used of which goes first.

    Args:
        n_bytes: Bytes of all together, 0 for none: the last prompt's stem is then the only one.

    Attributes:
        used: Bytes that are held.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.used = 0
        self._saved: list[_Saved] = []  # the least recently used one first

    def __len__(self) -> int:
        return len(self._saved)

    def clear(self) -> None:
        self._saved.clear()
        self.used = 0

    def change_to(self, context: DecoderContext, segments: Sequence[Segment], n_prefix: int, layer: int | None) -> None:
        """Puts the stem into the cache that a new prompt can use most of, and saves the one that goes.

        The prompt is attached next. Arguments are those of reuse.attach.
        """
        stem: KeptRows | None = context.owner.stem
        if not self.n_bytes or (stem is not None and not stem.is_intact(context)):
            return
        n = 0 if stem is None else stem.n_usable(segments, n_prefix, layer)
        best, n_best = None, n
        for saved in self._saved:
            n_usable = saved.stem.n_usable(segments, n_prefix, layer)
            if n_usable > n_best:
                best, n_best = saved, n_usable
        if best is not None:  # out of the way: the other one may need the room
            self._remove(best)
        if stem is not None and n < stem.n_rows:
            self._save(context, stem)
        if best is None:
            return
        context.clear()
        try:
            best.stem.restore(context, best.data)
        except EngineError:
            context.clear()  # the prompt is read as a new one
            return
        context.owner.stem = best.stem
        if n_best < best.stem.n_rows:  # the prompt goes on without the rest of it
            self._add(best)

    def save(self, context: DecoderContext, *, answering: bool = False) -> None:
        """Saves the stem in the cache, if there is one and room for it. The cache stays as it is.

        answering: The prompt after the stem is still in use.
        """
        stem: KeptRows | None = context.owner.stem
        if self.n_bytes and stem is not None and (answering or stem.is_intact(context)):
            self._save(context, stem)

    def _save(self, context: DecoderContext, stem: KeptRows) -> None:
        data = stem.save(context, self.n_bytes - sum(array.nbytes for array in stem.arrays))
        if data is not None:
            self._add(_Saved(stem, data))

    def _add(self, saved: _Saved) -> None:
        if saved.n_bytes > self.n_bytes:
            return
        self._saved.append(saved)
        self.used += saved.n_bytes
        while self.used > self.n_bytes:
            self._remove(self._saved[0])

    def _remove(self, saved: _Saved) -> None:
        self._saved = [other for other in self._saved if other is not saved]
        self.used -= saved.n_bytes
