"""What `star-edge tune` can vary: axes as data, and which of them a model supports.

An axis has values from mild to strong. To add one, add an entry to `make_axes`. Axes of one stage exclude each other.
A value is the fields of `PruneConfig` that it sets. Its decoder_keep is a share of the rows that reach layer K.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import StarVLM
from ..errors import EvaluationError, StarEdgeError
from ..io.images import load_image
from ..io.questions import Question
from ..pruning.config import PruneConfig
from ..report import PruneReport
from .configs import OFF, NamedConfig

STAGES = ("redundancy", "resolution", "encoder", "vision", "decoder")
Point = tuple[int, ...]  # for each axis 0 (off) or the number of its value, from 1

# Shares of the decoder's layers where K is looked for: from late, where few rows still matter, to early
_DEPTHS = (0.9, 0.8, 0.75, 0.67, 0.58, 0.5, 0.42, 0.33, 0.25)
_EARLY = (0.42, 0.33, 0.25, 0.17, 0.1)  # where the question looks ahead
_EIGHTH, _QUARTER, _HALF = 0.125, 0.25, 0.5
_AHEAD = 0.75
_LEAST = 0.1  # that stays in the encoder where it keeps what a picture needs
_PROBED = 3  # pictures
_LOOKED_AT = 20  # questions, for pictures that can be read


@dataclass(frozen=True)
class Axis:
    """One thing that can be made stronger.

    Attributes:
        name: Unique, for people.
        stage: One of STAGES. At most one axis of a stage is on.
        values: Fields of PruneConfig, from mild to strong. "Off" is not among them.
        problem: Why a request that asked for a value went without it, from its report; or "".
    """

    name: str
    stage: str
    values: tuple[dict[str, Any], ...]
    problem: Callable[[PruneReport], str]


def make_axes(
    decoder_layers: Sequence[int], encoder_layers: int | None, early_layers: Sequence[int] = ()
) -> list[Axis]:
    """All axes.

    Args:
        decoder_layers: Layers K to try, from late to early.
        encoder_layers: Layers of the encoder, if an encoder stage may begin half way in too.
        early_layers: Layers K to try where the question looks ahead, from late to early.
    """

    def keep(field: str, *shares: float, **more: Any) -> tuple[dict[str, Any], ...]:
        return tuple({field: share, **more} for share in shares)

    def needed(*tolerances: float) -> tuple[dict[str, Any], ...]:
        return tuple({"encoder_keep": _LEAST, "encoder_tolerance": tolerance} for tolerance in tolerances)

    def decoder(share: float, layers: Sequence[int] = decoder_layers, **more: Any) -> tuple[dict[str, Any], ...]:
        # seen_below takes no time before the first token, and later tokens are right more often
        return tuple({"decoder_keep": share, "decoder_layer": k, "seen_below": True, **more} for k in layers)

    axes = [
        Axis("redundancy", "redundancy", keep("redundancy", "exact", 0.05, 0.1), _no_redundancy),  # type: ignore[arg-type]
        Axis("resolution", "resolution", keep("image_max_tokens", 0.75, 0.6, 0.5, 0.35, 0.25), _no_resolution),
        Axis("encoder", "encoder", keep("encoder_keep", 0.75, 0.6, 0.5, 0.35, 0.25), _no_encoder_stage),
        Axis("encoder, as pictures need", "encoder", needed(0.05, 0.1, 0.2), _no_encoder_stage),
        Axis("vision", "vision", keep("vision_keep", 0.75, 0.6, 0.5, 0.375, 0.25, 0.15, 0.1, 0.06), _no_vision_stage),
        Axis("decoder, an eighth", "decoder", decoder(_EIGHTH), _no_decoder_stage),
        Axis("decoder, half", "decoder", decoder(_HALF), _no_decoder_stage),
        Axis("decoder, looking ahead", "decoder", decoder(_QUARTER, early_layers, look_ahead=_AHEAD), _no_look_ahead),
    ]
    if encoder_layers is not None and encoder_layers >= 4:
        halfway = keep("encoder_keep", 0.75, 0.5, 0.35, 0.25, encoder_layer=encoder_layers // 2)
        axes.insert(3, Axis("encoder, half way in", "encoder", halfway, _no_encoder_stage))
    return [axis for axis in axes if axis.values]


def make_config(axes: Sequence[Axis], point: Point) -> NamedConfig:
    """The config at a point; OFF where every axis is off.

    A vision stage cannot keep more than an encoder stage of a fixed share has left: it keeps as much then. A decoder
    stage keeps a share of what the vision stage leaves.
    """
    values: dict[str, Any] = {}
    for axis, number in zip(axes, point):
        if number:
            values |= axis.values[number - 1]
    if not values:
        return OFF
    encoder = 1.0 if "encoder_tolerance" in values else values.get("encoder_keep", 1.0)
    if "vision_keep" in values:
        values["vision_keep"] = min(values["vision_keep"], encoder)
    if "decoder_keep" in values:
        values["decoder_keep"] = round(values["decoder_keep"] * min(values.get("vision_keep", 1.0), encoder), 6)
    return NamedConfig(
        " ".join(f"{_SHORT.get(k, k)} {v}" for k, v in values.items() if v is not True), "tune", PruneConfig(**values)
    )


_SHORT = {
    "image_max_tokens": "picture",
    "encoder_keep": "encoder",
    "encoder_tolerance": "tolerance",
    "encoder_layer": "M",
    "vision_keep": "vision",
    "decoder_keep": "decoder",
    "decoder_layer": "K",
    "look_ahead": "ahead",
}


def excludes(axes: Sequence[Axis], point: Point) -> bool:
    """Whether two axes of one stage are on."""
    on = [axis.stage for axis, number in zip(axes, point) if number]
    return len(on) != len(set(on))


# ---- what a model supports ----


def _note(report: PruneReport, words: str, otherwise: str) -> str:
    return next((note for note in report.notes if words in note), otherwise)


def _no_redundancy(report: PruneReport) -> str:
    return _note(report, "left out before the encoder", "")


def _no_resolution(report: PruneReport) -> str:
    smaller = report.n_full_tokens is None or report.n_image_tokens < report.n_full_tokens
    return "" if smaller else "the model makes as many image tokens of a smaller picture"


def _no_encoder_stage(report: PruneReport) -> str:
    return "" if report.encoder_layer is not None else _note(report, "encoder stage", "no encoder stage")


def _no_vision_stage(report: PruneReport) -> str:
    return "" if report.n_vision_kept < report.n_image_tokens else "the vision stage left every token"


def _no_decoder_stage(report: PruneReport) -> str:
    return "" if report.windows else _note(report, "decoder stage", "no decoder stage")


def _no_look_ahead(report: PruneReport) -> str:
    return _no_decoder_stage(report) or _note(report, "does not look ahead", "")


@dataclass(frozen=True)
class Supported:
    """What a model can be tuned by.

    Attributes:
        axes: Axes that it supports.
        left_out: Why not, for each stage that it does not support.
        answer_seconds: An unpruned answer takes so long, on average of a few.
    """

    axes: list[Axis]
    left_out: dict[str, str]
    answer_seconds: float


def find_axes(
    vlm: StarVLM, questions: Sequence[Question], stages: Sequence[str], max_tokens: int, prompt_suffix: str = ""
) -> Supported:
    """Asks about a few pictures, unpruned and once for each axis, and looks at the reports.

    Args:
        vlm: The engine.
        questions: Questions, of which the first with different pictures are used.
        stages: The stages to look at, of STAGES.
        max_tokens: Most tokens of an answer.
        prompt_suffix: Text after each question.

    Raises:
        EvaluationError: None of the first questions can be answered.
    """
    asked: list[tuple[str, list[Any]]] = []
    seconds: list[float] = []
    seen: set[tuple[str, ...]] = set()
    problem = ""
    for question in questions[:_LOOKED_AT]:
        if question.images in seen:
            continue
        seen.add(question.images)
        try:
            pictures = [load_image(source, vlm.image_limits) for source in question.sources]
            prompt = question.prompt + prompt_suffix
            if not asked:  # the first request allocates and pages in
                vlm.read_prompt(prompt, pictures, None)
            start = time.perf_counter()
            vlm.generate(prompt, pictures, None, max_tokens)
            seconds.append(time.perf_counter() - start)
        except StarEdgeError as error:
            problem = problem or str(error)
            continue
        asked.append((prompt, pictures))
        if len(asked) == _PROBED:
            break
    if not asked:
        raise EvaluationError(f"none of the first questions can be answered: {problem}", "see star-edge eval")
    axes: list[Axis] = []
    left_out: dict[str, str] = {}
    early = _decoder_layers(vlm, _EARLY)
    for axis in make_axes(_decoder_layers(vlm, _DEPTHS), _encoder_layers(vlm), early):
        if axis.stage not in stages:
            continue
        reason = _why_not(vlm, axis, asked)
        if not reason:
            axes.append(axis)
        else:
            left_out.setdefault(axis.stage, reason)
    supported = {axis.stage for axis in axes}
    return Supported(
        axes,
        {stage: reason for stage, reason in left_out.items() if stage not in supported},
        sum(seconds) / len(seconds),
    )


def _why_not(vlm: StarVLM, axis: Axis, asked: Sequence[tuple[str, list[Any]]]) -> str:
    """Why no picture had the axis' middle value, or "" if one had."""
    prune = PruneConfig(**axis.values[len(axis.values) // 2])
    reason = ""
    for prompt, pictures in asked:
        try:
            _, report = vlm.read_prompt(prompt, pictures, prune)
        except StarEdgeError as error:
            reason = reason or error.cause
            continue
        problem = axis.problem(report)
        if not problem:
            return ""
        reason = reason or problem
    return reason


def _decoder_layers(vlm: StarVLM, depths: Sequence[float]) -> list[int]:
    """K from late to early; one layer where the decoder can have no stage, so that its report says why."""
    decoder = vlm.decoder
    n = decoder.n_layers
    if n < 2:
        return []
    layers = [max(1, min(n - 1, round(depth * n))) for depth in depths]
    if not decoder.stage_problem:
        layers = [decoder.nearest_attention(layer) for layer in layers]
    return sorted(set(layers), reverse=True)


def _encoder_layers(vlm: StarVLM) -> int | None:
    encoder = vlm.encoder
    return None if encoder is None else encoder.profile.n_layers(encoder.metadata)
