"""Configs by name, `PRESETS`, and how some fields of a config are replaced by what a caller asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, quoted
from .config import Keep, PruneConfig

_PLAIN: dict[str, Any] = {"representatives": "none", "vision_share": 0.0, "decoder_share": 0.0}
PRESETS: dict[str, PruneConfig | None] = {
    "off": None,
    # Averages of a half, a quarter and a tenth of the tokens, with K at two thirds of the layers, or more where a
    # picture needs more (vision_tolerance). "quality": answers stay. "balanced": scenes are cheap, pages stay legible.
    # "fast": small text goes first, and the encoder sees less too. "document": pages, where little is merged and the
    # decoder stage is late.
    "quality": PruneConfig(redundancy="auto", vision_keep=0.6, decoder_keep=0.3, vision_tolerance=0.1),
    "balanced": PruneConfig(redundancy="auto", vision_keep=0.3, decoder_keep=0.15, vision_tolerance=0.2),
    "fast": PruneConfig(
        redundancy="auto",
        encoder_keep=0.12,
        encoder_tolerance=0.1,
        vision_keep=0.12,
        decoder_keep=0.06,
        vision_tolerance=0.4,
    ),
    "document": PruneConfig(
        redundancy=0.1,
        vision_keep=0.3,
        windows=((0.8, 0.15),),
        vision_tolerance=0.1,
        decoder_representatives="none",
    ),
    # Published methods, at the budgets of their papers; other budgets through override
    "star": PruneConfig(vision_keep=0.5, decoder_keep=0.25, decoder_scorer="text", **_PLAIN),
    "fastv": PruneConfig(decoder_keep=0.5, decoder_layer=2, decoder_scorer="last", **_PLAIN),
    "visionzip": PruneConfig(
        vision_keep=1 / 9, vision_scorer="cls", representatives="contextual", vision_share=10 / 64
    ),
    "divprune": PruneConfig(vision_keep=0.098, vision_scorer="maxmin", **_PLAIN),
    "pyramiddrop": PruneConfig(windows=((0.25, 0.5), (0.5, 0.25), (0.75, 0.125)), decoder_scorer="last", **_PLAIN),
}
DEFAULT_PRESET = "balanced"


def override(config: PruneConfig | None, **changes: Any) -> PruneConfig | None:
    """A copy of the config with some fields replaced.

    What contradicts the changes is left out, because the caller need not know the config: a decoder stage that would
    keep more than the vision stage leaves, a vision stage that would leave less than the decoder stage keeps, windows
    if decoder_keep is given, and a stage's tolerance if its keep or a budget of all images is given, which then is
    what stays.

    Args:
        config: The config, or None for no pruning.
        **changes: Fields of PruneConfig. None leaves a field as it is.

    Returns:
        The new config; None if there was none and nothing changes.

    Raises:
        ConfigError: The changes contradict each other, or a value cannot be used.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return config
    config = config or PruneConfig()
    PruneConfig(**changes)  # raises for every fault in the changes alone
    # another K: the one asked for, or an early one, since the question looks ahead
    if ("decoder_layer" in changes or "look_ahead" in changes) and len(config.windows) == 1:
        changes = {"decoder_keep": config.windows[0][1], **changes}
    if "decoder_keep" in changes and config.windows:
        config = replace(config, windows=())

    def exceeds(then: Keep, first: Keep) -> bool:
        return type(then) is type(first) and then > first and then != 1.0

    vision, decoder = changes.get("vision_keep", config.vision_keep), changes.get("decoder_keep", config.decoder_keep)
    if "decoder_keep" not in changes:
        if exceeds(decoder, vision):
            changes = {"decoder_layer": None, **changes, "decoder_keep": 1.0}
        changes |= {"windows": tuple(w for w in config.windows if not exceeds(w[1], vision))} if config.windows else {}
    elif "vision_keep" not in changes and exceeds(decoder, vision):
        changes["vision_keep"] = 1.0
    loses_tolerance = "encoder_tolerance" not in changes and (
        "encoder_keep" in changes or changes.get("budget") == "prompt"
    )
    if loses_tolerance:
        changes = {**changes, "encoder_tolerance": None}
    changes = _without_encoder_conflicts(config, changes, exceeds)
    if ("vision_keep" in changes or changes.get("budget") == "prompt") and "vision_tolerance" not in changes:
        config = replace(config, vision_tolerance=None)
    if config.windows and "decoder_layer" in changes:
        raise ConfigError(
            f"decoder_layer={quoted(changes['decoder_layer'])} needs one decoder stage, and windows has "
            f"{len(config.windows)}",
            "give decoder_keep too: it replaces the windows",
        )
    return replace(config, **changes)


def _without_encoder_conflicts(
    config: PruneConfig, changes: dict[str, Any], exceeds: Callable[[Keep, Keep], bool]
) -> dict[str, Any]:
    """The changes, with the encoder stage or the stages after it left out where they contradict each other.

    A stage that adapts to the picture contradicts none after it, since its keep is the least that stays. It still gives
    way to a share that is given for a later stage, of which it might leave less.
    """

    def value(name: str) -> Any:
        return changes.get(name, getattr(config, name))

    stage = ("encoder_keep", "encoder_tolerance", "representatives", "budget")
    adapts = PruneConfig(**{name: value(name) for name in stage}).encoder_adapts
    is_given = "encoder_keep" in changes or changes.get("encoder_tolerance") is not None
    for name, off in (("vision_keep", {"vision_keep": 1.0}), ("decoder_keep", {"decoder_keep": 1.0, "windows": ()})):
        if exceeds(value(name), value("encoder_keep")) and not (adapts and (is_given or name not in changes)):
            if "encoder_keep" not in changes:
                return {"encoder_layer": None, "encoder_tolerance": None, **changes, "encoder_keep": 1.0}
            changes = {**changes, **off}
    return changes
