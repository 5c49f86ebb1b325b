"""What to prune: `PruneConfig`, its named presets, and how a keep ratio becomes a number of tokens.

Knows numbers only: no image, no model. What depends on a model (the number of its layers, the tokens of an image) comes in
as an argument.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace
from typing import Literal

from .errors import ConfigError

Keep = float | int


def _check_keep(name: str, keep: object) -> None:
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise ConfigError(f"{name}={keep!r} is a {type(keep).__name__}", "use a fraction (0.25) or a count of tokens (144)")
    if not isinstance(keep, numbers.Integral) and not 0.0 < keep <= 1.0:  # NaN fails every comparison
        raise ConfigError(f"{name}={keep} is no fraction in (0, 1]", "1.0 keeps all; an int is a count of tokens")
    if isinstance(keep, numbers.Integral) and keep < 1:
        raise ConfigError(f"{name}={keep} keeps nothing", "keep at least one token of each image")


@dataclass(frozen=True)
class PruneConfig:
    """How many image tokens to keep at each stage.

    vision_keep: what stays after the vision encoder (STAR stage 1), ranked by the attention that a patch receives there.
    decoder_keep: what stays from decoder layer K on (stage 2), ranked by the attention of the question's text.
        For both, a float in (0, 1] is a fraction of the image's original tokens, an int is a count for each image:
        1.0 means all, 1 means one token.
    decoder_layer: K, 1 <= K <= layers - 1; layers 0..K-1 see every token that the vision stage left. None: chosen for the model.
    mass_share: share of each stage's budget that goes to representatives of the dropped tokens, which then count in every softmax
        for what they stand for (see selection.keep_by_score). 0 is plain STAR: dropped tokens are gone.
    text_rows: "all" scores with every text token after the last image (STAR), "last" with the last one only (FastV).

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    vision_keep: Keep = 1.0
    decoder_keep: Keep = 1.0
    decoder_layer: int | None = None
    mass_share: float = 0.0
    text_rows: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.mass_share, bool) or not isinstance(self.mass_share, (int, float)) or not 0 <= self.mass_share <= 1:
            raise ConfigError(
                f"mass_share={self.mass_share!r} is no share in 0..1",
                "0 drops tokens for good, 0.5 makes half of the kept ones representatives",
            )
        for name in ("vision_keep", "decoder_keep"):
            keep = getattr(self, name)
            _check_keep(name, keep)  # and NumPy's numbers become Python's
            object.__setattr__(self, name, int(keep) if isinstance(keep, numbers.Integral) else float(keep))
        if isinstance(self.vision_keep, int) and isinstance(self.decoder_keep, int) and self.decoder_keep > self.vision_keep:
            raise ConfigError(f"decoder_keep={self.decoder_keep} is more than vision_keep={self.vision_keep} leaves", "lower decoder_keep")
        if (
            isinstance(self.vision_keep, float)
            and isinstance(self.decoder_keep, float)
            and self.decoder_keep > self.vision_keep
            and self.decoder_keep < 1.0
        ):
            raise ConfigError(
                f"decoder_keep={self.decoder_keep} is more than vision_keep={self.vision_keep} leaves",
                "both are fractions of the image's original tokens: lower decoder_keep, or use 1.0 for no decoder stage",
            )
        if self.decoder_layer is not None and (
            isinstance(self.decoder_layer, bool) or not isinstance(self.decoder_layer, int) or self.decoder_layer < 1
        ):
            raise ConfigError(f"decoder_layer={self.decoder_layer!r} is no layer", "use 1 to layers - 1, or None to have it chosen")
        if self.text_rows not in ("all", "last"):
            raise ConfigError(f"text_rows={self.text_rows!r} is unknown", 'use "all" or "last"')

    @property
    def prunes_in_decoder(self) -> bool:
        """Whether there is a decoder stage. An explicit decoder_layer asks for one even when everything is kept."""
        return self.decoder_keep != 1.0 or isinstance(self.decoder_keep, int) or self.decoder_layer is not None

    @property
    def prunes_in_vision(self) -> bool:
        return self.vision_keep != 1.0 or isinstance(self.vision_keep, int)


PRESETS: dict[str, PruneConfig | None] = {
    "off": None,
    # mass_share 0.5 was the best of 0, 0.15, 0.3, 0.5 and 0.7 for "balanced" on questions that no table reports
    "quality": PruneConfig(vision_keep=0.75, decoder_keep=0.375, mass_share=0.5),
    "balanced": PruneConfig(vision_keep=0.5, decoder_keep=0.125, mass_share=0.5),
    "fast": PruneConfig(vision_keep=0.25, decoder_keep=0.0625, mass_share=0.5),
}
DEFAULT_PRESET = "balanced"


def resolve_prune(prune: PruneConfig | str | None) -> PruneConfig | None:
    """The config behind a preset's name; None and "off" mean no pruning.

    Raises:
        ConfigError: an unknown name, or something that is no config.
    """
    if prune is None or isinstance(prune, PruneConfig):
        return prune
    if isinstance(prune, str):
        if prune in PRESETS:
            return PRESETS[prune]
        raise ConfigError(f"there is no preset {prune!r}", f"use one of {', '.join(PRESETS)}, or a PruneConfig")
    raise ConfigError(f"prune={prune!r} is a {type(prune).__name__}", "use a PruneConfig, the name of a preset, or None")


def override(config: PruneConfig | None, **changes: object) -> PruneConfig | None:
    """The config with the given fields replaced where they are not None; a config is made when there was none."""
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(config or PruneConfig(), **changes) if changes else config


def keep_count(name: str, keep: Keep, n_tokens: int) -> int:
    """Number of tokens that `keep` leaves of an image that had n_tokens: at least one, halves rounded up.

    Raises:
        ConfigError: a count of more than n_tokens.
    """
    if isinstance(keep, float):
        return max(1, min(n_tokens, math.floor(keep * n_tokens + 0.5)))
    if keep > n_tokens:
        raise ConfigError(f"{name}={keep} is over the image's {n_tokens} tokens", f"use a count of 1 to {n_tokens}, or a fraction")
    return keep


def choose_layer(decoder_layer: int | None, n_layers: int) -> int:
    """Layer K for a decoder of n_layers: the one asked for, otherwise a third of the way in.

    A third is a provisional rule: it is the layer that the reference model was tuned at (2 of 6). Deeper scores better and
    saves less (PyramidDrop, arXiv 2410.17247, fig. 1: image tokens lose their influence layer by layer).

    Raises:
        ConfigError: not within 1..n_layers - 1.
    """
    if n_layers < 2:
        raise ConfigError(f"a decoder of {n_layers} layer has no place for a decoder stage", "use decoder_keep=1.0")
    if decoder_layer is None:
        return max(1, min(n_layers - 1, round(n_layers / 3)))
    if decoder_layer > n_layers - 1:
        raise ConfigError(f"decoder_layer={decoder_layer} is outside 1..{n_layers - 1}", f"the model has {n_layers} layers")
    return decoder_layer
