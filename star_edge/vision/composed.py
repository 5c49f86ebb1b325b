"""Encodes some units of a picture: libmtmd gets a smaller picture that is composed of them, and the tap gives every
patch its true position.

A unit is the square of patches that becomes one image token. For encoders of any picture size: Qwen2-VL, Qwen2.5-VL,
Qwen3-VL, Pixtral, Mistral-Small 3.1, GLM-4.xV, GLM-OCR and PaddleOCR-VL. What a composed picture's graph takes from
outside is the composed pixels and what depends on the place of a patch: positions, and for some encoders position
embeddings or the mask of windows. With all units, in the encoder's own order, the output is bit-identical to that of
the picture itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import EngineError
from ..llamacpp.mtmd import MEDIA_MARKER
from ..llamacpp.names import (
    ADDED,
    COLUMN_POSITIONS,
    PIXELS,
    PLACED,
    POSITION_EMBEDDINGS,
    POSITIONS,
    ROW_POSITIONS,
    TO_WINDOWS,
    WINDOW_INDEX,
    WINDOW_MASK,
)
from ..llamacpp.tap import Plan
from .chunks import ImageChunk
from .encoder import VisionEncoder

MAX_SIDE = 46000  # pixels: clip_image_size::area multiplies two sides as int
# libmtmd enlarges smaller pictures (set_limit_image_tokens in clip.cpp), unless the file or image_min_tokens says more
MIN_TOKENS = 8
MIN_PIXELS = "clip.vision.image_min_pixels"
_LOWEST = np.finfo(np.float32).min  # what clip_encode masks with

HAS_POSITIONS = "has position embeddings"  # beside a file's metadata: whether it has a tensor of them

Grid = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """How an encoder lays out the patches of a picture.

    Attributes:
        patch: Pixels along a patch's side.
        side: Patches along a unit's side.
        grouped: True: the rows of a unit's patches are adjacent. False: rows are the raster of patches.
        rotary: Whether the graph has one input with the positions of all patches, [y | x | y | x]. Otherwise rows and
            columns are two.
        window: Units along the side of a window, for encoders with window attention. 0: none.
        full_every: With windows: one layer in so many sees the whole picture, the last of them.
        places: The node that adds position embeddings to the patches, and which of its sources they are. None: there is
            no such node.
        planes: Layers whose states the encoder's output also has (DeepStack), ascending.
    """

    patch: int
    side: int
    grouped: bool
    rotary: bool = True
    window: int = 0
    full_every: int = 1
    places: tuple[str, int] | None = None
    planes: tuple[int, ...] = ()

    @property
    def pixels(self) -> int:
        """Pixels along a unit's side."""
        return self.patch * self.side

    @property
    def patches(self) -> int:
        """Patches of a unit."""
        return self.side**2

    def rows(self, grid: Grid) -> np.ndarray:
        """Rows of the encoder's sequence that the units of a picture have, (n_units, patches) int64."""
        r, c = grid
        if self.grouped:
            return np.arange(r * c * self.patches).reshape(r * c, self.patches)
        raster = np.arange(r * c * self.patches).reshape(r, self.side, c, self.side)
        return raster.swapaxes(1, 2).reshape(r * c, self.patches)

    def windows(self, units: np.ndarray, grid: Grid) -> np.ndarray:
        """The number of each unit's window, (n,) int64. units: raster numbers on the grid."""
        y, x = np.divmod(units, grid[1])
        numbers: np.ndarray = (y // self.window) * -(-grid[1] // self.window) + x // self.window
        return numbers

    def ordered(self, units: np.ndarray, grid: Grid) -> np.ndarray:
        """The units as the encoder has them: window by window (clip_encode), else as they are."""
        return units[np.argsort(self.windows(units, grid), kind="stable")] if self.window else units


def _qwen(metadata: dict[str, Any], **more: Any) -> Geometry | None:
    if int(metadata["clip.vision.spatial_merge_size"] or 2) != 2:
        return None
    return Geometry(int(metadata["clip.vision.patch_size"]), 2, True, **more)


def _qwen25(metadata: dict[str, Any]) -> Geometry | None:
    every = int(metadata["clip.vision.n_wa_pattern"] or 0)
    if every < 1:
        return None
    window = int(metadata["clip.vision.window_size"] or 112) // int(metadata["clip.vision.patch_size"]) // 2
    return _qwen(metadata, window=window, full_every=every)


def _qwen3(metadata: dict[str, Any]) -> Geometry | None:
    flags = metadata["clip.vision.is_deepstack_layers"]
    planes = tuple(i for i, flag in enumerate(flags) if flag) if isinstance(flags, list) else ()
    return _qwen(metadata, places=PLACED, planes=planes)


def _glm(metadata: dict[str, Any]) -> Geometry | None:
    """GLM-4.xV, and GLM-OCR, which has no position embeddings."""
    return _qwen(metadata, places=ADDED if metadata[HAS_POSITIONS] else None)


def _paddle(metadata: dict[str, Any]) -> Geometry | None:
    geometry = _qwen(metadata, places=ADDED)
    return None if geometry is None else replace(geometry, grouped=False)


def _pixtral(metadata: dict[str, Any]) -> Geometry:
    side = int(metadata["clip.vision.spatial_merge_size"] or 1)
    return Geometry(int(metadata["clip.vision.patch_size"]), side, False, rotary=False)


# What clip_encode gives the graph of each projector type, and what its graph makes of it (tools/mtmd/models)
GEOMETRIES: dict[str, Callable[[dict[str, Any]], Geometry | None]] = {
    "qwen2vl_merger": _qwen,
    "qwen2.5vl_merger": _qwen25,
    "qwen2.5o": _qwen25,
    "qwen3vl_merger": _qwen3,
    "pixtral": _pixtral,
    "glm4v": _glm,
    "paddleocr": _paddle,
}


def find_geometry(encoder: VisionEncoder) -> Geometry | None:
    """The geometry of an encoder of any picture size, or None."""
    make = GEOMETRIES.get(encoder.projector)
    has_positions = POSITION_EMBEDDINGS in encoder.precision.info.tensors
    return make(encoder.metadata | {HAS_POSITIONS: has_positions}) if make else None


@dataclass
class Picture:
    """What an encoder gets of an image, before it computes anything.

    Attributes:
        chunk: The image.
        grid: (rows, columns) of its units.
        pixels: Preprocessed pixels of the units, (n, 3, side, side) float32.
        places: Position embeddings of their patches, (n, patches, n_embd) float32, or None.
        units: Raster numbers of the units that these are of, ascending, (n,) int64: all, or those that stay.
    """

    chunk: ImageChunk
    grid: Grid
    pixels: np.ndarray
    places: np.ndarray | None
    units: np.ndarray

    def only(self, units: np.ndarray) -> Picture:
        """The same of some of its units, ascending. It holds no more than that."""
        at = np.searchsorted(self.units, units)
        places = None if self.places is None else self.places[at]
        return Picture(self.chunk, self.grid, self.pixels[at], places, units)


@dataclass
class UnitFeatures:
    """What the encoder makes of some units of a picture. Arrays belong to the caller.

    Attributes:
        tokens: Indices of the image's tokens, ascending, (n,) int64: those of the units, and all special tokens.
        embeddings: (n, n_embd_inp) float32.
        scores: Attention that each receives, (n,) float32, 0 for special tokens. None: not read.
        score_seconds: Time spent on reading attention.
    """

    tokens: np.ndarray
    embeddings: np.ndarray
    scores: np.ndarray | None
    score_seconds: float = 0.0


class Composer:
    """Runs an encoder on some units of a picture. `encoder` must have a geometry."""

    def __init__(self, encoder: VisionEncoder, geometry: Geometry) -> None:
        self.encoder, self.geometry = encoder, geometry
        by_file = -(-int(encoder.metadata[MIN_PIXELS] or 0) // geometry.pixels**2)
        self.least = max(MIN_TOKENS, encoder.image_min_tokens, by_file)

    # ---- sizes ----

    def grid_of(self, n: int, rows: int = 1) -> Grid | None:
        """(rows, columns) of a picture of exactly n units, as square as can be; None: there is none.

        A picture of more would hold units that the kept ones attend to. rows: how many it has at least.
        """
        for r in range(math.isqrt(n), 0, -1):
            if n % r == 0:
                fits = max(r, n // r) * self.geometry.pixels <= MAX_SIDE
                return (n // r, r) if fits and n // r >= rows else None
        return None

    def fitting(self, n: int, chunk: ImageChunk) -> int:
        """The smallest number of units, from n on, that a picture can be composed of."""
        n = max(n, self.least)
        while self.grid_of(n, self._rows_needed(chunk)) is None:
            n += 1
        return n

    def _rows_needed(self, chunk: ImageChunk) -> int:
        """2 where row ends are copied from the composed picture: the last row has none."""
        return 1 if chunk.special is None or not chunk.special.any() else 2

    def composed_grid(self, units: np.ndarray, grid: Grid, chunk: ImageChunk) -> Grid:
        """(rows, columns) of the picture that is composed of these units of a picture of that grid.

        Raises:
            EngineError: There is none.
        """
        composed = grid if len(units) == grid[0] * grid[1] else self.grid_of(len(units), self._rows_needed(chunk))
        if composed is None:
            raise EngineError(f"no picture can be composed of {len(units)} units")
        return composed

    # ---- what the encoder gets ----

    def look(self, chunk: ImageChunk) -> Picture | None:
        """The pixels that the encoder would get for an image; the encoder computes none of its layers.

        None: they are not what the geometry says, as for two frames of a video in one chunk.
        """
        g = self.geometry
        if chunk.grid is None:
            return None
        rows, columns = chunk.grid
        n = rows * columns
        raw = np.empty(3 * n * g.pixels**2, np.float32)
        places = None
        plan = Plan(count_only=True)
        if g.places:
            places = np.empty((n, g.patches, int(self.encoder.metadata["clip.vision.embedding_length"])), np.float32)
            plan = Plan(source=g.places, source_out=places)
        try:
            with self.encoder.tap.watching(PIXELS, raw):
                self.encoder.run(chunk, plan)
        except EngineError:
            return None
        if self.encoder.tap.watched() != raw.nbytes:
            return None
        blocks = raw.reshape(3, rows, g.pixels, columns, g.pixels).transpose(1, 3, 0, 2, 4)
        pixels = np.ascontiguousarray(blocks).reshape(n, 3, g.pixels, g.pixels)
        if places is not None:
            places = places.reshape(-1, places.shape[-1])[g.rows(chunk.grid)]
        return Picture(chunk, chunk.grid, pixels, places, np.arange(n))

    def inputs(self, units: np.ndarray, grid: Grid, composed: Grid) -> dict[str, np.ndarray]:
        """Inputs of a composed picture's graph, by name, all int32 but the mask.

        units: raster numbers on `grid`, in the order of the encoder's rows.
        """
        g = self.geometry
        y, x = np.divmod(np.repeat(units, g.patches), grid[1])
        inner = np.tile(np.arange(g.patches), len(units))
        y, x = g.side * y + inner // g.side, g.side * x + inner % g.side
        if not g.grouped:
            rows = g.rows(composed).ravel()
            by_row = np.empty((2, len(rows)), np.int32)
            by_row[:, rows] = y, x
            y, x = by_row
        if not g.rotary:
            return {ROW_POSITIONS: y, COLUMN_POSITIONS: x}
        inputs: dict[str, np.ndarray] = {POSITIONS: np.concatenate([y, x, y, x]).astype(np.int32)}
        if g.window:
            window = np.repeat(g.windows(units, grid), g.patches)
            mask = np.full((len(window), len(window)), _LOWEST)  # megabytes: no copy is made of it here
            for number in np.unique(window):
                rows = np.flatnonzero(window == number)
                mask[rows[:, None], rows] = 0
            inputs[WINDOW_MASK] = mask
            inputs[TO_WINDOWS] = inputs[WINDOW_INDEX] = np.arange(len(units), dtype=np.int32)
        return inputs

    @contextmanager
    def composed(
        self, units: np.ndarray, grid: Grid, chunk: ImageChunk, pixels: np.ndarray | None = None
    ) -> Iterator[ImageChunk]:
        """The chunk of a picture of these units; in the block its graph gets their pixels and places.

        Args:
            units: As for `inputs`.
            grid: (rows, columns) of the whole picture.
            chunk: The whole picture.
            pixels: Of each unit in that order, as in `Picture`. None: whatever; the layers that see them do not run.
        """
        side = self.geometry.pixels
        composed = self.composed_grid(units, grid, chunk)
        r, c = composed
        prompt = self.encoder.tokenize(MEDIA_MARKER, [np.zeros((r * side, c * side, 3), np.uint8)])
        with ExitStack() as stack:
            stack.callback(prompt.close)
            small = next(chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk))
            if small.grid != composed:
                raise EngineError(f"a composed picture of {composed} units became one of {small.grid}")
            inputs = self.inputs(units, grid, composed)
            if pixels is not None:
                inputs[PIXELS] = pixels.reshape(r, c, 3, side, side).transpose(2, 0, 3, 1, 4)
            del pixels
            for name in list(inputs):
                stack.callback(self.encoder.tap.set_input, name, None)
                # which copies them, and has the only copy while the encoder runs: a mask can have megabytes
                self.encoder.tap.set_input(name, inputs.pop(name))
            yield small

    # ---- what it makes of it ----

    def encode(self, picture: Picture, units: np.ndarray, attention: str | None) -> UnitFeatures:
        """The features of some units of a picture, as if there were no others.

        Args:
            picture: The picture.
            units: Raster numbers, ascending; as many as `fitting` allows, and the picture has them.
            attention: As for `VisionEncoder.encode`.
        """
        order = self.geometry.ordered(units, picture.grid)
        at = np.searchsorted(picture.units, order)
        plan = Plan()
        if picture.places is not None:
            self.place(plan, picture.places[at], self.composed_grid(order, picture.grid, picture.chunk))
        with self.composed(order, picture.grid, picture.chunk, picture.pixels[at]) as small:
            encoded = self.encoder.encode(small, attention, want_cells=False, plan=plan)
            return self.collect(picture.chunk, small, order, encoded.embeddings, encoded.scores, encoded.score_seconds)

    def place(self, plan: Plan, places: np.ndarray, composed: Grid) -> None:
        """Gives a composed picture's graph its position embeddings.

        Args:
            plan: What gets them.
            places: Of the units in the order of the encoder's rows, (n_units, patches, n_embd) float32.
            composed: (rows, columns) of the composed picture.
        """
        by_row = np.empty((places.shape[0] * places.shape[1], places.shape[2]), np.float32)
        by_row[self.geometry.rows(composed)] = places
        plan.source, plan.source_in = self.geometry.places, by_row

    @staticmethod
    def ordinary(chunk: ImageChunk, tokens: np.ndarray) -> np.ndarray:
        """Which of these tokens of an image are not special, (n,) bool."""
        return np.ones(len(tokens), bool) if chunk.special is None else ~chunk.special[tokens]

    def collect(
        self,
        chunk: ImageChunk,
        small: ImageChunk,
        order: np.ndarray,
        embeddings: np.ndarray,
        scores: np.ndarray | None = None,
        score_seconds: float = 0.0,
    ) -> UnitFeatures:
        """The tokens of a composed picture as tokens of the whole one.

        Args:
            chunk: The whole picture.
            small: The composed one.
            order: Units of the whole picture, in the order of the encoder's rows.
            embeddings: Of all tokens of the composed one.
            scores: The same.
            score_seconds: Of `UnitFeatures`.
        """
        ends = np.zeros(small.n_tokens, bool) if small.special is None else small.special
        ordinary = np.flatnonzero(~ends)
        special = np.zeros(chunk.n_tokens, bool) if chunk.special is None else chunk.special
        tokens = np.flatnonzero(~special)[order]
        source = ordinary
        if special.any():  # each is the same learned row
            tokens = np.concatenate([tokens, np.flatnonzero(special)])
            source = np.concatenate([ordinary, np.full(int(special.sum()), np.flatnonzero(ends)[0])])
        at = np.argsort(tokens)
        return UnitFeatures(
            tokens[at], embeddings[source[at]], None if scores is None else scores[source[at]], score_seconds
        )
