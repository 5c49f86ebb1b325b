"""Attention of any layer as arrays, read out of the running graph, with flash attention on or off.

For vision-language models and plain text models. Nothing is pruned here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from PIL.Image import Image

from .arguments import checked
from .errors import ConfigError, EngineError, OutputError
from .io.images import ImageLimits, ImageSource, load_image
from .io.overlay import draw_heatmap
from .llamacpp.context import DecoderContext
from .llamacpp.tap import MEAN_HEADS, AttentionRead, Plan
from .rows import Segment
from .vision.chunks import ImageChunk
from .vision.encoder import VisionEncoder
from .vision.places import Place


@dataclass
class Inspection:
    """Attention of a prompt of n tokens.

    Attributes:
        tokens: Text of each token. An image token is "<image I>", with I counted from 0.
        image_of_token: Index of each token's image, -1 for text, (n,) int64.
        grids: (rows, columns) of each image's tokens, or None.
        pictures: Index of each image's picture in the prompt: the crops of a picture are images of their own.
        places: Where each image lies on its picture, None where that is not known.
        special: Tokens of each image that show no place, such as row ends, (n_tokens,) bool. None: none.
        decoder: Layer -> softmax attention, (n_heads, n, n) float32: [head, query row, key row]. With averaged heads
            (n, n).
        encoder: For each image, layer -> attention over the encoder's own rows, (n_heads, n_rows, n_rows) float32. With
            averaged heads (n_rows, n_rows).
    """

    tokens: list[str]
    image_of_token: np.ndarray
    grids: list[tuple[int, int] | None]
    decoder: dict[int, np.ndarray] = field(default_factory=dict)
    encoder: list[dict[int, np.ndarray]] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    special: list[np.ndarray | None] = field(default_factory=list)

    @checked()
    def to_image(self, layer: int, image: int = 0) -> np.ndarray:
        """Attention that each token of an image receives from the text after the last image.

        The decoder stage ranks by this mean over heads and text rows.

        Args:
            layer: Decoder layer, one of those that were read.
            image: Index of the image.

        Returns:
            (n_tokens,) float32.

        Raises:
            ConfigError: The layer was not read, or the prompt has no such image with text after it.
        """
        if layer not in self.decoder:
            raise ConfigError(
                f"decoder layer {layer} was not read", f"name it in decoder_layers (read: {[*self.decoder]})"
            )
        attention = self.decoder[layer]
        images = np.flatnonzero(self.image_of_token >= 0)
        if not len(images) or images[-1] == len(self.tokens) - 1:
            raise ConfigError("the prompt has no image with text after it", "there is no attention from text to image")
        if not 0 <= image < len(self.grids):
            raise ConfigError(f"the prompt has no image {image}", f"it has {len(self.grids)}, counted from 0")
        last = int(images[-1])
        rows: np.ndarray = attention[..., last + 1 :, :].mean(axis=tuple(range(attention.ndim - 1)))
        return np.asarray(rows[self.image_of_token == image])

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by flat names: tokens, image_of_token, decoder_L, encoder_image_I_layer_L."""
        data: dict[str, np.ndarray] = {"tokens": np.array(self.tokens), "image_of_token": self.image_of_token}
        data.update({f"decoder_{layer}": a for layer, a in self.decoder.items()})
        for i, layers in enumerate(self.encoder):
            data.update({f"encoder_image_{i}_layer_{layer}": a for layer, a in layers.items()})
        return data

    @checked()
    def picture(self, source: ImageSource, layer: int, index: int = 0, limits: ImageLimits = ImageLimits()) -> Image:
        """Draws `to_image` over a picture of the prompt, with the question and a colour scale.

        Args:
            source: The picture that was asked about.
            layer: Decoder layer, one of those that were read.
            index: Its index among the prompt's pictures.
            limits: What an image may be.

        Returns:
            An RGB image, which a notebook shows inline.

        Raises:
            ConfigError: As `to_image`; or there is no such picture, or its tokens have no place on it.
            ImageError: The image cannot be read.
        """
        crops = [i for i, picture in enumerate(self.pictures) if picture == index]
        if not crops:
            count = len(set(self.pictures))
            raise ConfigError(f"the prompt has no picture {index}", f"it has {count}, counted from 0")
        drawn = [i for i in crops if self.grids[i] is not None and self.places[i] is not None]
        if not drawn:
            raise ConfigError(
                "this model's image tokens have no place on the picture", "leave the picture out: to_image has numbers"
            )
        values = [self._on_grid(layer, i) for i in drawn]
        regions = [place for i in drawn if (place := self.places[i]) is not None]
        title = f"decoder layer {layer}: from the question to each image token"
        header = f"Question, as the model reads it: {self.question}"
        if len(drawn) < len(crops):
            header += f" (places of {len(crops) - len(drawn)} of {len(crops)} crops are not known)"
        return draw_heatmap(
            load_image(source, limits), values, title, regions=regions, header=header, unit="attention, mean over heads"
        )

    def _on_grid(self, layer: int, image: int) -> np.ndarray:
        """`to_image` as a grid; tokens that show no place are left out."""
        grid, values = self.grids[image], self.to_image(layer, image)
        assert grid is not None
        special = self.special[image] if self.special else None
        if special is not None:
            values = values[~special]
        return values.reshape(grid)

    @property
    def question(self) -> str:
        """The text after the last image, as the model reads it, in one line."""
        images = np.flatnonzero(self.image_of_token >= 0)
        return " ".join("".join(self.tokens[int(images[-1]) + 1 if len(images) else 0 :]).split())

    @checked()
    def save(self, path: str | PathLike[str], **more: np.ndarray) -> None:
        """Writes `arrays()` and `more` as a compressed .npz.

        Raises:
            OutputError: The file cannot be written.
        """
        named: dict[str, Any] = {**self.arrays(), **more}  # np.savez_compressed names its own options too
        try:
            np.savez_compressed(path, **named)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{path} cannot be written ({reason})", "use an existing folder with space") from error


def read_encoder(
    encoder: VisionEncoder, chunk: ImageChunk, layers: Sequence[int], mean_heads: bool
) -> dict[int, np.ndarray]:
    """Encodes one image, and returns the attention of encoder layers, counted over those that run.

    Raises:
        ConfigError: The encoder does not run such a layer.
    """
    if min(layers) < 0:
        raise ConfigError(f"encoder layer {min(layers)} is negative", "layers are counted from 0")
    n_rows = encoder.max_rows(chunk)
    read = AttentionRead(
        sorted(set(layers)),
        n_rows,
        (0, -1, 1),
        MEAN_HEADS if mean_heads else 0,
        max_rows=n_rows,
        max_heads=1 if mean_heads else encoder.n_heads,
        n_threads=encoder.n_threads,
    )
    try:
        encoded = encoder.encode(chunk, read=read)
    except EngineError as error:
        n_layers = encoder.last_outcome.n_attention
        if n_layers and max(layers) >= n_layers:
            raise ConfigError(
                f"encoder layer {max(layers)} is outside 0..{n_layers - 1}", "the encoder does not run more layers"
            ) from error
        raise
    return dict(zip(read.layers, encoded.attention))


def read_decoder(
    context: DecoderContext, segments: Sequence[Segment], layers: Sequence[int], mean_heads: bool
) -> dict[int, np.ndarray]:
    """Decodes a prompt from an empty cache, and returns the attention of decoder layers.

    Raises:
        ConfigError: The decoder has no such layer.
        ContextLengthError: See DecoderContext.decode.
        EngineError: See DecoderContext.decode.
    """
    wanted = sorted(set(layers))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < context.n_layers:
        raise ConfigError(
            f"decoder layers {wanted} are not all within 0..{context.n_layers - 1}", "use layers of the model"
        )
    without = sorted(set(wanted) - set(context.attention_layers))
    if without:
        some = ", ".join(map(str, context.attention_layers))
        raise ConfigError(f"decoder layers {without} have no attention", f"use some of {some}")
    n = sum(len(s.rows) for s in segments)
    heads = () if mean_heads else (context.n_heads,)
    result = {layer: np.zeros((*heads, n, n), np.float32) for layer in wanted}
    cells = np.full(n, -1, np.int64)
    at = 0
    for segment in segments:
        size = context.n_ubatch
        for start in range(0, len(segment.rows), size):
            rows = segment.rows.slice(start, min(len(segment.rows), start + size))
            last = at + len(rows)
            plan = Plan(want_cells=True)
            if wanted:
                columns = (last // 256 + 2) * 256  # llama.cpp pads the attended cells to 256
                reduce = MEAN_HEADS if mean_heads else 0
                plan.attention = AttentionRead(
                    wanted,
                    columns,
                    (0, len(rows), 1),
                    reduce,
                    max_rows=len(rows),
                    max_heads=context.n_heads,
                    n_threads=context.n_threads,
                )
            if not segment.causal:
                context.set_causal(False)
            try:
                outcome = context.decode(rows, at, plan, "inspect")
            finally:
                if not segment.causal:
                    context.set_causal(True)
            assert outcome.cells is not None  # want_cells
            cells[at:last] = outcome.cells
            for layer, attention in zip(wanted, outcome.attention):
                result[layer][..., at:last, :last] = attention[..., cells[:last]]
            at = last
    return result
