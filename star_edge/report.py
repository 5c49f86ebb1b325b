"""What a run did: tokens, kept indices, scores, times, cells."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import PIL.Image

from .arguments import checked
from .errors import ConfigError
from .io.images import ImageLimits, ImageSource, load_image
from .io.overlay import Stage, draw_crops, draw_overlay, fit_to_grid
from .pruning.config import PruneConfig
from .pruning.selection import average_tokens

_TOTALS = (
    "decoder_layer",
    "n_image_tokens",
    "n_vision_kept",
    "n_decoder_kept",
    "average_tokens",
    "token_layer_ratio",
    "n_ctx_needed",
    "n_cached",
    "tokens_per_s",
)


def round_n_ctx(n: int) -> int:
    """The context that llama.cpp makes for n cells."""
    return -(-n // 256) * 256


@dataclass
class ImageReport:
    """One image of a prompt, as its model gets it: a picture, or one crop of a picture (overview or tile).

    picture: number of the picture that it is of.
    n_tokens: image tokens that the encoder makes of it.
    grid: (rows, columns) of those tokens on the image, or None.
    cells: place of each token on the grid, row by row, (n_tokens,) int64, -1 for a token that shows no place (CLS).
    vision_kept, decoder_kept: ascending indices into the image's original tokens that each stage left, (n1,) and (n2,)
        int64.
    vision_scores: what the vision stage ranked by, (n_tokens,) float32, or None where it chose by no score.
    decoder_scores: attention of the question's text at the first layer K, (n1,) float32 over vision_kept, or None.
    vision_mass, decoder_mass: original tokens that each kept one stands for, (n1,) and (n2,), or None for one each.
    special: tokens that show no place, such as row ends, and always stay, (n_tokens,) bool; None: none.
    cached: the encoder's output was known from an earlier request.
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

    @property
    def n_special(self) -> int:
        return 0 if self.special is None else int(self.special.sum())

    def kept_on_grid(self, kept: np.ndarray) -> np.ndarray | None:
        """Where the kept tokens lie: (rows, columns) float32 of 0 and 1, or None without a grid."""
        if self.grid is None:
            return None
        cells = self.cells[kept]
        on_grid = np.zeros(self.grid[0] * self.grid[1], np.float32)
        on_grid[cells[cells >= 0]] = 1.0
        return on_grid.reshape(self.grid)


@dataclass
class PruneReport:
    """What was dropped and where the time went; echoes the config that was used.

    windows: (layer K, image tokens from there on) of each decoder stage; empty when there was none.
    n_text_tokens: text tokens of the prompt.
    n_kv_cells: KV cells that hold the prompt when generation starts, in every layer. Dropped rows that the next request
        may use stay in theirs until an answer needs the room.
    milliseconds: preprocess, encode (vision_stage within it), reuse, prefix, probe (decoder_scores within it),
        decoder_stage, resume or prefill, fallback, first_token (from the call to the logits of the first answer token),
        generate (the engine's work on the answer after that; what the caller does between two pieces of a stream is not
        in it).
    n_generated: tokens of the answer, as `usage` counts them: the token that ends it (EOS) is none.
    n_sampled: the same with that token.
    in_place: False when kept rows did not return to their own KV cells and were decoded again (a fallback: slower, same
        cache).
    reused_tokens: tokens of the prompt, of those that the vision stage left, which an earlier request had read: with a
        decoder stage in the layers below it, otherwise in all.
    repairs: what stock llama.cpp gets wrong with this encoder's file, and was put right.
    notes: what a user should know, such as a stage that this model cannot have.
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

    @property
    def pictures(self) -> list[dict[str, object]]:
        """For each picture of the prompt its images (one, or its crops), by their index, and their tokens together, as
        plain JSON values.
        """
        of_picture: dict[int, list[int]] = {}
        for i, image in enumerate(self.images):
            of_picture.setdefault(image.picture, []).append(i)
        total = lambda crops, number: sum(number(self.images[i]) for i in crops)
        return [
            {
                "images": crops,
                "n_tokens": total(crops, lambda i: i.n_tokens),
                "n_special": total(crops, lambda i: i.n_special),
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
    def n_vision_kept(self) -> int:
        return sum(len(i.vision_kept) for i in self.images)

    @property
    def n_decoder_kept(self) -> int:
        return sum(len(i.decoder_kept) for i in self.images)

    @property
    def decoder_layer(self) -> int | None:
        """K of the first decoder stage, or None when there was none."""
        return self.windows[0][0] if self.windows else None

    @property
    def average_tokens(self) -> float:
        """Image tokens for each decoder layer, on average."""
        return average_tokens(self.n_vision_kept, self.windows, self.n_layers)

    @property
    def n_cached(self) -> int:
        """Pictures whose encoder output was known from an earlier request, so that their encoding took no time."""
        return sum(all(self.images[i].cached for i in picture["images"]) for picture in self.pictures)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first for each second of `generate`: the first needs no decode, its logits are the prompt's.
        EOS needs one.
        """
        seconds = self.milliseconds.get("generate", 0.0) / 1e3
        return (self.n_sampled - 1) / seconds if self.n_sampled > 1 and seconds > 0 else None

    @property
    def token_layer_ratio(self) -> float:
        """Token-layers of the prompt without pruning over those with it: the best speed-up of the prefill that can be
        had.
        """
        full = self.n_layers * (self.n_text_tokens + self.n_image_tokens)
        return full / (self.n_layers * (self.n_text_tokens + self.average_tokens))

    @property
    def n_ctx_needed(self) -> int:
        """The smallest n_ctx that this request and its answer fit: KV memory is in proportion to it.

        llama.cpp rounds it up to a multiple of 256 (llama_context). The first decoder layers see all that the vision
        stage kept, so their cells are all in use at once; the answer takes those that the decoder stage has freed. EOS
        takes no cell, but llama_cpp asks for room for it.
        """
        n = max(self.n_text_tokens + self.n_vision_kept + 1, self.n_kv_cells + self.n_sampled)
        return round_n_ctx(n)

    @checked(skip=("source",))
    def picture(self, source: ImageSource, index: int = 0, limits: ImageLimits = ImageLimits()) -> PIL.Image.Image:
        """The image beside what each stage kept of it, dropped tokens dimmed; a notebook shows it as it is. RGB.

        Of a picture that the model gets in crops, the crops' grids stand beside it: llama.cpp does not say where in the
        picture they lie.
        source: the picture that was asked about, of several number `index`.

        Raises:
            ConfigError: there is no such picture in the report, or its tokens have no grid.
            ImageError: the image cannot be read.
        """
        pictures = self.pictures
        if not 0 <= index < len(pictures):
            raise ConfigError(f"the report has no image {index}", f"it has {len(pictures)}, counted from 0")
        crops = pictures[index]["images"]
        images = [self.images[i] for i in crops]
        on_grid = [image for image in images if image.grid is not None]
        if not on_grid:
            raise ConfigError(
                "this model's image tokens have no grid",
                "leave the picture (--overlay) out: report.images has the kept indices",
            )
        kept = {"vision stage": "vision_kept"}
        if self.decoder_layer is not None:
            kept[f"decoder, from layer {self.decoder_layer}"] = "decoder_kept"
        total = sum(image.n_tokens for image in images)
        stages = []
        for title, name in kept.items():
            title = f"{title}: {sum(len(getattr(image, name)) for image in images)} of {total}"
            stages.append((title, [image.kept_on_grid(getattr(image, name)) for image in on_grid]))
        pixels = load_image(source, limits)
        if len(images) > 1:
            missing = f", {len(images) - len(on_grid)} without a grid" if len(on_grid) < len(images) else ""
            return draw_crops(pixels, [(f"{title}, in {len(images)} crops{missing}", grids) for title, grids in stages])
        return draw_overlay(fit_to_grid(pixels, images[0].grid), [Stage(title, grids[0]) for title, grids in stages])

    def summary(self) -> dict[str, object]:
        """The numbers without the arrays, as plain JSON values of a few hundred bytes. Names are those of `to_dict`."""
        return {
            "config": self.config.to_dict() if self.config is not None else None,
            "images": [
                {
                    "picture": i.picture,
                    "n_tokens": i.n_tokens,
                    "n_special": i.n_special,
                    "n_vision_kept": len(i.vision_kept),
                    "n_decoder_kept": len(i.decoder_kept),
                    "cached": i.cached,
                }
                for i in self.images
            ],
            "pictures": self.pictures,
            **{
                name: getattr(self, name)
                for name in ("n_layers", "n_text_tokens", "n_kv_cells", "n_generated", "n_sampled", "reused_tokens")
            },
            **{name: getattr(self, name) for name in _TOTALS},
            "milliseconds": dict(self.milliseconds),
            "in_place": self.in_place,
            "repairs": list(self.repairs),
            "notes": list(self.notes),
        }

    def to_dict(self) -> dict[str, object]:
        """Everything as plain JSON values."""
        data = asdict(self)
        data["config"] = self.config.to_dict() if self.config is not None else None
        data["windows"] = [list(window) for window in self.windows]
        for image in data["images"]:
            for name, value in image.items():
                if isinstance(value, np.ndarray):
                    image[name] = value.tolist()
        data["pictures"] = self.pictures
        data.update({name: getattr(self, name) for name in _TOTALS})
        return data
