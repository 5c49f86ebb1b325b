"""What a request did: tokens, kept indices, scores, times, KV cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import PIL.Image

from .arguments import checked
from .errors import ConfigError
from .io.images import ImageLimits, ImageSource, load_image
from .io.overlay import Shown, draw_shown, stack
from .io.video import Video, read_video
from .pruning.config import PruneConfig
from .pruning.selection import average_tokens
from .report_json import Figures, ImageDict, PictureFigures, ReportDict, ReportFigures
from .vision.places import Place


def round_n_ctx(n: int) -> int:
    """The context that llama.cpp makes for n KV cells: n rounded up to a multiple of 256."""
    return -(-n // 256) * 256


@dataclass
class ImageReport:
    """One image of a prompt, as the model gets it: a picture, or one crop of a picture (overview or tile).

    Attributes:
        picture: Index of its picture in the prompt.
        n_tokens: Image tokens that the encoder makes of it.
        grid: (rows, columns) of those tokens on the image, or None.
        cells: Grid cell of each token, row by row, (n_tokens,) int64, -1 for a token that shows no place (CLS).
        vision_kept: Original tokens that the vision stage left, ascending indices, (n1,) int64.
        decoder_kept: Original tokens that the decoder stages left, ascending indices, (n2,) int64.
        vision_scores: What the vision stage ranked by, (n_tokens,) float32. None: it chose no token by score.
        decoder_scores: Attention of the question's text at the first layer K, over vision_kept, (n1,) float32, or None.
        vision_mass: Original tokens that each of vision_kept stands for, (n1,) float64. None: one each.
        decoder_mass: The same for decoder_kept, (n2,) float64.
        special: Special tokens (row ends, tile separators), which always stay, (n_tokens,) bool. None: none.
        cached: Whether the encoder's output was kept from an earlier request.
        redundant: Tokens that were left out before the encoder because one near them shows the same, ascending indices.
        encoder_kept: Tokens that left the encoder, ascending indices. None: all.
        encoder_layer: Layer M of the encoder stage, which dropped the rest. None: there was none.
        same_as: Index of an earlier image of the prompt whose pixels are the same, so that it was encoded once; or
            None.
        video: Index of the video whose frame it is, counted over the videos of the prompt. None: it is no frame.
        second: Time of that frame in its video, in seconds. None: unknown.
    """

    picture: int
    n_tokens: int
    grid: tuple[int, int] | None
    cells: np.ndarray
    vision_kept: np.ndarray
    decoder_kept: np.ndarray
    vision_scores: np.ndarray | None = None
    decoder_scores: np.ndarray | None = None
    vision_mass: np.ndarray | None = None
    decoder_mass: np.ndarray | None = None
    special: np.ndarray | None = None
    cached: bool = False
    redundant: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    encoder_kept: np.ndarray | None = None
    encoder_layer: int | None = None
    same_as: int | None = None
    video: int | None = None
    second: float | None = None

    @property
    def n_encoder_kept(self) -> int:
        """Number of tokens that left the encoder."""
        return self.n_tokens if self.encoder_kept is None else len(self.encoder_kept)

    @property
    def entered(self) -> np.ndarray:
        """Tokens that entered the encoder, ascending indices."""
        return np.setdiff1d(np.arange(self.n_tokens), self.redundant)

    @property
    def n_special(self) -> int:
        """Number of special tokens."""
        return 0 if self.special is None else int(self.special.sum())

    def kept_on_grid(self, kept: np.ndarray) -> np.ndarray | None:
        """Where kept tokens lie on the grid.

        Args:
            kept: Indices of tokens, such as vision_kept.

        Returns:
            (rows, columns) float32 of 0 and 1, or None without a grid.
        """
        if self.grid is None:
            return None
        cells = self.cells[kept]
        on_grid = np.zeros(self.grid[0] * self.grid[1], np.float32)
        on_grid[cells[cells >= 0]] = 1.0
        return on_grid.reshape(self.grid)


@dataclass(repr=False)
class PruneReport:
    """What was dropped, and where the time went. Its repr is `summary`.

    Attributes:
        config: The config of the request. None: no pruning.
        images: The images of the prompt, in order.
        n_layers: Layers of the decoder.
        windows: (layer K, image tokens from there on) of each decoder stage. Empty if there was none.
        n_text_tokens: Text tokens of the prompt.
        n_kv_cells: KV cells that hold the prompt when generation starts, in every layer. Dropped rows that the next
            request may use also keep their cells, until an answer needs the room.
        milliseconds: Time of each step. Every moment counts for one step: preprocess, redundancy, encode,
            encoder_stage, vision_stage, reuse, prefix, probe, look_ahead, decoder_scores, decoder_stage, resume
            or prefill, fallback. first_token is the time from the call to the logits of the first answer token, all
            steps included. generate is the engine's work after that, without what the caller does between two pieces of
            a stream.
        n_generated: Tokens of the answer as `usage` counts them, without the one that ends it (EOS).
        n_sampled: The same with that token.
        in_place: False if kept rows did not return to their own KV cells and were decoded again (slower, same cache).
        reused_tokens: Tokens of the prompt that an earlier request had read, of those that the vision stage left. With
            a decoder stage they count for the layers below it, otherwise for all layers.
        repairs: What stock llama.cpp gets wrong with this encoder's file, and was put right.
        notes: What a user should know, such as a stage that this model cannot have.
        full_tokens: Image tokens that each picture would take at its own size, None for one that the encoder could not
            take. Empty if no picture was made smaller (PruneConfig.image_max_tokens).
        locate: Asks the encoder for `places`. None: nobody can be asked.
    """

    config: PruneConfig | None
    images: list[ImageReport]
    n_layers: int
    windows: list[tuple[int, int]]
    n_text_tokens: int
    n_kv_cells: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    n_generated: int = 0
    n_sampled: int = 0
    in_place: bool = True
    reused_tokens: int = 0
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    full_tokens: list[int | None] = field(default_factory=list)
    locate: Callable[[], list[Place | None]] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but `locate`, which is of this process."""
        return {**self.__dict__, "locate": None}

    @property
    def places(self) -> list[Place | None]:
        """Where each image lies on its picture, such as a tile; None where that is not known.

        The encoder is asked for it the first time, without encoding anything, so the engine must be open then.
        """
        found = [] if self.locate is None else self.locate()
        return found if len(found) == len(self.images) else [None] * len(self.images)

    @property
    def pictures(self) -> list[PictureFigures]:
        """Each picture of the prompt: the indices of its images (one, or its crops), and their tokens together."""
        of_picture: dict[int, list[int]] = {}
        for i, image in enumerate(self.images):
            of_picture.setdefault(image.picture, []).append(i)

        def total(crops: list[int], number: Callable[[ImageReport], int]) -> int:
            return sum(number(self.images[i]) for i in crops)

        return [
            {
                "images": crops,
                "n_tokens": total(crops, lambda i: i.n_tokens),
                "n_special": total(crops, lambda i: i.n_special),
                "n_redundant": total(crops, lambda i: len(i.redundant)),
                "n_encoder_kept": total(crops, lambda i: i.n_encoder_kept),
                "n_vision_kept": total(crops, lambda i: len(i.vision_kept)),
                "n_decoder_kept": total(crops, lambda i: len(i.decoder_kept)),
            }
            for crops in of_picture.values()
        ]

    @property
    def n_image_tokens(self) -> int:
        """Image tokens before pruning, over all images."""
        return sum(i.n_tokens for i in self.images)

    @property
    def n_full_tokens(self) -> int | None:
        """Image tokens that all pictures would take at their own size. None: the encoder could not take one of them."""
        if not self.full_tokens:
            return self.n_image_tokens
        known = [n for n in self.full_tokens if n is not None]
        return sum(known) if len(known) == len(self.full_tokens) else None

    @property
    def n_redundant(self) -> int:
        """Image tokens that were left out before the encoder, over all images."""
        return sum(len(i.redundant) for i in self.images)

    @property
    def n_encoder_kept(self) -> int:
        """Image tokens that left the encoder, over all images."""
        return sum(i.n_encoder_kept for i in self.images)

    @property
    def encoder_layer(self) -> int | None:
        """M of the encoder stage, or None if there was none."""
        return next((i.encoder_layer for i in self.images if i.encoder_layer is not None), None)

    @property
    def n_vision_kept(self) -> int:
        """Image tokens that the vision stage left, over all images."""
        return sum(len(i.vision_kept) for i in self.images)

    @property
    def n_decoder_kept(self) -> int:
        """Image tokens that the decoder stages left, over all images."""
        return sum(len(i.decoder_kept) for i in self.images)

    @property
    def decoder_layer(self) -> int | None:
        """K of the first decoder stage, or None if there was none."""
        return self.windows[0][0] if self.windows else None

    @property
    def average_tokens(self) -> float:
        """Image tokens per decoder layer, on average."""
        return average_tokens(self.n_vision_kept, self.windows, self.n_layers)

    @property
    def n_cached(self) -> int:
        """Pictures whose encoder output was kept from an earlier request. Their encoding took no time."""
        return sum(all(self.images[i].cached for i in picture["images"]) for picture in self.pictures)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first per second of `generate`. None: there was no second token.

        The first token needs no decode, because its logits are the prompt's. EOS needs one, and counts.
        """
        seconds = self.milliseconds.get("generate", 0.0) / 1e3
        return (self.n_sampled - 1) / seconds if self.n_sampled > 1 and seconds > 0 else None

    @property
    def token_layer_ratio(self) -> float:
        """Token-layers of the prompt without pruning over those with it: the ideal speed-up of the prefill."""
        full = self.n_layers * (self.n_text_tokens + self.n_image_tokens)
        return full / (self.n_layers * (self.n_text_tokens + self.average_tokens))

    @property
    def n_ctx_needed(self) -> int:
        """The smallest n_ctx that the request and its answer fit. KV memory is in proportion to it.

        llama.cpp rounds it up to a multiple of 256 (llama_context). The first decoder layers see everything that the
        vision stage kept, so all those cells are in use at once. The answer takes cells that the decoder stage has
        freed. EOS takes no cell, but llama_cpp asks for room for it.
        """
        n = max(self.n_text_tokens + self.n_vision_kept + 1, self.n_kv_cells + self.n_sampled)
        return round_n_ctx(n)

    @checked(skip=("source",))
    def picture(
        self, source: ImageSource | Video | Sequence[ImageSource], index: int = 0, limits: ImageLimits = ImageLimits()
    ) -> PIL.Image.Image:
        """Draws a picture of the prompt beside what each stage kept of it. Dropped tokens are dimmed.

        If the model got the picture in crops, each lies where it belongs: the overview has a row of panels, and the
        tiles have one. Of crops without a grid the share of their tokens that was kept is drawn. Where the crops lie is
        asked of the encoder; once the engine is closed, their grids stand beside the picture, and their titles say so.

        Args:
            source: The picture that was asked about. A list or tuple: that one and those after it, drawn under
                each other. A video: its frames, drawn so.
            index: Its index among the prompt's pictures. Each frame of a video is one.
            limits: What an image may be.

        Returns:
            An RGB image, which a notebook shows inline.

        Raises:
            ConfigError: The report has no such picture, or its tokens have no place on it.
            ImageError: The image cannot be read.
        """
        if isinstance(source, Video):
            source = list(read_video(source, limits).pictures)
        pictures = self.pictures
        if isinstance(source, (list, tuple)):
            if not source or index + len(source) > len(pictures):
                raise ConfigError(
                    f"{len(source)} pictures were given",
                    f"the report has {max(0, len(pictures) - index)} from there on",
                )
            return stack([self.picture(one, index + i, limits) for i, one in enumerate(source)])
        if not 0 <= index < len(pictures):
            raise ConfigError(f"the report has no image {index}", f"it has {len(pictures)}, counted from 0")
        crops = pictures[index]["images"]
        images = [self.images[i] for i in crops]
        kept: dict[str, Callable[[ImageReport], np.ndarray]] = {"vision stage": lambda image: image.vision_kept}
        if any(image.encoder_layer is not None for image in images):
            everything = lambda image: np.arange(image.n_tokens) if image.encoder_kept is None else image.encoder_kept
            kept = {f"encoder, from layer {self.encoder_layer}": everything, **kept}
        if any(len(image.redundant) for image in images):
            kept = {"into the encoder": lambda image: image.entered, **kept}
        if self.decoder_layer is not None:
            kept[f"decoder, from layer {self.decoder_layer}"] = lambda image: image.decoder_kept
        places = self.places
        shown = [
            Shown(
                image.n_tokens,
                image.grid,
                places[i],
                [(len(of(image)), image.kept_on_grid(of(image))) for of in kept.values()],
            )
            for i, image in zip(crops, images)
        ]
        return draw_shown(load_image(cast(ImageSource, source), limits), list(kept), shown)

    def summary(self) -> str:
        """The report in words: a line on what was read and how long it took, and a line for each note."""
        return "\n".join([f"{self._read()}, {self._times()}", *(f"note: {note}" for note in self.notes)])

    __repr__ = summary

    def _read(self) -> str:
        """What was read of the pictures."""
        if not self.images:
            return f"read {_count(self.n_text_tokens, 'text token')}"
        n = self.n_full_tokens or self.n_image_tokens
        if self.n_vision_kept == n:
            text = f"read all {_count(n, 'image token')}"
        else:
            text = f"read {self.n_vision_kept} of {_count(n, 'image token')} ({self.n_vision_kept / n:.0%})"
        if self.windows:
            text += f", {self.windows[-1][1]} from layer {self.windows[-1][0]} on"
        if len(self.pictures) > 1:
            text += f" in {len(self.pictures)} pictures"
        return text

    def _times(self) -> str:
        """What it took."""
        parts = []
        if self.n_cached:
            whose = "the picture" if len(self.pictures) == 1 else _count(self.n_cached, "picture")
            parts.append(f"{whose} not encoded again")
        if self.reused_tokens:
            parts.append(f"{_count(self.reused_tokens, 'token')} reused")
        if "first_token" in self.milliseconds:
            parts.append(f"first token {_seconds(self.milliseconds['first_token'])}")
        if self.n_generated:
            speed = "" if self.tokens_per_s is None or self.n_generated < 2 else f" at {self.tokens_per_s:.1f} tokens/s"
            parts.append(f"answer of {_count(self.n_generated, 'token')}{speed}")
        return ", ".join(parts) or "no times"

    def figures(self) -> ReportFigures:
        """The report without its arrays, as plain JSON values of a few hundred bytes. Names are those of `to_dict`."""
        return {
            "images": [
                {
                    "picture": i.picture,
                    "n_tokens": i.n_tokens,
                    "n_special": i.n_special,
                    "n_redundant": len(i.redundant),
                    "n_encoder_kept": i.n_encoder_kept,
                    "n_vision_kept": len(i.vision_kept),
                    "n_decoder_kept": len(i.decoder_kept),
                    "cached": i.cached,
                    "video": i.video,
                    "second": i.second,
                }
                for i in self.images
            ],
            **self._figures(),
        }

    def _figures(self) -> Figures:
        return {
            "config": self.config.to_dict() if self.config is not None else None,
            "pictures": self.pictures,
            "n_layers": self.n_layers,
            "n_text_tokens": self.n_text_tokens,
            "n_kv_cells": self.n_kv_cells,
            "n_generated": self.n_generated,
            "n_sampled": self.n_sampled,
            "reused_tokens": self.reused_tokens,
            "encoder_layer": self.encoder_layer,
            "decoder_layer": self.decoder_layer,
            "n_full_tokens": self.n_full_tokens,
            "n_image_tokens": self.n_image_tokens,
            "n_redundant": self.n_redundant,
            "n_encoder_kept": self.n_encoder_kept,
            "n_vision_kept": self.n_vision_kept,
            "n_decoder_kept": self.n_decoder_kept,
            "average_tokens": self.average_tokens,
            "token_layer_ratio": self.token_layer_ratio,
            "n_ctx_needed": self.n_ctx_needed,
            "n_cached": self.n_cached,
            "tokens_per_s": self.tokens_per_s,
            "milliseconds": dict(self.milliseconds),
            "in_place": self.in_place,
            "repairs": list(self.repairs),
            "full_tokens": list(self.full_tokens),
            "notes": list(self.notes),
        }

    def to_dict(self) -> ReportDict:
        """The whole report as plain JSON values: `json.dumps` takes it as it is. Arrays are lists.

        It has every field of PruneReport and of ImageReport by its name, and the properties that `figures` has:
        pictures, n_image_tokens, n_vision_kept, average_tokens, tokens_per_s, ...
        """
        images: list[ImageDict] = []
        for image in self.images:
            values: Any = {name: _plain(value) for name, value in vars(image).items()}
            images.append(values)
        return {"images": images, "windows": [list(window) for window in self.windows], **self._figures()}


def _plain(value: Any) -> Any:
    """A field of an ImageReport as JSON has it."""
    return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 995 else f"{milliseconds / 1e3:.1f} s"
