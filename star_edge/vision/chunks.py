"""What the encoder works with: the chunks of a tokenized prompt, and its output for an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..llamacpp.mtmd import free_chunks
from ..llamacpp.tap import SAMPLE_BYTES


@dataclass
class TextChunk:
    """A run of text. tokens: token ids, (n,) int32."""

    tokens: np.ndarray


@dataclass
class ImageChunk:
    """One image, preprocessed but not yet encoded.

    Attributes:
        handle: libmtmd's chunk.
        n_tokens: Image tokens that the encoder makes of it.
        positions: RoPE positions if the chunk's first is 0, (n_tokens,) int32, or (4, n_tokens) for M-RoPE (t, y, x,
            image or 0).
        moves: What is added to them for each position that the chunk starts later: 1, or 0 where a position counts from
            elsewhere (HunyuanOCR's rows and columns count from the image's corner).
        n_positions: Distance of the next token's position from the chunk's first.
        grid: (rows, columns) of its tokens, or None if they are not laid out on a grid.
        causal: False if its rows attend to each other both ways.
        special: Special tokens that the profile knows, (n_tokens,) bool. None: none.
        picture: Index of its picture in the prompt. A large picture is cut into several chunks (overview and tiles).
        content: Identifies the picture's pixels and the chunk's place in it; "" if unknown.
        size: (height, width) in pixels of what the encoder gets, or None if that is not known.
        video: Index of the video whose frame it is, or None.
        second: Time of that frame in its video. None: unknown, or it is no frame.
    """

    handle: object
    n_tokens: int
    positions: np.ndarray
    moves: np.ndarray
    n_positions: int
    grid: tuple[int, int] | None
    causal: bool
    special: np.ndarray | None = None
    picture: int = 0
    content: str = ""
    size: tuple[int, int] | None = None
    video: int | None = None
    second: float | None = None

    def positions_at(self, start: int) -> np.ndarray:
        """RoPE positions of its tokens if the first is at `start`."""
        moved: np.ndarray = self.positions + start * self.moves
        return moved


@dataclass
class Prompt:
    """The chunks of a tokenized prompt, in order. Holds memory of libmtmd until closed."""

    chunks: list[TextChunk | ImageChunk]
    _handle: object = None

    def join_frames(self, frames: Sequence[tuple[int, float | None] | None]) -> None:
        """Says which pictures are frames of a video.

        frames: For each picture the index of its video, and its time there in seconds or None. None: it is no frame.
        """
        for chunk in self.chunks:
            if isinstance(chunk, ImageChunk):
                chunk.video, chunk.second = frames[chunk.picture] or (None, None)

    def close(self) -> None:
        if self._handle is not None:
            free_chunks(self._handle)
            self._handle = None


@dataclass
class Encoded:
    """Output of the encoder for one image of n_tokens tokens, of which it has n.

    Attributes:
        embeddings: (n, n_embd_inp) float32. From `VisionEncoder.encode` it is a view of libmtmd's memory, valid until
            the next run.
        scores: Attention that each of them receives, (n,) float32, or None if not asked for.
        cells: Grid cell of each token, row by row, (n_tokens,) int64, -1 for none.
        score_seconds: Time spent on reading attention, in seconds.
        special: Special tokens, (n_tokens,) bool, or None. Their scores are 0.
        attention: Arrays of the `read` of `VisionEncoder.encode`.
        cached: Whether it comes from the cache.
        kept: The tokens that it has, ascending indices, (n,) int64. None: all.
        mass: Original tokens that each of them stands for, (n,) float64. None: one each.
        redundant: Tokens that were left out before the encoder, ascending indices.
        layer: M of the encoder stage. None: there was none.
        same_as: Index of an earlier image of the prompt that has the same pixels, and whose output this is; or None.
    """

    embeddings: np.ndarray
    scores: np.ndarray | None
    cells: np.ndarray
    score_seconds: float
    special: np.ndarray | None = None
    attention: list[np.ndarray] = field(default_factory=list)
    cached: bool = False
    kept: np.ndarray | None = None
    mass: np.ndarray | None = None
    redundant: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    layer: int | None = None
    same_as: int | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Original index of each of the n tokens, (n,) int64."""
        return np.arange(len(self.embeddings)) if self.kept is None else self.kept


class LooksKnownError(Exception):
    """An image's pixels look like those of an earlier one, and nothing has been computed. known: which one."""

    def __init__(self, known: int) -> None:
        super().__init__(f"the image looks like number {known} of those that it was compared with")
        self.known = known


class Compared:
    """Crops that the encoder has run on, to find those of equal pixels."""

    def __init__(self) -> None:
        self.numbers: list[int] = []  # their indices among the prompt's images
        self.samples = np.empty((0, SAMPLE_BYTES), np.uint8)  # of the pixels of each
        self.fingerprints: dict[int, bytes | None] = {}  # by index, where they were asked for

    def add(self, number: int, sample: np.ndarray) -> None:
        self.numbers.append(number)
        self.samples = np.concatenate([self.samples, sample[None]])

    def like(self, known: int) -> list[int]:
        """Indices of the images that have the sample of number `known` of those here."""
        return [self.numbers[j] for j in np.flatnonzero((self.samples == self.samples[known]).all(axis=1))]


def cells_of(n_tokens: int, special: np.ndarray | None) -> np.ndarray:
    """Token i shows cell i. Special tokens show none and are not counted."""
    return np.arange(n_tokens) if special is None else np.where(special, -1, np.cumsum(~special) - 1)
