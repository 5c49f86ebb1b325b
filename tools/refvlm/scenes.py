"""Seeded random scenes: a few coloured shapes and digits, and perhaps a number plate, on a textured background.

The splits share nothing random: each has its own backgrounds, sprites and picture seeds. Picture i of a split depends
on (split, seed, i) alone, not on how many pictures are made or in which order, so a training run can go on at any step.

A scene knows pixels and objects; what is asked about it is in questions.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sprites import SpriteBank, draw_background
from vocabulary import COLOR_NAMES, COLORS, DIGITS, PLATE, SHAPES

KINDS = SHAPES + DIGITS + [PLATE]
SPLITS = {"train": 1, "dev": 2, "test": 3, "whitening": 4}
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
_GAP = 3  # pixels between objects, at least
_PLACEMENT_TRIES = 40
_LABEL_SHARE = 0.12  # of an object's area: a patch with more of it carries the object's label


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like. Ranges are inclusive."""

    image_size: int = 168
    patch_size: int = 14
    background_size: int = 240
    jitter: int = 3  # pixels between an object's centre and the patch corner that it is placed on
    n_shapes: tuple[int, int] = (2, 4)
    n_digits: tuple[int, int] = (1, 3)
    plate_numbers: int = 1  # two-digit numbers on one plate
    plate_share: float = 0.55  # of pictures
    repeat_share: float = 0.6  # of pictures: some shape stands there at least twice

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def plate_digits(self) -> int:
        return 2 * self.plate_numbers


SMALL_SCENES = SceneConfig()
LARGE_SCENES = SceneConfig(
    image_size=336, background_size=480, jitter=7, n_shapes=(4, 8), n_digits=(2, 5), plate_numbers=2
)


@dataclass(frozen=True)
class SceneObject:
    """One thing in a picture. Shapes and digits have a colour, plates have digits."""

    kind: str
    box: tuple[int, int, int, int]  # x, y, width, height
    color: str | None = None
    digits: tuple[int, ...] | None = None

    @property
    def centre(self) -> tuple[float, float]:
        x, y, width, height = self.box
        return x + width / 2, y + height / 2

    def as_dict(self) -> dict:
        cx, cy = self.centre
        own = {"num": list(self.digits)} if self.digits else {"color": self.color}
        return {"kind": self.kind, **own, "cx": cx, "cy": cy, "box": list(self.box)}


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it.

    pixels: uint8 (size, size, 3). labels: int64 (patches, 2 + plate digits): kind + 1 or 0 for background, colour or
    -1, plate digits or -1.
    """

    pixels: np.ndarray
    objects: list[SceneObject]
    labels: np.ndarray


class SceneGenerator:
    """Makes the scenes of one split. Building one draws all sprites and backgrounds, which takes a second or two."""

    def __init__(
        self,
        split: str,
        seed: int = 0,
        config: SceneConfig = SMALL_SCENES,
        n_backgrounds: int = 400,
        n_variants: int = 42,
    ):
        self.config = config
        self._entropy = (SPLITS[split], seed)
        self.sprites = SpriteBank(self.rng("sprites"), n_variants)
        background_rng = self.rng("backgrounds")
        self.backgrounds = [draw_background(background_rng, config.background_size) for _ in range(n_backgrounds)]

    def rng(self, purpose: str, index: int = 0) -> np.random.Generator:
        """A generator that depends on split, seed, purpose and index, and on nothing else."""
        return np.random.default_rng([*self._entropy, *purpose.encode(), index])

    def scene(self, rng: np.random.Generator) -> Scene:
        config = self.config
        image = self._background(rng)
        objects: list[SceneObject] = []
        canvas = _Labels(config)
        wanted = self._choose_objects(rng)
        for i in rng.permutation(len(wanted)):
            kind, color = wanted[i]
            if kind == PLATE:
                digits = tuple(int(d) for d in rng.integers(10, size=config.plate_digits))
                mask = self.sprites.plate(digits, rng)
            else:
                digits = None
                mask = self.sprites.object(kind, rng)
            place = self._free_place(rng, mask.shape, objects)
            if place is None:
                continue
            x, y = place
            height, width = mask.shape
            region = image[y : y + height, x : x + width]
            if kind == PLATE:
                _paint_plate(region, mask, rng)
                mask = np.ones_like(mask)  # all of a plate belongs to it, not only its text
            else:
                region *= 1 - mask[..., None]
                region += mask[..., None] * (_COLOR_VALUES[color] + rng.uniform(-18, 18, 3))
            item = SceneObject(kind, (x, y, width, height), None if kind == PLATE else COLOR_NAMES[color], digits)
            objects.append(item)
            canvas.add(item, mask)
        image += rng.normal(0, 3, (config.image_size, config.image_size, 1))
        return Scene(np.clip(image, 0, 255).astype(np.uint8), objects, canvas.labels())

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """A crop of a background, perhaps mirrored, with its own brightness and contrast; float32 (size, size, 3)."""
        size = self.config.image_size
        background = self.backgrounds[rng.integers(len(self.backgrounds))]
        y, x = rng.integers(0, self.config.background_size - size, 2)
        crop = background[y : y + size, x : x + size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.5:
            crop = crop[::-1]
        return np.clip(crop * np.float32(rng.uniform(0.85, 1.12)) + np.float32(rng.uniform(-12, 12)), 0, 255)

    def _choose_objects(self, rng: np.random.Generator) -> list[tuple[str, int]]:
        """(kind, colour index) of what to place. Digits differ in value and in colour: each identifies the other."""
        config = self.config
        n_shapes = int(rng.integers(config.n_shapes[0], config.n_shapes[1] + 1))
        n_digits = int(rng.integers(config.n_digits[0], config.n_digits[1] + 1))
        has_plate = rng.random() < config.plate_share

        def any_shape() -> str:
            return SHAPES[rng.integers(len(SHAPES))]

        def any_color() -> int:
            return int(rng.integers(len(COLOR_NAMES)))

        chosen = []
        if rng.random() < config.repeat_share and n_shapes >= 2:
            repeated = any_shape()
            chosen += [(repeated, any_color()) for _ in range(int(rng.integers(2, n_shapes + 1)))]
        chosen += [(any_shape(), any_color()) for _ in range(n_shapes - len(chosen))]
        colors, digits = rng.permutation(len(COLOR_NAMES)), rng.permutation(len(DIGITS))
        chosen += [(DIGITS[digits[i]], int(colors[i])) for i in range(n_digits)]
        if has_plate:
            chosen.append((PLATE, -1))
        return chosen

    def _free_place(
        self, rng: np.random.Generator, shape: tuple[int, int], placed: list[SceneObject]
    ) -> tuple[int, int] | None:
        """Top left corner (x, y) for a mask of this shape, or None when no try fits.

        Centres lie near patch corners: far fewer alignments of object and patch grid to learn for a model this small.
        """
        config = self.config
        height, width = shape

        def near_corner(extent: int) -> int:
            corner = config.patch_size * int(rng.integers(1, config.grid))
            return corner - extent // 2 + int(rng.integers(-config.jitter, config.jitter + 1))

        for _ in range(_PLACEMENT_TRIES):
            y, x = near_corner(height), near_corner(width)
            if not (0 <= x <= config.image_size - width and 0 <= y <= config.image_size - height):
                continue
            if not any(_too_close((x, y, width, height), other.box) for other in placed):
                return x, y
        return None


def _too_close(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    return ax < bx + bw + _GAP and bx < ax + aw + _GAP and ay < by + bh + _GAP and by < ay + ah + _GAP


def _paint_plate(region: np.ndarray, text: np.ndarray, rng: np.random.Generator) -> None:
    """Dark text and a dark frame on a light plate, in place. region: (height, width, 3), text: (height, width)."""
    region[:] = rng.uniform(225, 255)
    region *= 1 - text[..., None] * 0.93
    region[0] = region[-1] = region[:, 0] = region[:, -1] = 25


class _Labels:
    """What each patch shows: the object that covers most of it, if enough of that object is there."""

    def __init__(self, config: SceneConfig):
        self._config = config
        self._labels = np.full((config.grid, config.grid, 2 + config.plate_digits), -1, np.int64)
        self._labels[..., 0] = 0
        self._covered = np.zeros((config.grid, config.grid), np.float32)

    def add(self, item: SceneObject, mask: np.ndarray) -> None:
        """mask: (height, width) of the object's box, how much of each pixel is the object."""
        patch = self._config.patch_size
        x, y, width, height = item.box
        color = -1 if item.color is None else COLOR_NAMES.index(item.color)
        digits = item.digits or (-1,) * self._config.plate_digits
        enough = _LABEL_SHARE * mask.sum()
        for row in range(y // patch, (y + height - 1) // patch + 1):
            for column in range(x // patch, (x + width - 1) // patch + 1):
                top, left = row * patch - y, column * patch - x
                area = mask[max(0, top) : top + patch, max(0, left) : left + patch].sum()
                if area > max(enough, self._covered[row, column]):
                    self._covered[row, column] = area
                    self._labels[row, column] = (KINDS.index(item.kind) + 1, color, *digits)

    def labels(self) -> np.ndarray:
        return self._labels.reshape(-1, self._labels.shape[-1])
