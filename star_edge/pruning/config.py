"""What to prune: `PruneConfig`, and how a keep ratio becomes a number of tokens.

Knows numbers only: no image, no model. The number of a model's layers and of an image's tokens come in as arguments.
"""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, TypeGuard, TypeVar

from ..errors import ConfigError, quoted
from ..suggestions import use_one_of
from .representatives import REPRESENTATIVES
from .scorers import DECODER_SCORERS, VISION_SCORERS

Keep = float | int
Redundancy = Literal["off", "auto", "exact"] | float
_Class = TypeVar("_Class", bound=type)


MAX_WINDOWS = 6  # each parks the rows it drops in its own sequence (llamacpp.context.N_SEQUENCES)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # NumPy's are not int


def _check_keep(name: str, keep: object) -> Keep:
    """The keep ratio or count as Python's own float or int."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise ConfigError(
            f"{name}={quoted(keep)} is a {type(keep).__name__}", "use a fraction (0.25) or a count of tokens (144)"
        )
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise ConfigError(f"{name}={quoted(keep)} keeps nothing", "keep at least one token of each image")
        return int(keep)
    number: Any = keep  # numbers.Real has no order in typeshed
    if not 0.0 < number <= 1.0:  # NaN fails every comparison
        raise ConfigError(f"{name}={quoted(keep)} is not in (0, 1]", "1.0 keeps all; an int is a count of tokens")
    return float(keep)


def _check_redundancy(value: object) -> Redundancy:
    for name in ("off", "auto", "exact"):
        if isinstance(value, str) and value == name:
            return name
    number: Any = value
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= number < 1:
        return float(number) or "exact"
    raise ConfigError(
        f'redundancy={quoted(value)} is neither "off", "auto" nor "exact", nor a number in (0, 1)',
        "a number is the largest difference of pixels that count as alike: 0.03, for example",
    )


def _check_layer(name: str, layer: object) -> int | float:
    if _is_int(layer) and layer >= 1:
        return int(layer)
    if isinstance(layer, float) and 0 < layer < 1:
        return float(layer)
    raise ConfigError(
        f"{name} {quoted(layer)} is neither a whole number >= 1 nor a fraction in (0, 1)",
        "use 1 to layers - 1, or a fraction of the layers",
    )


def _check_tolerance(name: str, value: object) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # of an int
        number = math.inf
    if 0 < number < math.inf:
        return number
    raise ConfigError(
        f"{name}={quoted(value)} is neither None nor a number over 0",
        "use a share of the mean distance between tokens: 0.2, for example",
    )


def _check_order(first_name: str, first: Keep, then_name: str, then: Keep) -> None:
    if isinstance(first, int) and isinstance(then, int) and then > first:
        raise ConfigError(
            f"{then_name}={quoted(then)} is more than {first_name}={quoted(first)} leaves", f"lower {then_name}"
        )
    if isinstance(first, float) and isinstance(then, float) and first < then < 1.0:
        raise ConfigError(
            f"{then_name}={quoted(then)} is more than {first_name}={quoted(first)} leaves",
            f"both are fractions of the image's original tokens: lower {then_name}, or use 1.0 for no such stage",
        )


def _with_suggestions(kind: _Class) -> _Class:
    """Decorator of a dataclass: a field that it does not have is a ConfigError, which says what may have been meant."""
    plain = kind.__init__  # type: ignore[misc]
    names = [field.name for field in fields(kind)]

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            raise ConfigError(f"{kind.__name__} has no field {unknown[:60]!r}", use_one_of(unknown, names))
        plain(self, *args, **values)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


@_with_suggestions
@dataclass(frozen=True)
class PruneConfig:
    """How many image tokens to keep at each stage, and which.

    A keep value is a float in (0, 1], a fraction of the image's original tokens, or an int, a count for each image.
    1.0 keeps all tokens; 1 keeps one token. A picture that the model gets in crops counts as one image. Its crops share
    the tokens, and every crop keeps at least one. Special tokens (row ends, tile separators) always stay. They stand
    for no other token and count in neither a fraction nor a count.

    The defaults are the best that was measured (ACCURACY.md). PRESETS["star"] is the paper's method.

    Attributes:
        vision_keep: What stays after the vision encoder (stage 1).
        decoder_keep: What stays from decoder layer K on (stage 2).
        decoder_layer: K, 1 <= K <= layers - 1. Layers 0..K-1 see every token that the vision stage left. None: chosen
            for the model (`choose_layer`): two thirds of its layers, with look_ahead a third.
        vision_scorer: What the vision stage ranks tokens by, a name in scorers.VISION_SCORERS.
        decoder_scorer: What the decoder stages rank tokens by, a name in scorers.DECODER_SCORERS.
        representatives: What becomes of dropped tokens, a name in representatives.REPRESENTATIVES. "cluster" and "even"
            keep their weight in every softmax. "none" drops them for good, as the paper does.
        decoder_representatives: The same for the decoder stages alone, or None for `representatives`. "none" leaves the
            vision stage's masses to the tokens that stay.
        vision_share: Share of the vision stage's budget, 0..1, that represents dropped tokens. The rest is chosen by
            score.
        decoder_share: The same for the decoder stages.
        vision_tolerance: Lets the vision stage keep more than vision_keep, as many tokens as the picture needs: until
            each dropped token is within this distance of the token that represents it. The distance is 1 - cosine of
            projected embeddings, over the mean of that between two of the picture's tokens. A page of text then keeps
            its letters and merges its paper. vision_keep is the least that stays; the context may hold it down
            (a note in the report says so). For representatives="cluster" alone, and not where all images share one
            budget (budget="prompt"). None: vision_keep is what stays.
        look_ahead: The question looks ahead before a decoder stage chooses: a layer after K, or a float in (0, 1), a
            fraction of the model's layers. Image tokens stop at layer K. In each layer after it they have the keys and
            values of the state in which they stopped; the text after the last image goes on over these to the layer of
            look_ahead, and what it attends to in the last two fifths of the way there (`look_ahead_layers`) ranks. So
            K may be early, where layer K itself does not know yet what the question asks for. None: the attention at
            layer K ranks.
        windows: Several decoder stages (PyramidDrop, arXiv 2410.17247) in place of decoder_layer and decoder_keep:
            (layer, keep) pairs with ascending layers. A layer is an int, or a float in (0, 1), a fraction of the
            model's layers.
        seen_below: Tokens of the answer see a dropped token in the layers below the stage that dropped it. Its KV cells
            stay taken until the answer ends. False: it leaves the cache of all layers, and the cells are free for the
            answer.
        budget: "image": each image has its own budget, and its crops share it; the frames of a video share what they
            would have had together. "crop": each crop has its own. "prompt":
            all images share one, such as the frames of a video. The vision stage then divides it by what each image
            shows first, the decoder stage by the question's attention. No image gets less than a quarter of an equal
            share.
        positions: "original" keeps the RoPE positions of the full image. "renumbered" closes the gaps after the vision
            stage; it costs accuracy (arXiv 2506.21873) and exists to measure that.
        seed: Seed of scorers that draw at random, >= 0.
        redundancy: Image tokens that are left out before the encoder, because their pixels are like those of one that
            stays, at most two cells of the grid away. Of things of one colour only the inside may go; of the ground,
            which is what most flat tokens show, all. "off": none. "exact": equal pixels. A number in (0, 1): no colour
            of any pixel differs by more than this, 1 being black to white. For encoders of any picture size; the report
            says so of others. "auto": equal pixels where the encoder can, without a word where it cannot. The mass of
            the one that stays grows.
        encoder_keep: What stays within the encoder, from its layer M on.
        encoder_layer: M, 1 <= M <= layers of the encoder - 1. Layers 0..M-1 see the whole image. None: a quarter of the
            way in. The encoder stage chooses as the vision stage does (vision_scorer, vision_share, representatives),
            by hidden states and by the attention of a layer below M.
        encoder_tolerance: What vision_tolerance is to the vision stage, for the encoder stage: it keeps more than
            encoder_keep, until each token that leaves is within this distance of one that stays, at most two cells of
            the grid away. The distance is 1 - cosine of hidden states that enter layer M, over its mean. Where an
            encoder has no such stage, the report has no note on it.
        image_max_tokens: Most image tokens of a picture that enter the encoder: a share of those that it takes at its
            own size, or a count. A larger picture is made smaller before the model gets it, as little as that needs:
            what redundancy leaves out does not count, so a page with much plain paper stays larger. All other fields
            count what it takes then. Models that make one number of tokens of any picture are not affected.

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """

    vision_keep: Keep = 1.0
    decoder_keep: Keep = 1.0
    decoder_layer: int | None = None
    vision_scorer: str = "attention"
    decoder_scorer: str = "last"
    representatives: str = "cluster"
    decoder_representatives: str | None = None
    vision_share: float = 1.0
    decoder_share: float = 0.25
    vision_tolerance: float | None = None
    look_ahead: int | float | None = None
    windows: tuple[tuple[int | float, Keep], ...] = ()
    seen_below: bool = True
    budget: Literal["image", "crop", "prompt"] = "image"
    positions: Literal["original", "renumbered"] = "original"
    seed: int = 0
    redundancy: Redundancy = "off"
    encoder_keep: Keep = 1.0
    encoder_layer: int | None = None
    encoder_tolerance: float | None = None
    image_max_tokens: Keep = 1.0

    def __post_init__(self) -> None:
        for name in ("vision_share", "decoder_share"):
            share: Any = getattr(self, name)
            is_real = isinstance(share, numbers.Real) and not isinstance(share, bool)
            if not is_real or not 0 <= share <= 1:
                raise ConfigError(
                    f"{name}={quoted(share)} is not in 0..1", "0 chooses all by score, 0.5 half of them, 1 none"
                )
            object.__setattr__(self, name, float(share))
        for name in ("vision_tolerance", "encoder_tolerance"):
            object.__setattr__(self, name, _check_tolerance(name, getattr(self, name)))
        for name in ("encoder_keep", "vision_keep", "decoder_keep", "image_max_tokens"):
            object.__setattr__(self, name, _check_keep(name, getattr(self, name)))
        _check_order("vision_keep", self.vision_keep, "decoder_keep", self.decoder_keep)
        for name in () if self.encoder_adapts else ("vision_keep", "decoder_keep"):  # which then is the least alone
            _check_order("encoder_keep", self.encoder_keep, name, getattr(self, name))
        for name in ("decoder_layer", "encoder_layer"):
            layer = getattr(self, name)
            if layer is not None and not (_is_int(layer) and layer >= 1):
                raise ConfigError(
                    f"{name}={quoted(layer)} is not a layer >= 1", "use 1 to layers - 1, or None to have it chosen"
                )
        object.__setattr__(self, "redundancy", _check_redundancy(self.redundancy))
        if self.look_ahead is not None:
            object.__setattr__(self, "look_ahead", _check_layer("look_ahead", self.look_ahead))
        for name, names in (
            ("vision_scorer", VISION_SCORERS),
            ("decoder_scorer", DECODER_SCORERS),
            ("representatives", REPRESENTATIVES),
            ("decoder_representatives", (None, *REPRESENTATIVES)),
            ("budget", ("image", "crop", "prompt")),
            ("positions", ("original", "renumbered")),
        ):
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))) or value not in tuple(names):
                raise ConfigError(f"{name}={quoted(value)} is unknown", use_one_of(value, names))
        if not isinstance(self.seen_below, bool):
            raise ConfigError(f"seen_below={quoted(self.seen_below)} is neither True nor False", "use one of them")
        if not _is_int(self.seed) or self.seed < 0:
            raise ConfigError(f"seed={quoted(self.seed)} is not a whole number >= 0", "use 0, 1, 2, ...")
        for name in ("decoder_layer", "encoder_layer", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "windows", self._check_windows())

    def _check_windows(self) -> tuple[tuple[int | float, Keep], ...]:
        if not isinstance(self.windows, (tuple, list)) or not all(
            isinstance(w, (tuple, list)) and len(w) == 2 for w in self.windows
        ):
            raise ConfigError(
                f"windows={quoted(self.windows)} is not a list of (layer, keep) pairs",
                "write ((8, 0.5), (16, 0.25)), for example",
            )
        if self.windows and (self.decoder_layer is not None or self.decoder_keep != 1.0):
            raise ConfigError("windows replace decoder_layer and decoder_keep", "give one or the other")
        if len(self.windows) > MAX_WINDOWS:
            raise ConfigError(f"{len(self.windows)} windows are more than {MAX_WINDOWS}", "use fewer windows")
        last_name, last_keep = "vision_keep", self.vision_keep
        windows = []
        for layer, keep in self.windows:
            layer = _check_layer("windows: layer", layer)
            name = f"the window at {quoted(layer)}"
            keep = _check_keep(name, keep)
            _check_order(last_name, last_keep, name, keep)
            last_name, last_keep = name, keep
            windows.append((layer, keep))
        return tuple(windows)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values. PruneConfig(**values) makes the same config."""
        return asdict(self) | {"windows": [list(window) for window in self.windows]}

    @property
    def prunes_in_decoder(self) -> bool:
        """Whether there is a decoder stage. An explicit layer asks for one even if it keeps everything."""
        return (
            self.decoder_keep != 1.0
            or isinstance(self.decoder_keep, int)
            or self.decoder_layer is not None
            or bool(self.windows)
        )

    @property
    def prunes_in_encoder(self) -> bool:
        """Whether there is an encoder stage. An explicit layer asks for one even if it keeps everything."""
        return self.encoder_keep != 1.0 or isinstance(self.encoder_keep, int) or self.encoder_layer is not None

    @property
    def prunes_in_vision(self) -> bool:
        """Whether the vision stage may drop tokens."""
        return self.vision_keep != 1.0 or isinstance(self.vision_keep, int)

    @property
    def adapts_to_picture(self) -> bool:
        """Whether the vision stage keeps as many tokens as a picture needs, vision_keep at least."""
        return self.vision_tolerance is not None and self._why_not_adapt() is None

    @property
    def encoder_adapts(self) -> bool:
        """Whether the encoder stage keeps as many tokens as a picture needs, encoder_keep at least."""
        return self.encoder_tolerance is not None and self._why_encoder_does_not() is None

    def _why_not_adapt(self) -> str | None:
        return self._why_fixed() if self.prunes_in_vision else "vision_keep keeps all tokens"

    def _why_encoder_does_not(self) -> str | None:
        if self.encoder_keep == 1.0 and not isinstance(self.encoder_keep, int):
            return "encoder_keep keeps all tokens"
        return self._why_fixed()

    def _why_fixed(self) -> str | None:
        if self.representatives != "cluster":
            return f'representatives="{self.representatives}"'
        return 'budget="prompt"' if self.budget == "prompt" else None

    @property
    def limits_images(self) -> bool:
        """Whether larger pictures are made smaller."""
        return self.image_max_tokens != 1.0 or isinstance(self.image_max_tokens, int)

    @property
    def encoder_attention(self) -> str | None:
        """Attention that the vision stage reads: "received", "cls", or None if no token is chosen by it."""
        return VISION_SCORERS[self.vision_scorer].reads if self.prunes_in_vision and self.chooses_by_score else None

    @property
    def has_masses(self) -> bool:
        """Whether a kept token may stand for others."""
        return self.representatives in ("cluster", "even")

    @property
    def chooses_by_score(self) -> bool:
        """Whether the vision stage chooses any token by its score."""
        return self.representatives == "none" or self.vision_share < 1

    def decoder_windows(self, n_layers: int) -> list[tuple[int, Keep]]:
        """The decoder stages for a decoder of n_layers.

        Args:
            n_layers: Layers of the decoder.

        Returns:
            (layer K, keep) of each stage, with ascending layers.

        Raises:
            ConfigError: A layer is outside 1..n_layers - 1, or two windows are at one layer.
        """
        if not self.windows:
            default = _LAYER if self.look_ahead is None else _LAYER_LOOKING_AHEAD
            return [(choose_layer(self.decoder_layer, n_layers, default), self.decoder_keep)]
        layers = [
            choose_layer(layer if _is_int(layer) else max(1, round(layer * n_layers)), n_layers)
            for layer, _ in self.windows
        ]
        if any(after <= before for before, after in pairwise(layers)):
            raise ConfigError(
                f"windows are at layers {layers} of {n_layers}", "use ascending layers, and fewer windows if they meet"
            )
        return [(layer, keep) for layer, (_, keep) in zip(layers, self.windows)]


def look_ahead_layers(look_ahead: int | float, n_layers: int) -> tuple[int, int]:
    """The first and the last layer whose attention ranks, where the question looks ahead: the last two fifths of
    the way.

    Which layers find what is asked for differs from model to model. A mean over some of them does without knowing: the
    few heads that find it give it much more attention than others give anything (ACCURACY.md, "Looking ahead").

    Args:
        look_ahead: As in PruneConfig.
        n_layers: Layers of the decoder.

    Raises:
        ConfigError: The layer is outside 2..n_layers - 1.
    """
    last = look_ahead if isinstance(look_ahead, int) else min(n_layers - 1, max(2, round(look_ahead * n_layers)))
    if not 2 <= last <= n_layers - 1:
        raise ConfigError(
            f"look_ahead={quoted(look_ahead)} is outside 2..{n_layers - 1}", f"the model has {n_layers} layers"
        )
    return round(3 * last / 5), last


def one_token_notes(config: PruneConfig | None) -> list[str]:
    """A note for each stage that keeps a count of 1: people, and JSON writers of other languages, write 1 for 1.0."""
    names = ("encoder_keep", "vision_keep", "decoder_keep") if config is not None else ()
    ones = [name for name in names if _is_int(keep := getattr(config, name)) and keep == 1]
    fewest = {"encoder_keep": ", or as few as the encoder can run on"}
    return [f"{name}=1 keeps one token of each image{fewest.get(name, '')} (1.0 keeps all)" for name in ones]


def tolerance_notes(config: PruneConfig | None) -> list[str]:
    """A note for each tolerance that changes nothing."""
    if config is None:
        return []
    tolerances = (
        ("vision_tolerance", config.vision_tolerance, config._why_not_adapt()),
        ("encoder_tolerance", config.encoder_tolerance, config._why_encoder_does_not()),
    )
    return [f"{name}={value:g} changes nothing: {why}" for name, value, why in tolerances if value is not None and why]


def keep_count(name: str, keep: Keep, n_tokens: int, n_special: int = 0) -> int:
    """Number of tokens that `keep` leaves of an image. Halves are rounded up.

    Args:
        name: Name of the field, for the message.
        keep: Keep ratio or count, of the ordinary tokens.
        n_tokens: Original tokens of the image, special ones included.
        n_special: Special tokens among them, which always stay.

    Returns:
        Tokens that stay, special ones included; at least one ordinary token is among them.

    Raises:
        ConfigError: The count is over n_tokens.
    """
    n = n_tokens - n_special
    if isinstance(keep, float):
        return n_special + min(n, max(1, math.floor(keep * n + 0.5)))
    if keep > n_tokens:
        raise ConfigError(
            f"{name}={quoted(keep)} is over the image's {n_tokens} tokens", f"use 1 to {n}, or a fraction"
        )
    return n_special + min(n, keep)


_LAYER, _LAYER_LOOKING_AHEAD = 2 / 3, 1 / 3


def choose_layer(decoder_layer: int | None, n_layers: int, default: float = _LAYER) -> int:
    """Layer K of a decoder stage: the one asked for, otherwise two thirds of the way in.

    A token that leaves before the layers that read it is lost. Those are over at two thirds in three of four models at
    hand and at four fifths in the fourth; a third was too early in three of them (ACCURACY.md, "Layer K").

    Args:
        decoder_layer: The layer asked for, or None.
        n_layers: Layers of the decoder.
        default: The share of them that None stands for.

    Returns:
        K, within 1..n_layers - 1.

    Raises:
        ConfigError: The layer is outside 1..n_layers - 1, or the decoder has a single layer.
    """
    if n_layers < 2:
        raise ConfigError(f"a decoder stage needs 2 layers, and the decoder has {n_layers}", "use decoder_keep=1.0")
    if decoder_layer is None:
        return max(1, min(n_layers - 1, round(default * n_layers)))
    if decoder_layer > n_layers - 1:
        raise ConfigError(
            f"decoder_layer={quoted(decoder_layer)} is outside 1..{n_layers - 1}", f"the model has {n_layers} layers"
        )
    return decoder_layer
