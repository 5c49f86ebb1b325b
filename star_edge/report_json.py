"""The JSON forms of a report, as types: what `PruneReport.figures` and `PruneReport.to_dict` return."""

from __future__ import annotations

from typing import Any, TypedDict


class _Counts(TypedDict):
    """Tokens. Names are those of ImageReport."""

    n_tokens: int
    n_special: int
    n_redundant: int
    n_encoder_kept: int
    n_vision_kept: int
    n_decoder_kept: int


class PictureFigures(_Counts):
    """A picture of the prompt, without arrays. images: indices of its images (one, or its crops); counts are over
    them.
    """

    images: list[int]


class ImageFigures(_Counts):
    """An image of the prompt, without arrays. Names are those of ImageReport."""

    picture: int
    cached: bool
    video: int | None
    second: float | None


class Figures(TypedDict):
    """What both forms of a report say in the same way. Names are those of PruneReport."""

    config: dict[str, Any] | None
    pictures: list[PictureFigures]
    n_layers: int
    n_text_tokens: int
    n_kv_cells: int
    n_generated: int
    n_sampled: int
    reused_tokens: int
    encoder_layer: int | None
    decoder_layer: int | None
    n_full_tokens: int | None
    n_image_tokens: int
    n_redundant: int
    n_encoder_kept: int
    n_vision_kept: int
    n_decoder_kept: int
    average_tokens: float
    token_layer_ratio: float
    n_ctx_needed: int
    n_cached: int
    tokens_per_s: float | None
    milliseconds: dict[str, float]
    in_place: bool
    repairs: list[str]
    full_tokens: list[int | None]
    notes: list[str]


class ReportFigures(Figures):
    """PruneReport.figures(): counts and times, without arrays."""

    images: list[ImageFigures]


class ImageDict(TypedDict):
    """An image in PruneReport.to_dict(): the fields of ImageReport, arrays as lists."""

    picture: int
    n_tokens: int
    grid: list[int] | None
    cells: list[int]
    vision_kept: list[int]
    decoder_kept: list[int]
    vision_scores: list[float] | None
    decoder_scores: list[float] | None
    vision_mass: list[float] | None
    decoder_mass: list[float] | None
    special: list[bool] | None
    cached: bool
    redundant: list[int]
    encoder_kept: list[int] | None
    encoder_layer: int | None
    same_as: int | None
    video: int | None
    second: float | None


class ReportDict(Figures):
    """PruneReport.to_dict(): everything. windows: [layer K, image tokens from there on] of each decoder stage."""

    images: list[ImageDict]
    windows: list[list[int]]
