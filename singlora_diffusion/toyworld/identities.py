"""What can be in a toyworld image: names, colours, and the two seeded records, `Identity` and `Scene`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RGB = tuple[int, int, int]

CLASSES: tuple[str, ...] = (
    "backpack", "bowl", "can", "candle", "cat", "clock", "dog", "sneaker", "teapot", "vase", "boot", "toy",
)  # fmt: skip
COLOURS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "white",
)  # fmt: skip
PATTERNS: tuple[str, ...] = ("plain", "stripes", "dots", "checks", "star", "heart")
BACKGROUNDS: tuple[str, ...] = (
    "beach", "snow", "jungle", "city", "wooden floor", "mountain",
    "blue house", "cobblestones", "autumn leaves", "water", "grass", "pink fabric",
)  # fmt: skip

PALETTE: dict[str, RGB] = {
    "red": (216, 38, 44),
    "orange": (247, 134, 28),
    "yellow": (252, 216, 56),
    "green": (52, 158, 62),
    "teal": (58, 200, 190),
    "blue": (40, 82, 208),
    "purple": (128, 56, 176),
    "pink": (250, 150, 190),
    "brown": (118, 72, 42),
    "white": (246, 244, 238),
    "black": (44, 44, 54),
}
"""The main colours, and black, which only details and patterns take."""

ACCESSORIES = 3
FACES = 3
CONTRAST = 140.0
"""Least distance in RGB between the colours of one object that touch."""


@dataclass(frozen=True)
class Identity:
    """One subject: everything about an object that stays the same from image to image.

    Captions may name `cls`, `colour` and `pattern`; the rest must be seen to be known.
    `proportions` and `phase` lie in [-1, 1] and [0, 1); `shift` is added to the main colour's RGB.
    """

    cls: str
    colour: str
    pattern: str
    pattern_colour: str
    detail_colour: str
    accessory: int
    face: int
    proportions: tuple[float, float]
    phase: float
    shift: RGB

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What makes two identities one subject to the split; the pattern colour of a plain object is unseen."""
        pattern_colour = "" if self.pattern == "plain" else self.pattern_colour
        return self.cls, self.colour, self.pattern, pattern_colour, self.detail_colour, self.accessory


@dataclass(frozen=True)
class Scene:
    """One place and one way of looking at it.

    `dx`, `dy`: offset of the object in fractions of the image; `zoom`: factor near 1; `angle`: radians;
    `light`: where the light comes from, -1 left to 1 right; `tint`: factors of R, G, B; `layout`: seed of the place.
    """

    background: str
    dx: float
    dy: float
    zoom: float
    angle: float
    flip: bool
    light: float
    tint: tuple[float, float, float]
    layout: int


def contrast(one: str, other: str) -> float:
    """Euclidean distance of two palette colours in RGB (0 to 441)."""
    return math.dist(PALETTE[one], PALETTE[other])


def identity(seed: int, cls: str | None = None) -> Identity:
    """The identity of a seed; `cls` fixes the class and leaves the other draws as they are. Any seed >= 0."""
    return draw_identity(np.random.default_rng((11, seed)), cls)


def draw_identity(rng: np.random.Generator, cls: str | None = None) -> Identity:
    """Draw an identity; pattern and detail colours stand out from the main colour."""
    drawn = CLASSES[rng.integers(len(CLASSES))]
    colour = COLOURS[rng.integers(len(COLOURS))]
    visible = [name for name in PALETTE if contrast(name, colour) >= CONTRAST]
    pattern_colour = visible[rng.integers(len(visible))]
    detail_colour = visible[rng.integers(len(visible))]
    shift = rng.integers(-7, 8, size=3)
    proportions = rng.uniform(-1, 1, size=2)
    return Identity(
        cls=drawn if cls is None else cls,
        colour=colour,
        pattern=PATTERNS[rng.integers(len(PATTERNS))],
        pattern_colour=pattern_colour,
        detail_colour=detail_colour,
        accessory=int(rng.integers(ACCESSORIES)),
        face=int(rng.integers(FACES)),
        proportions=(float(proportions[0]), float(proportions[1])),
        phase=float(rng.uniform()),
        shift=(int(shift[0]), int(shift[1]), int(shift[2])),
    )


def scene(seed: int, background: str | None = None) -> Scene:
    """The scene of a seed; `background` fixes the place and leaves the other draws as they are. Any seed >= 0."""
    rng = np.random.default_rng((13, seed))
    drawn = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    shift = np.clip(rng.normal(size=3), -2, 2)
    tint = rng.uniform(0.93, 1.04) * rng.uniform(0.97, 1.03, size=3)
    return Scene(
        background=drawn if background is None else background,
        dx=float(shift[0]) * 2.0 / 64,
        dy=float(shift[1]) * 1.4 / 64,
        zoom=float(rng.uniform(0.92, 1.08)),
        angle=float(shift[2]) * math.radians(4),
        flip=bool(rng.integers(2)),
        light=float(rng.uniform(-1, 1)),
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
        layout=int(rng.integers(1 << 31)),
    )
