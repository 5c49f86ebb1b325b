"""The encoder stage's two passes for encoders whose pictures have one size: rows leave the running graph at layer M.

The second pass is an encode of the same image. Its layers below M are skipped, all hidden states are injected at M, and
of these only the rows of kept tokens go on (csrc/shrink.c). What the graph does with its rows after that is rehearsed
before anything runs: an encoder whose graph needs all of them is encoded whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..errors import EngineError
from ..llamacpp.names import PATCHES
from ..llamacpp.tap import MEAN_ALL, NO_ROWS_LEAVE, AttentionRead, KeepRows, Outcome, Plan
from .chunks import ImageChunk
from .composed import Grid, Picture, UnitFeatures
from .encoder import MAX_QUERY_ROWS, VisionEncoder
from .profiles import Layout
from .window import FirstPass, mean_states

# Projector types whose tokens are squares of the raster of patches, in its order, and those whose tokens are single
# rows that the graph's input `patches` names (tools/mtmd/models)
SQUARES = ("gemma3", "idefics3", "internvl", "gemma4v", "kimik25", "lfm2", "nemotron_v2_vl")
SINGLE = ("mlp",)
LEARNED_ROWS = ("nemotron_v2_vl",)  # with any number of learned rows beside the patches
_KEPT = 1024  # rehearsals: a stage that adapts to the picture has one for each number of tokens and size of picture


@dataclass(frozen=True)
class RowLayout:
    """Rows of the encoder's sequence that the tokens of an image are made of.

    Attributes:
        grid: (rows, columns) of the tokens.
        side: Patches along a token's side.
        cls: Where the rows stand that are no patches. "": there are none.
        n_cls: Their number: CLS, and what else an encoder has learned (RADIO).
    """

    grid: Grid
    side: int
    cls: str = ""
    n_cls: int = 1

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.side**2

    @property
    def n_beside(self) -> int:
        """Rows that are no patches."""
        return self.n_cls if self.cls else 0

    @property
    def cls_row(self) -> int:
        """Index of the first row that is no patch, or -1."""
        return {"first": 0, "last": self.n_patches, "": -1}[self.cls]

    def of_tokens(self) -> np.ndarray:
        """Rows of each token, (n_tokens, side^2) int64."""
        rows, columns = self.grid
        raster = np.arange(self.n_patches).reshape(rows, self.side, columns, self.side)
        return raster.swapaxes(1, 2).reshape(-1, self.side**2) + self.n_beside * (self.cls == "first")

    def fitting(self, n: int) -> int:
        """The smallest number of tokens, from n on, that can stay.

        Squares of a raster are cut by the number of its columns, which the graph has from the picture's size: what
        stays must be a raster as wide.
        """
        columns = self.grid[1] if self.side > 1 else 1
        return -(-max(n, 1) // columns) * columns

    def kept(self, n: int) -> RowLayout:
        """The same of n tokens that stay."""
        columns = self.grid[1] if self.side > 1 else n
        return replace(self, grid=(n // columns, columns))

    def keep(self, tokens: np.ndarray) -> np.ndarray:
        """Rows that stay with these tokens, in the order that makes them the next tokens of a smaller raster.

        tokens: as many as `fitting` allows.

        Returns:
            (n,) int32.
        """
        after = self.kept(len(tokens))
        rows = np.empty(after.n_patches + self.n_beside, np.int32)
        rows[after.of_tokens()] = self.of_tokens()[tokens]
        if self.cls:
            beside = np.arange(self.n_beside)
            rows[after.cls_row + beside] = self.cls_row + beside
        return rows


class RowWindow:
    """An `EncoderWindow` for encoders whose rows can leave."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        self.n_layers = encoder.profile.n_layers(encoder.metadata)
        self._layouts: dict[object, RowLayout | str] = {}
        self._rehearsals: dict[object, Outcome] = {}

    def default_layer(self) -> int:
        """A quarter of the way in."""
        return max(1, min(self.n_layers - 1, round(self.n_layers / 4)))

    def problem(self, chunk: ImageChunk) -> str:
        if self.n_layers < 2:
            return "the encoder has a single layer"
        layout = self.layout(chunk)
        return layout if isinstance(layout, str) else ""

    def fitting(self, n: int, chunk: ImageChunk) -> int:
        return self._layout(chunk).fitting(n)

    # ---- rows and tokens ----

    def layout(self, chunk: ImageChunk) -> RowLayout | str:
        """The layout of an image, or why it has none."""
        key = (chunk.grid, chunk.n_tokens)
        if key not in self._layouts:
            self._layouts[key] = self._find_layout(chunk)
        return self._layouts[key]

    def _layout(self, chunk: ImageChunk) -> RowLayout:
        layout = self.layout(chunk)
        if isinstance(layout, str):
            raise EngineError(layout)
        return layout

    def _find_layout(self, chunk: ImageChunk) -> RowLayout | str:
        if chunk.grid is None or chunk.grid[0] * chunk.grid[1] != chunk.n_tokens:
            return "an image has no grid"
        n = chunk.n_tokens
        gathered = np.empty(self.encoder.max_rows(chunk), np.int32)
        try:
            with self.encoder.tap.watching(PATCHES, gathered):
                self.encoder.run(chunk, Plan(count_only=True, keep=KeepRows(1, np.zeros(1, np.int32))))
        except EngineError:  # one row is too few, but all of them were counted
            pass
        n_rows, profile = self.encoder.last_outcome.n_rows, self.encoder.profile
        cls = "" if profile.cls_row is None else "last" if profile.cls_row(n) else "first"
        side = math.isqrt(max(0, n_rows - bool(cls)) // n)
        n_cls = n_rows - side**2 * n if self.encoder.projector in LEARNED_ROWS else 1
        layout = RowLayout(chunk.grid, side, cls, n_cls)
        if side < 1 or layout.n_patches + layout.n_beside != n_rows:
            return f"an image of {n} tokens has {n_rows} rows in the encoder"
        if self.encoder.projector in SINGLE:
            names = gathered[: self.encoder.tap.watched() // 4]
            if not np.array_equal(names, layout.of_tokens().ravel()):
                return "the encoder makes tokens of other rows than its patches"
        try:
            for layer in (1, self.n_layers - 1):
                self._rehearse(chunk, layer, layout, np.arange(n))
        except EngineError as error:
            needs_all = self.encoder.last_outcome.error == NO_ROWS_LEAVE
            return "the encoder's graph needs all of its rows" if needs_all else error.cause
        return layout

    def _rehearse(self, chunk: ImageChunk, layer: int, layout: RowLayout, tokens: np.ndarray) -> Outcome:
        """What the graph is like where these tokens stay; known for any other as many tokens.

        Raises:
            EngineError: It cannot be done.
        """
        key = (chunk.grid, layer, len(tokens))
        if key not in self._rehearsals:
            outcome = self.encoder.run(chunk, Plan(count_only=True, keep=KeepRows(layer, layout.keep(tokens))))
            if outcome.n_out != len(tokens):
                raise EngineError(f"the encoder would make {outcome.n_out} of {len(tokens)} tokens")
            if len(self._rehearsals) >= _KEPT:
                del self._rehearsals[next(iter(self._rehearsals))]
            self._rehearsals[key] = outcome
        return self._rehearsals[key]

    # ---- the passes ----

    def first(
        self,
        chunk: ImageChunk,
        layer: int,
        want_attention: bool,
        picture: Picture | None = None,
        units: np.ndarray | None = None,
    ) -> FirstPass:
        """Layers [0, layer) over an image. All units enter: picture and units must be None."""
        assert picture is None and units is None  # nothing is left out before an encoder of one picture size
        layout = self._layout(chunk)
        rows_of = layout.of_tokens()
        n_rows = layout.n_patches + layout.n_beside
        states = np.empty((n_rows, int(self.encoder.metadata["clip.vision.embedding_length"])), np.float32)
        plan = Plan(n_rows=n_rows, window=(0, layer, self.n_layers), hidden=states, encoder=True)
        if want_attention:
            rows = (0, -1, -(-n_rows // MAX_QUERY_ROWS))
            plan.attention = AttentionRead([layer - 1], n_rows, rows, MEAN_ALL, n_threads=self.encoder.n_threads)
        outcome = self.encoder.run(chunk, plan)
        attention = self._scores(outcome, layout)
        return FirstPass(
            chunk,
            layer,
            np.arange(chunk.n_tokens),
            mean_states(states, rows_of),
            attention,
            outcome.score_seconds,
            states,
            np.empty((0, *states.shape), np.float32),
            rows_of,
        )

    def rest(self, first: FirstPass, kept: np.ndarray, attention: str | None) -> UnitFeatures:
        chunk, layout = first.chunk, self._layout(first.chunk)
        after = layout.kept(len(kept))
        keep = KeepRows(first.layer, layout.keep(kept), self._rehearse(chunk, first.layer, layout, kept))
        plan = Plan(
            n_rows=len(first.hidden),
            window=(first.layer, self.n_layers, self.n_layers),
            inject=first.hidden,
            encoder=True,
            keep=keep,
        )
        n_rows = len(keep.rows)
        if attention:
            rows = (0, -1, -(-n_rows // MAX_QUERY_ROWS))
            if attention == "cls" and layout.cls:
                rows = (after.cls_row, 1, 1)
            threads = self.encoder.n_threads
            plan.attention = AttentionRead([self.n_layers - 1], n_rows, rows, MEAN_ALL, n_threads=threads)
        outcome = self.encoder.run(chunk, plan)
        embeddings = self.encoder.output(len(kept)).copy()
        return UnitFeatures(first.units[kept], embeddings, self._scores(outcome, after), outcome.score_seconds)

    def _scores(self, outcome: Outcome, layout: RowLayout) -> np.ndarray | None:
        """Attention that each token receives, (n_tokens,) float32, as `VisionEncoder.encode` makes it of rows."""
        if not outcome.attention:
            return None
        to_tokens = self.encoder.profile.to_tokens
        assert to_tokens is not None  # every projector type above has it
        of_tokens = layout.of_tokens()
        return to_tokens(outcome.attention[0], Layout(len(of_tokens), layout.grid, of_tokens.ravel()))


def find_row_window(encoder: VisionEncoder) -> RowWindow | None:
    """How rows leave an encoder, or None if it is not known which tokens its rows become."""
    return RowWindow(encoder) if encoder.projector in SQUARES + SINGLE else None
