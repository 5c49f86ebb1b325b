"""The encoder stage's two passes: layers [0, M) over all units of an image, then [M, L) over those that are kept.

`EncoderWindow` is what the stage needs of an encoder. `ComposedWindow` is it for encoders of any picture size: the
second pass runs on a picture that is composed of the kept units, whose hidden states are injected at layer M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import ConfigError, quoted
from ..llamacpp.tap import MEAN_ALL, AttentionRead, Outcome, Plan
from .chunks import ImageChunk
from .composed import Composer, Grid, Picture, UnitFeatures, find_geometry
from .encoder import MAX_QUERY_ROWS, VisionEncoder


@dataclass
class FirstPass:
    """Units of an image after layer M - 1.

    Attributes:
        chunk: The image.
        layer: M.
        units: Raster numbers on the image's grid, ascending, (n,) int64.
        vectors: Mean hidden state of each unit's rows, (n, n_embd) float32.
        attention: Attention that each receives in a layer below M, (n,) float32. None: not read, or no layer below M
            sees the whole image.
        score_seconds: Time spent on reading attention.
        hidden: Hidden states entering layer M, (n_rows, n_embd) float32: all rows, in the encoder's order.
        planes: The same of earlier layers that the encoder's output also has, (n_planes, n_rows, n_embd).
        rows: Rows of each unit, (n, rows of a unit) int64. CLS is in none.
    """

    chunk: ImageChunk
    layer: int
    units: np.ndarray
    vectors: np.ndarray
    attention: np.ndarray | None
    score_seconds: float
    hidden: np.ndarray
    planes: np.ndarray
    rows: np.ndarray


def mean_states(hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean hidden state of each unit, (n, n_embd) float32, as mean(axis=1) of hidden[rows], which is never held."""
    total: np.ndarray = hidden[rows[:, 0]]
    for column in rows.T[1:]:
        total += hidden[column]
    total /= np.float32(rows.shape[1])
    return total


class EncoderWindow(Protocol):
    """An encoder that can run in two layer windows.

    Attributes:
        n_layers: Layers that run.
    """

    n_layers: int

    def default_layer(self) -> int:
        """M where the config names none."""
        ...

    def problem(self, chunk: ImageChunk) -> str:
        """Why an image cannot be encoded so, or ""."""
        ...

    def fitting(self, n: int, chunk: ImageChunk) -> int:
        """The smallest number of units, from n on, that the second pass can run on."""
        ...

    def first(
        self,
        chunk: ImageChunk,
        layer: int,
        want_attention: bool,
        picture: Picture | None = None,
        units: np.ndarray | None = None,
    ) -> FirstPass:
        """Layers [0, layer) over an image, or over some units of a picture (ascending raster numbers)."""
        ...

    def rest(self, first: FirstPass, kept: np.ndarray, attention: str | None) -> UnitFeatures:
        """Layers [M, L) and the projector over kept units.

        kept: ascending indices into first.units. attention: of the encoder's last layer, as `VisionEncoder.encode`
        takes it.
        """
        ...


class ComposedWindow:
    """An `EncoderWindow` for encoders of any picture size."""

    def __init__(self, encoder: VisionEncoder, composer: Composer) -> None:
        self.encoder, self.composer = encoder, composer
        self.n_layers = encoder.profile.n_layers(encoder.metadata)
        every = composer.geometry.full_every
        self._whole = [layer for layer in range(self.n_layers) if (layer + 1) % every == 0]  # layers that see the whole

    def default_layer(self) -> int:
        """A quarter of the way in, and where there are windows, past a layer that sees the whole image."""
        quarter = max(1, min(self.n_layers - 1, round(self.n_layers / 4)))
        return next((layer + 1 for layer in self._whole if quarter <= layer + 1 < self.n_layers), quarter)

    def problem(self, chunk: ImageChunk) -> str:
        if self.n_layers < 2:
            return "the encoder has a single layer"
        return "" if chunk.grid is not None else "an image has no grid"

    def fitting(self, n: int, chunk: ImageChunk) -> int:
        return self.composer.fitting(n, chunk)

    def first(
        self,
        chunk: ImageChunk,
        layer: int,
        want_attention: bool,
        picture: Picture | None = None,
        units: np.ndarray | None = None,
    ) -> FirstPass:
        g = self.composer.geometry
        assert chunk.grid is not None  # `problem` has made sure of it
        grid: Grid = chunk.grid
        order = g.ordered(np.arange(grid[0] * grid[1]) if units is None else units, grid)
        n_rows = len(order) * g.patches
        n_embd = int(self.encoder.metadata["clip.vision.embedding_length"])
        planes = [plane for plane in g.planes if plane < layer - 1]
        hidden = np.empty((n_rows, n_embd), np.float32)
        extra = np.empty((len(planes), n_rows, n_embd), np.float32)
        seen = [whole for whole in self._whole if whole < layer]
        plan = Plan(n_rows=n_rows, window=(0, layer, self.n_layers), hidden=hidden, encoder=True)
        if planes:
            plan.extra_layers, plan.extra_hidden = planes, extra
        if want_attention and seen:
            rows = (0, -1, -(-n_rows // MAX_QUERY_ROWS))
            plan.attention = AttentionRead([seen[-1]], n_rows, rows, MEAN_ALL, n_threads=self.encoder.n_threads)
        composed = grid
        if units is None:
            outcome: Outcome = self.encoder.run(chunk, plan)
        else:
            assert picture is not None  # which the units are of
            at = np.searchsorted(picture.units, order)
            with self.composer.composed(order, grid, chunk, picture.pixels[at]) as small:
                if picture.places is not None:
                    assert small.grid is not None  # `composed` has made sure of it
                    self.composer.place(plan, picture.places[at], small.grid)
                outcome = self.encoder.run(small, plan)
                assert small.grid is not None
                composed = small.grid
        rows_of = g.rows(composed)[np.argsort(order)]  # of each unit, ascending
        attention = outcome.attention[0][rows_of].mean(axis=1) if outcome.attention else None
        vectors = mean_states(hidden, rows_of)
        return FirstPass(
            chunk, layer, np.sort(order), vectors, attention, outcome.score_seconds, hidden, extra, rows_of
        )

    def rest(self, first: FirstPass, kept: np.ndarray, attention: str | None) -> UnitFeatures:
        g, chunk = self.composer.geometry, first.chunk
        assert chunk.grid is not None  # `problem` has made sure of it
        order = g.ordered(first.units[kept], chunk.grid)
        place = kept[np.searchsorted(first.units[kept], order)]  # of each in the first pass
        read = attention if self._whole and self._whole[-1] >= first.layer else None
        with self.composer.composed(order, chunk.grid, chunk) as small:
            assert small.grid is not None  # `composed` has made sure of it
            rows_of = g.rows(small.grid)
            source = np.empty(rows_of.size, np.int64)  # of each row of the second pass, in the first
            source[rows_of] = first.rows[place]
            plan = Plan(n_rows=len(source), window=(first.layer, self.n_layers, self.n_layers), encoder=True)
            plan.inject = first.hidden[source]
            if len(first.planes):
                plan.extra_layers = [plane for plane in g.planes if plane < first.layer - 1]
                plan.extra_inject = first.planes[:, source]
            encoded = self.encoder.encode(small, read, want_cells=False, plan=plan)
            features = self.composer.collect(
                chunk, small, order, encoded.embeddings, encoded.scores, encoded.score_seconds
            )
        if attention and read is None and first.attention is not None:  # the last layer that sees the whole is below M
            features.scores = np.zeros(len(features.tokens), np.float32)
            features.scores[self.composer.ordinary(chunk, features.tokens)] = first.attention[kept]
        return features


def window_layer(window: EncoderWindow, layer: int | None) -> int:
    """Layer M of the encoder stage: the one asked for, otherwise the window's own.

    Raises:
        ConfigError: The layer is outside 1..n_layers - 1.
    """
    if layer is not None and layer > window.n_layers - 1:
        raise ConfigError(
            f"encoder_layer={quoted(layer)} is outside 1..{window.n_layers - 1}",
            f"the encoder has {window.n_layers} layers",
        )
    return window.default_layer() if layer is None else layer


def find_window(encoder: VisionEncoder) -> EncoderWindow | None:
    """How an encoder runs in two layer windows, or None if it cannot."""
    geometry = find_geometry(encoder)
    return ComposedWindow(encoder, Composer(encoder, geometry)) if geometry is not None else None
