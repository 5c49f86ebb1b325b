"""What to prune: `PruneConfig`, its named presets, and how a keep ratio becomes a number of tokens.

Knows numbers only: no image, no model. What depends on a model (the number of its layers, the tokens of an image) comes
in as an argument.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from ..errors import ConfigError
from ..io.json_input import read_json
from .representatives import REPRESENTATIVES
from .scorers import DECODER_SCORERS, VISION_SCORERS

Keep = float | int


MAX_WINDOWS = 6  # each parks what it drops in a sequence of its own (llamacpp.context.N_SEQUENCES)


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # NumPy's are no int


def _check_keep(name: str, keep: object) -> Keep:
    """The keep ratio or count as Python's own float or int."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise ConfigError(
            f"{name}={keep!r} is a {type(keep).__name__}", "use a fraction (0.25) or a count of tokens (144)"
        )
    if not isinstance(keep, numbers.Integral) and not 0.0 < keep <= 1.0:  # NaN fails every comparison
        raise ConfigError(f"{name}={keep} is no fraction in (0, 1]", "1.0 keeps all; an int is a count of tokens")
    if isinstance(keep, numbers.Integral) and keep < 1:
        raise ConfigError(f"{name}={keep} keeps nothing", "keep at least one token of each image")
    return int(keep) if isinstance(keep, numbers.Integral) else float(keep)


def _check_order(first_name: str, first: Keep, then_name: str, then: Keep) -> None:
    if isinstance(first, int) and isinstance(then, int) and then > first:
        raise ConfigError(f"{then_name}={then} is more than {first_name}={first} leaves", f"lower {then_name}")
    if isinstance(first, float) and isinstance(then, float) and first < then < 1.0:
        raise ConfigError(
            f"{then_name}={then} is more than {first_name}={first} leaves",
            f"both are fractions of the image's original tokens: lower {then_name}, or use 1.0 for no decoder stage",
        )


@dataclass(frozen=True)
class PruneConfig:
    """How many image tokens to keep at each stage, and which.

    vision_keep: what stays after the vision encoder (stage 1).
    decoder_keep: what stays from decoder layer K on (stage 2).
        For both, a float in (0, 1] is a fraction of the image's original tokens, an int is a count for each image:
        1.0 means all, 1 means one token. A picture that its model gets in crops is one image: the crops share its
        tokens by what each contributes, and every crop keeps at least one. Tokens that show no place (row ends, tile
        separators) always stay, stand for no others, and are not counted, neither in a fraction nor in a count.
    decoder_layer: K, 1 <= K <= layers - 1; layers 0..K-1 see every token that the vision stage left. None: chosen for
        the model.
    vision_scorer, decoder_scorer: what tokens are ranked by, a name in scorers.VISION_SCORERS and
        scorers.DECODER_SCORERS.
    representatives: what becomes of dropped tokens, a name in representatives.REPRESENTATIVES. "cluster" and "even"
        keep their weight in every softmax; "none" drops them for good, as the paper does.
    vision_share, decoder_share: the part of each stage's budget that is chosen to represent the dropped tokens instead
        of by score.
    windows: more than one decoder stage (PyramidDrop, arXiv 2410.17247): (layer, keep) pairs with ascending layers in
        place of decoder_layer and decoder_keep. A layer is an int, or a float in (0, 1), a fraction of the model's
        layers.
    budget: "image", each has its own, and if the model cuts it into crops they share it; "crop", each crop has its own;
        "prompt", all images share what they would have had together, such as the frames of a video: in the vision stage
        by what each shows that none before it does, in the decoder stage by the question's attention. None gets less
        than a quarter of an equal share.
    positions: "original" keeps the RoPE positions of the full image; "renumbered" closes the gaps after the vision
        stage, which costs accuracy (arXiv 2506.21873) and is here to be measured.
    seed: for scorers that draw lots.

    The defaults are the best that was measured (ACCURACY.md); PRESETS["star"] is the paper's method.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    vision_keep: Keep = 1.0
    decoder_keep: Keep = 1.0
    decoder_layer: int | None = None
    vision_scorer: str = "attention"
    decoder_scorer: str = "text"
    representatives: str = "cluster"
    vision_share: float = 1.0
    decoder_share: float = 0.5
    windows: tuple[tuple[int | float, Keep], ...] = ()
    budget: Literal["image", "crop", "prompt"] = "image"
    positions: Literal["original", "renumbered"] = "original"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vision_share", "decoder_share"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= share <= 1:
                raise ConfigError(
                    f"{name}={share!r} is no share in 0..1", "0 chooses all by score, 0.5 half of them, 1 none"
                )
            object.__setattr__(self, name, float(share))
        for name in ("vision_keep", "decoder_keep"):
            object.__setattr__(self, name, _check_keep(name, getattr(self, name)))
        _check_order("vision_keep", self.vision_keep, "decoder_keep", self.decoder_keep)
        if self.decoder_layer is not None and not (_is_int(self.decoder_layer) and self.decoder_layer >= 1):
            raise ConfigError(
                f"decoder_layer={self.decoder_layer!r} is no layer", "use 1 to layers - 1, or None to have it chosen"
            )
        for name, names in (
            ("vision_scorer", VISION_SCORERS),
            ("decoder_scorer", DECODER_SCORERS),
            ("representatives", REPRESENTATIVES),
            ("budget", ("image", "crop", "prompt")),
            ("positions", ("original", "renumbered")),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in tuple(names):
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown", f"use one of {', '.join(names)}")
        if not _is_int(self.seed) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} is no seed", "use 0 or a positive whole number")
        for name in ("decoder_layer", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "windows", self._check_windows())

    def _check_windows(self) -> tuple[tuple[int | float, Keep], ...]:
        if not isinstance(self.windows, (tuple, list)) or not all(
            isinstance(w, (tuple, list)) and len(w) == 2 for w in self.windows
        ):
            raise ConfigError(
                f"windows={self.windows!r} is no list of (layer, keep) pairs", "for example ((8, 0.5), (16, 0.25))"
            )
        if self.windows and (self.decoder_layer is not None or self.decoder_keep != 1.0):
            raise ConfigError("windows stand in place of decoder_layer and decoder_keep", "give one or the other")
        if len(self.windows) > MAX_WINDOWS:
            raise ConfigError(f"{len(self.windows)} windows are more than {MAX_WINDOWS}", "use fewer windows")
        last_name, last_keep = "vision_keep", self.vision_keep
        windows = []
        for layer, keep in self.windows:
            if not (_is_int(layer) and layer >= 1 or isinstance(layer, float) and 0 < layer < 1):
                raise ConfigError(
                    f"windows: {layer!r} is no layer", "use 1 to layers - 1, or a fraction of the layers in (0, 1)"
                )
            name = f"the window at {layer}"
            keep = _check_keep(name, keep)
            _check_order(last_name, last_keep, name, keep)
            last_name, last_keep = name, keep
            windows.append((int(layer) if _is_int(layer) else layer, keep))
        return tuple(windows)

    def to_dict(self) -> dict[str, object]:
        """The fields as plain JSON values, which PruneConfig(**values) takes again."""
        return asdict(self) | {"windows": [list(window) for window in self.windows]}

    @property
    def prunes_in_decoder(self) -> bool:
        """Whether there is a decoder stage. An explicit layer asks for one even when everything is kept."""
        return (
            self.decoder_keep != 1.0
            or isinstance(self.decoder_keep, int)
            or self.decoder_layer is not None
            or bool(self.windows)
        )

    @property
    def prunes_in_vision(self) -> bool:
        return self.vision_keep != 1.0 or isinstance(self.vision_keep, int)

    @property
    def encoder_attention(self) -> str | None:
        """Which attention the vision stage reads: "received", "cls", or None where nothing is chosen by it."""
        return VISION_SCORERS[self.vision_scorer].reads if self.prunes_in_vision and self.chooses_by_score else None

    @property
    def chooses_by_score(self) -> bool:
        """Whether any token of the vision stage's choice is chosen by its score."""
        return self.representatives == "none" or self.vision_share < 1

    def decoder_windows(self, n_layers: int) -> list[tuple[int, Keep]]:
        """(layer K, keep) of each decoder stage for a decoder of n_layers.

        Raises:
            ConfigError: layers outside 1..n_layers - 1, or two windows at one layer.
        """
        if not self.windows:
            return [(choose_layer(self.decoder_layer, n_layers), self.decoder_keep)]
        layers = [
            choose_layer(layer if _is_int(layer) else max(1, round(layer * n_layers)), n_layers)
            for layer, _ in self.windows
        ]
        if any(after <= before for before, after in zip(layers, layers[1:])):
            raise ConfigError(
                f"windows are at layers {layers} of {n_layers}", "use ascending layers, and no more windows than fit"
            )
        return [(layer, keep) for layer, (_, keep) in zip(layers, self.windows)]


_PLAIN = {"representatives": "none", "vision_share": 0.0, "decoder_share": 0.0}
PRESETS: dict[str, PruneConfig | None] = {
    "off": None,
    "quality": PruneConfig(vision_keep=0.75, decoder_keep=0.375),
    "balanced": PruneConfig(vision_keep=0.375, decoder_keep=0.1875),
    "fast": PruneConfig(vision_keep=0.15, decoder_keep=0.075),
    # Published methods, at the budgets of their papers; other budgets through override
    "star": PruneConfig(vision_keep=0.5, decoder_keep=0.25, **_PLAIN),
    "fastv": PruneConfig(decoder_keep=0.5, decoder_layer=2, decoder_scorer="last", **_PLAIN),
    "visionzip": PruneConfig(
        vision_keep=1 / 9, vision_scorer="cls", representatives="contextual", vision_share=10 / 64
    ),
    "divprune": PruneConfig(vision_keep=0.098, vision_scorer="maxmin", **_PLAIN),
    "pyramiddrop": PruneConfig(windows=((0.25, 0.5), (0.5, 0.25), (0.75, 0.125)), decoder_scorer="last", **_PLAIN),
}
DEFAULT_PRESET = "balanced"


def resolve_prune(prune: PruneConfig | str | None) -> PruneConfig | None:
    """The config behind a preset's name or in a file of `star-edge tune` (a path that ends in .json); None and "off"
    mean no pruning.

    Raises:
        ConfigError: an unknown name, a file that cannot be read or holds no config, or something that is no config.
    """
    if prune is None or isinstance(prune, PruneConfig):
        return prune
    if isinstance(prune, str):
        if prune in PRESETS:
            return PRESETS[prune]
        if prune.endswith(".json"):
            return load_config(prune)
        raise ConfigError(
            f"there is no preset {prune!r}",
            f"use one of {', '.join(PRESETS)}, a .json file of star-edge tune, or a PruneConfig",
        )
    raise ConfigError(
        f"prune={prune!r} is a {type(prune).__name__}", "use a PruneConfig, the name of a preset, or None"
    )


def load_config(path: str) -> PruneConfig | None:
    """The config under "config" in a JSON file, as `star-edge tune` writes it: an object of PruneConfig's fields, or
    null for none.

    Raises:
        ConfigError: names the file and what is wrong.
    """
    remedy = 'use a file that star-edge tune wrote, or {"config": {"vision_keep": 0.5}}'
    try:
        data = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", "check the path of the config") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error})", remedy) from error
    values = data.get("config", {}) if isinstance(data, dict) else {}
    if values is None:
        return None
    unknown = sorted(set(values) - {f.name for f in fields(PruneConfig)}) if isinstance(values, dict) else ["config"]
    if unknown or not values:
        raise ConfigError(f"{path} has {'unknown fields: ' + ', '.join(unknown) if unknown else 'no config'}", remedy)
    return PruneConfig(**values)


def override(config: PruneConfig | None, **changes: object) -> PruneConfig | None:
    """The config with the given fields replaced where they are not None; a config is made when there was none.

    A stage of the config that contradicts the changes is left out, since whoever gave those need not know it: a decoder
    stage that would keep more than the vision stage leaves, a vision stage that leaves less than the decoder stage is
    to keep, and windows where decoder_keep is given.

    Raises:
        ConfigError: the changes contradict each other, or are no values of their fields.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return config
    config = config or PruneConfig()
    PruneConfig(**changes)  # of what is wrong with them nothing is left out
    if "decoder_keep" in changes and config.windows:
        config = replace(config, windows=())
    exceeds = lambda then, first: type(then) is type(first) and then > first and then != 1.0
    vision, decoder = changes.get("vision_keep", config.vision_keep), changes.get("decoder_keep", config.decoder_keep)
    if "decoder_keep" not in changes:
        if exceeds(decoder, vision):
            changes = {"decoder_layer": None, **changes, "decoder_keep": 1.0}
        changes |= {"windows": tuple(w for w in config.windows if not exceeds(w[1], vision))} if config.windows else {}
    elif "vision_keep" not in changes and exceeds(decoder, vision):
        changes["vision_keep"] = 1.0
    if config.windows and "decoder_layer" in changes:
        raise ConfigError(
            f"decoder_layer={changes['decoder_layer']} is for one decoder stage, and there are {len(config.windows)} (windows)",
            "give decoder_keep too, to have one in their place",
        )
    return replace(config, **changes)


def one_token_notes(config: PruneConfig | None) -> list[str]:
    """A note for each stage that keeps a count of 1: JSON of other languages, and people, write 1 for 1.0."""
    names = ("vision_keep", "decoder_keep") if config is not None else ()
    keeps = [(name, getattr(config, name)) for name in names]
    return [
        f"{name}=1 keeps one token of each image (1.0 keeps all)" for name, keep in keeps if _is_int(keep) and keep == 1
    ]


def keep_count(name: str, keep: Keep, n_tokens: int, n_special: int = 0) -> int:
    """Number of tokens that `keep` leaves of an image that had n_tokens: at least one, halves rounded up.

    n_special: how many of them stay in any case. They are in the result, and `keep` is of the others.

    Raises:
        ConfigError: a count of more than n_tokens.
    """
    n = n_tokens - n_special
    if isinstance(keep, float):
        return n_special + min(n, max(1, math.floor(keep * n + 0.5)))
    if keep > n_tokens:
        raise ConfigError(
            f"{name}={keep} is over the image's {n_tokens} tokens", f"use a count of 1 to {n}, or a fraction"
        )
    return n_special + min(n, keep)


def choose_layer(decoder_layer: int | None, n_layers: int) -> int:
    """Layer K for a decoder of n_layers: the one asked for, otherwise a third of the way in.

    From 2 of 6 on, K made no difference to the reference model at equal average tokens, and 1 was too early to rank by.
    A third is past the layers that are known to be unreliable in larger models, and saves two thirds of the decoder
    (ACCURACY.md, "Layer K").

    Raises:
        ConfigError: not within 1..n_layers - 1.
    """
    if n_layers < 2:
        raise ConfigError(f"a decoder of {n_layers} layer has no place for a decoder stage", "use decoder_keep=1.0")
    if decoder_layer is None:
        return max(1, min(n_layers - 1, round(n_layers / 3)))
    if decoder_layer > n_layers - 1:
        raise ConfigError(
            f"decoder_layer={decoder_layer} is outside 1..{n_layers - 1}", f"the model has {n_layers} layers"
        )
    return decoder_layer
