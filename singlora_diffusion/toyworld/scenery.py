"""The twelve places of toyworld, drawn soft: big shapes, blurred as behind a shallow depth of field."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .identities import RGB

Random = np.random.Generator


def _gradient(size: int, stops: Sequence[tuple[float, RGB]]) -> Image.Image:
    y = (np.arange(size) + 0.5) / size
    at = [stop for stop, _ in stops]
    rows = np.stack([np.interp(y, at, [colour[c] for _, colour in stops]) for c in range(3)], axis=1)
    return Image.fromarray(np.repeat(rows.astype(np.uint8)[:, None], size, axis=1))


class _Brush:
    """Filled shapes in fractions of the image."""

    def __init__(self, image: Image.Image) -> None:
        self.size = image.width
        self.draw = ImageDraw.Draw(image)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        s = self.size
        self.draw.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=colour)

    def poly(self, points: Sequence[tuple[float, float]], colour: RGB) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=colour)


def _mix(one: RGB, other: RGB, t: float) -> RGB:
    r, g, b = (round(p + (q - p) * t) for p, q in zip(one, other, strict=True))
    return r, g, b


def _beach(size: int, rng: Random) -> Image.Image:
    sea = rng.uniform(0.34, 0.42)
    sand = sea + rng.uniform(0.17, 0.22)
    sky: list[tuple[float, RGB]] = [(0, (112, 196, 250)), (sea, (206, 238, 252)), (sea + 0.01, (24, 138, 200))]
    image = _gradient(size, [*sky, (sand, (72, 206, 212)), (sand + 0.02, (250, 226, 164)), (1, (240, 200, 124))])
    b = _Brush(image)
    b.oval(rng.uniform(0.2, 0.8), rng.uniform(0.06, 0.14), 0.09, 0.09, (255, 246, 190))
    x, lean = rng.uniform(0.04, 0.12), rng.uniform(0.0, 0.06)
    b.poly(
        [(x - 0.03, sand + 0.08), (x + lean, 0.16), (x + lean + 0.05, 0.16), (x + 0.05, sand + 0.08)], (150, 100, 60)
    )
    for dx, dy in ((-0.13, 0.04), (0.13, 0.05), (-0.07, -0.06), (0.08, -0.06)):
        b.oval(x + lean + 0.02 + dx, 0.15 + dy, 0.12, 0.045, (50, 150, 80))
    return image


def _snow(size: int, rng: Random) -> Image.Image:
    ground = rng.uniform(0.44, 0.54)
    image = _gradient(size, [(0, (150, 184, 222)), (ground, (204, 220, 238)), (1, (204, 220, 238))])
    b = _Brush(image)
    for x in (rng.uniform(0.02, 0.12), rng.uniform(0.2, 0.3), rng.uniform(0.74, 0.84), rng.uniform(0.9, 1.0)):
        top = ground - rng.uniform(0.26, 0.4)
        b.poly([(x, top), (x + 0.11, ground + 0.05), (x - 0.11, ground + 0.05)], (64, 116, 116))
        b.poly([(x, top - 0.02), (x + 0.05, top + 0.13), (x - 0.05, top + 0.13)], (236, 244, 252))
    b.oval(rng.uniform(0.1, 0.4), ground + 0.5, 0.8, 0.5, (236, 243, 252))
    b.oval(rng.uniform(0.6, 1.0), ground + 0.56, 0.8, 0.52, (222, 233, 247))
    b.box(0, 0.92, 1, 1, (228, 238, 250))
    for _ in range(7):
        b.oval(rng.uniform(0, 1), rng.uniform(0, 0.5), 0.026, 0.026, (255, 255, 255))
    return image


def _jungle(size: int, rng: Random) -> Image.Image:
    image = _gradient(size, [(0, (30, 104, 48)), (0.45, (20, 76, 40)), (0.8, (30, 62, 32)), (1, (56, 66, 32))])
    b = _Brush(image)
    greens: tuple[RGB, ...] = ((44, 140, 60), (88, 172, 62), (14, 84, 46), (34, 120, 70))
    for k in range(14):
        edge = k / 14 * 2 * np.pi + rng.uniform(-0.2, 0.2)
        x, y = 0.5 + 0.46 * np.cos(edge), 0.46 + 0.44 * np.sin(edge)
        turn, long, wide = rng.uniform(0, np.pi), rng.uniform(0.14, 0.2), rng.uniform(0.05, 0.07)
        t = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        u, v = long * np.cos(t), wide * np.sin(t)
        leaf = [
            (x + p * np.cos(turn) - q * np.sin(turn), y + p * np.sin(turn) + q * np.cos(turn))
            for p, q in zip(u, v, strict=True)
        ]
        b.poly(leaf, greens[k % 4])
    return image


def _city(size: int, rng: Random) -> Image.Image:
    street = rng.uniform(0.66, 0.72)
    image = _gradient(size, [(0, (176, 172, 206)), (0.5, (246, 206, 188)), (1, (246, 206, 188))])
    b = _Brush(image)
    x, k = -0.04, int(rng.integers(3))
    walls: tuple[RGB, ...] = ((92, 98, 124), (124, 126, 150), (76, 80, 106))
    while x < 1:
        wide, top = rng.uniform(0.19, 0.25), rng.uniform(0.02, 0.26)
        b.box(x, top, x + wide - 0.02, street, walls[k % 3])
        for row in np.arange(top + 0.06, street - 0.1, 0.13):
            for column in (0.05, 0.125):
                b.box(x + column, row, x + column + 0.035, row + 0.055, (250, 222, 140))
        x, k = x + wide, k + 1
    b.box(0, street, 1, 1, (104, 104, 112))
    b.box(0, street, 1, street + 0.06, (170, 168, 170))
    b.box(0, 0.93, 1, 0.96, (240, 206, 90))
    return image


def _wooden_floor(size: int, rng: Random) -> Image.Image:
    wall = rng.uniform(0.26, 0.34)
    image = _gradient(size, [(0, (244, 232, 206)), (wall, (228, 212, 182)), (1, (228, 212, 182))])
    b = _Brush(image)
    b.box(0, wall - 0.05, 1, wall, (250, 246, 236))
    tones: tuple[RGB, ...] = ((204, 140, 80), (158, 96, 50), (218, 158, 98), (178, 114, 62))
    shift, first = rng.uniform(-0.5, 0.5), int(rng.integers(4))
    for k in range(-5, 6):
        far, near = 0.5 + (k + shift) * 0.16, 0.5 + (k + shift) * 0.34
        b.poly([(far, wall), (far + 0.16, wall), (near + 0.34, 1.02), (near, 1.02)], tones[(k + first) % 4])
    return image


def _mountain(size: int, rng: Random) -> Image.Image:
    field = rng.uniform(0.6, 0.68)
    image = _gradient(size, [(0, (100, 170, 240)), (field, (214, 234, 250)), (1, (214, 234, 250))])
    b = _Brush(image)
    for x, top, wide, rock in (
        (rng.uniform(0.78, 0.92), rng.uniform(0.12, 0.2), 0.42, (140, 146, 176)),
        (rng.uniform(0.12, 0.3), rng.uniform(0.02, 0.08), 0.5, (108, 114, 148)),
    ):
        b.poly([(x - wide, field + 0.04), (x, top), (x + wide, field + 0.04)], rock)
        cap = 0.3 * (field - top)
        lean = wide * 0.3
        crest = [(x - lean, top + cap), (x, top), (x + lean, top + cap), (x + lean * 0.3, top + cap * 0.8)]
        b.poly([*crest, (x - lean * 0.2, top + cap * 1.25)], (250, 252, 255))
    b.oval(0.2, field + 0.42, 0.8, 0.45, (128, 178, 92))
    b.oval(0.85, field + 0.44, 0.8, 0.45, (150, 192, 104))
    b.box(0, 0.9, 1, 1, (138, 184, 98))
    return image


def _blue_house(size: int, rng: Random) -> Image.Image:
    lawn, x = rng.uniform(0.72, 0.78), rng.uniform(-0.05, 0.05)
    image = _gradient(size, [(0, (196, 230, 250)), (lawn, (236, 246, 250)), (1, (236, 246, 250))])
    b = _Brush(image)
    b.box(x + 0.06, 0.24, x + 0.94, lawn, (62, 120, 214))
    b.box(x + 0.06, 0.24, x + 0.94, 0.3, (44, 92, 180))
    b.poly([(x - 0.03, 0.26), (x + 0.22, 0.02), (x + 0.78, 0.02), (x + 1.03, 0.26)], (190, 70, 60))
    b.box(x + 0.7, -0.02, x + 0.79, 0.08, (150, 90, 80))
    for left in (0.11, 0.77):
        b.box(x + left, 0.37, x + left + 0.13, 0.54, (255, 255, 250))
        b.box(x + left + 0.025, 0.4, x + left + 0.105, 0.51, (252, 226, 140))
    b.box(0, lawn, 1, 1, (172, 204, 120))
    b.oval(0.02, lawn, 0.12, 0.07, (104, 160, 80))
    b.oval(0.98, lawn, 0.12, 0.07, (104, 160, 80))
    return image


def _cobblestones(size: int, rng: Random) -> Image.Image:
    image = _gradient(size, [(0, (84, 80, 80)), (1, (98, 92, 90))])
    b = _Brush(image)
    y, high, row = -0.04, 0.12, 0
    while y < 1:
        wide = high * 1.45
        x = -wide * (0.5 * (row % 2) + rng.uniform(0.1, 0.4))
        while x < 1:
            tone = rng.uniform(0, 1)
            stone = _mix((138, 132, 130), (194, 184, 172), tone)
            b.draw.rounded_rectangle(
                ((x + 0.012) * size, (y + 0.012) * size, (x + wide - 0.012) * size, (y + high - 0.012) * size),
                radius=high * 0.4 * size, fill=stone,
            )  # fmt: skip
            x += wide
        y, high, row = y + high, high * 1.14, row + 1
    return image


def _autumn_leaves(size: int, rng: Random) -> Image.Image:
    ground = rng.uniform(0.6, 0.68)
    stops: list[tuple[float, RGB]] = [(0, (250, 214, 130)), (ground, (252, 228, 170)), (ground + 0.02, (196, 110, 44))]
    image = _gradient(size, [*stops, (1, (150, 72, 30))])
    b = _Brush(image)
    x = rng.uniform(0.06, 0.16) if rng.integers(2) else rng.uniform(0.84, 0.94)
    b.poly([(x - 0.05, 0), (x + 0.05, 0), (x + 0.08, ground + 0.08), (x - 0.08, ground + 0.08)], (98, 62, 44))
    leaves: tuple[RGB, ...] = ((238, 140, 34), (214, 76, 34), (250, 192, 60))
    for k in range(13):
        b.oval(
            rng.uniform(0, 1), rng.uniform(-0.02, 0.3), rng.uniform(0.07, 0.11), rng.uniform(0.05, 0.08), leaves[k % 3]
        )
    for k in range(11):
        b.oval(
            rng.uniform(0, 1),
            rng.uniform(ground + 0.04, 1),
            rng.uniform(0.06, 0.09),
            rng.uniform(0.025, 0.04),
            leaves[k % 3],
        )
    return image


def _water(size: int, rng: Random) -> Image.Image:
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    phase = rng.uniform(0, 2 * np.pi, size=3)
    depth = 3.0 + 3.6 * (1 - y)
    wave = np.sin(2 * np.pi * depth * y + phase[0] + 1.2 * np.sin(2 * np.pi * x * 1.4 + phase[1]))
    wave *= 0.6 + 0.4 * np.sin(2 * np.pi * x * 0.9 + phase[2])
    deep, bright = np.array([14, 92, 170.0]), np.array([120, 206, 238.0])
    t = np.clip(0.3 + 0.38 * wave + 0.3 * (0.6 - y), 0, 1)[..., None]
    return Image.fromarray((deep + (bright - deep) * t).astype(np.uint8))


def _grass(size: int, rng: Random) -> Image.Image:
    far = rng.uniform(0.12, 0.2)
    stops: list[tuple[float, RGB]] = [(0, (214, 240, 206)), (far, (190, 226, 140)), (far + 0.1, (112, 190, 70))]
    image = _gradient(size, [*stops, (1, (58, 150, 48))])
    b = _Brush(image)
    for _ in range(9):
        b.oval(
            rng.uniform(0, 1), rng.uniform(far + 0.1, 1), rng.uniform(0.12, 0.2), rng.uniform(0.03, 0.05), (92, 180, 62)
        )
    for k in range(8):
        x = rng.uniform(0.02, 0.2) if k % 2 else rng.uniform(0.8, 0.98)
        y = far + 0.12 + 0.75 * (k + rng.uniform(0, 0.8)) / 8
        r = 0.028 + 0.02 * y
        b.oval(x, y, r, r, (255, 250, 240) if k % 4 < 2 else (255, 220, 70))
    return image


def _pink_fabric(size: int, rng: Random) -> Image.Image:
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    phase = rng.uniform(0, 2 * np.pi, size=3)
    slope = rng.uniform(0.5, 0.9) * (1 if rng.integers(2) else -1)
    along = x * slope + y
    fold = np.sin(2 * np.pi * 1.9 * along + phase[0] + 0.9 * np.sin(2 * np.pi * 0.8 * (x - y) + phase[1]))
    fold = 0.7 * fold + 0.3 * np.sin(2 * np.pi * 3.1 * along + phase[2])
    dark, bright = np.array([214, 96, 150.0]), np.array([255, 190, 214.0])
    t = (0.5 + 0.5 * fold)[..., None]
    return Image.fromarray((dark + (bright - dark) * t).astype(np.uint8))


PLACES: dict[str, tuple[Callable[[int, Random], Image.Image], float]] = {
    "beach": (_beach, 1.3),
    "snow": (_snow, 1.3),
    "jungle": (_jungle, 1.5),
    "city": (_city, 1.1),
    "wooden floor": (_wooden_floor, 1.0),
    "mountain": (_mountain, 1.2),
    "blue house": (_blue_house, 1.2),
    "cobblestones": (_cobblestones, 1.1),
    "autumn leaves": (_autumn_leaves, 1.4),
    "water": (_water, 0.8),
    "grass": (_grass, 1.4),
    "pink fabric": (_pink_fabric, 0.8),
}
"""Background name to (painter, blur in pixels of a 64-pixel image)."""


def backdrop(background: str, layout: int, flip: bool, size: int) -> np.ndarray:
    """The empty place as (size, size, 3) float32 in [0, 255]; `layout` seeds where things stand."""
    painter, blur = PLACES[background]
    image = painter(size, np.random.default_rng((17, layout)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur * size / 64)), dtype=np.float32)
    return pixels[:, ::-1] if flip else pixels
