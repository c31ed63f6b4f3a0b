"""Outlined shapes in an object's own coordinates, drawn through a pose onto a transparent canvas.

Object coordinates: x to the right and y down, both about -1 to 1; y = 1 is the ground the object stands on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .identities import PALETTE, RGB, Identity, Scene

Points = np.ndarray

OVERSAMPLING = 4
REACH = 0.37
"""Length of one object unit as a fraction of the image's side, at zoom 1."""
OUTLINE = 1.4 / 64
METAL: RGB = (176, 182, 194)
INK: RGB = (38, 36, 46)
WHITE: RGB = (250, 248, 244)


@lru_cache(maxsize=256)
def _unit_arc(start: float, stop: float, n: int) -> Points:
    t = np.radians(np.linspace(start, stop, n, endpoint=stop - start < 360))
    arc = np.stack([np.cos(t), np.sin(t)], axis=1)
    arc.flags.writeable = False
    return arc


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 32) -> Points:
    """Points (n, 2) of an ellipse or, between two angles in degrees clockwise from the right, of its arc."""
    return _unit_arc(start, stop, n) * (rx, ry) + (x, y)


def box(x0: float, y0: float, x1: float, y1: float, top: float, bottom: float | None = None) -> Points:
    """A rectangle whose upper and lower corners are rounded by the radii `top` and `bottom`."""
    low = top if bottom is None else bottom
    return np.concatenate(
        [
            ellipse(x0 + top, y0 + top, top, top, 180, 270, 8),
            ellipse(x1 - top, y0 + top, top, top, 270, 359.9, 8),
            ellipse(x1 - low, y1 - low, low, low, 0, 90, 8),
            ellipse(x0 + low, y1 - low, low, low, 90, 180, 8),
        ]
    )


def _spline(control: np.ndarray, steps: int) -> Points:
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    p0, p1, p2, p3 = control[:-3], control[1:-2], control[2:-1], control[3:]
    curve = p1 + 0.5 * t * ((p2 - p0) + t * ((2 * p0 - 5 * p1 + 4 * p2 - p3) + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.swapaxes(0, 1).reshape(-1, 2)


def blob(points: Sequence[tuple[float, float]], steps: int = 6) -> Points:
    """A smooth closed curve (Catmull-Rom) through the given points."""
    p = np.asarray(points, dtype=float)
    return _spline(np.concatenate([p[-1:], p, p[:2]]), steps)


def curve(points: Sequence[tuple[float, float]], steps: int = 6) -> Points:
    """A smooth open curve (Catmull-Rom) through the given points."""
    p = np.asarray(points, dtype=float)
    return np.concatenate([_spline(np.concatenate([p[:1], p, p[-1:]]), steps), p[-1:]])


_CAP = _unit_arc(90, -90, 9)[1:-1]


def ribbon(path: Points, width: float) -> Points:
    """The outline of a path drawn with a round pen of the given width."""
    path = np.asarray(path, dtype=float)
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    side = np.stack([-along[:, 1], along[:, 0]], axis=1) * (width / 2)
    tail = path[-1] + _CAP[:, 1:] * side[-1] + _CAP[:, :1] * along[-1] * (width / 2)
    head = path[0] - _CAP[:, 1:] * side[0] - _CAP[:, :1] * along[0] * (width / 2)
    return np.concatenate([path + side, tail, (path - side)[::-1], head])


def star(x: float, y: float, r: float) -> Points:
    """A five-pointed star, plump enough to survive a small image."""
    t = np.radians(-90 + 36 * np.arange(10))
    radius = np.where(np.arange(10) % 2 == 0, r * 1.12, r * 0.54)
    return np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], axis=1)


def heart(x: float, y: float, r: float) -> Points:
    """A heart about 2 r wide."""
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    across = np.sin(t) ** 3
    down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x + r * across, y + r * down], axis=1)


def shade(colour: RGB, factor: float) -> RGB:
    """The colour made darker (factor < 1) or mixed with white (factor > 1: 2 is white)."""
    if factor <= 1:
        r, g, b = (round(c * factor) for c in colour)
    else:
        r, g, b = (round(c + (255 - c) * (factor - 1)) for c in colour)
    return r, g, b


class Pen:
    """Draws one identity in the pose of one scene."""

    def __init__(self, identity: Identity, scene: Scene, size: int) -> None:
        self.identity = identity
        side = size * OVERSAMPLING
        unit = REACH * side * scene.zoom
        cos, sin = math.cos(scene.angle) * unit, math.sin(scene.angle) * unit
        mirror = -1 if scene.flip else 1
        self._turn = np.array([[cos * mirror, sin * mirror], [-sin, cos]])
        self._origin = np.array([(0.5 + scene.dx) * side, (0.515 + scene.dy) * side])
        self._line = max(1, round(OUTLINE * side))
        r, g, b = (min(255, max(0, c + d)) for c, d in zip(PALETTE[identity.colour], identity.shift, strict=True))
        self.main: RGB = (r, g, b)
        self.detail = PALETTE[identity.detail_colour]
        self.canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.canvas)
        self._cloth = Image.new("RGB", (side, side), self.main)

    def _place(self, points: Points) -> list[float]:
        placed: list[float] = (points @ self._turn + self._origin).ravel().tolist()
        return placed

    def _outline(self, xy: list[float], colour: RGB) -> None:
        # four extra values: the seam is drawn over, so that the closing corner has no notch
        self._draw.line(xy + xy[:4], fill=shade(colour, 0.46), width=self._line)

    def fill(self, points: Points, colour: RGB, outline: bool = True) -> None:
        """A shape in one colour, edged in its darker shade."""
        xy = self._place(points)
        self._draw.polygon(xy, fill=colour)
        if outline:
            self._outline(xy, colour)

    def stroke(self, path: Points, width: float, colour: RGB, outline: bool = True) -> None:
        """A thick round-ended line along a path."""
        self.fill(ribbon(path, width), colour, outline)

    def paint(self, x: float, y: float, r: float) -> None:
        """Lay the identity's pattern on the cloth of `skin`; a star or heart goes to (x, y) with radius r."""
        i = self.identity
        draw, colour = ImageDraw.Draw(self._cloth), PALETTE[i.pattern_colour]
        if i.pattern == "star":
            draw.polygon(self._place(star(x, y, r)), fill=colour)
        elif i.pattern == "heart":
            draw.polygon(self._place(heart(x, y, r)), fill=colour)
        elif i.pattern == "stripes":
            angle = math.radians((0, 90, 40)[i.face])
            along = np.array([math.cos(angle), math.sin(angle)])
            across = np.array([-along[1], along[0]])
            for k in range(-5, 5):
                middle = across * (0.42 * (k + i.phase))
                edge = across * 0.105
                band = [middle - edge - 2 * along, middle - edge + 2 * along]
                band += [middle + edge + 2 * along, middle + edge - 2 * along]
                draw.polygon(self._place(np.array(band)), fill=colour)
        elif i.pattern == "dots":
            dot = ellipse(0.2 * (i.phase - 0.5), 0.1, 0.145, 0.145, n=12)
            for row in range(-3, 3):
                for k in range(-2, 3):
                    step = np.array([0.48 * (k + 0.5 * (row % 2)), 0.4 * row])
                    draw.polygon(self._place(dot + step), fill=colour)
        elif i.pattern == "checks":
            cell = 0.36
            for row in range(-4, 4):
                for k in range(-4, 4):
                    if (row + k) % 2 == 0:
                        left, up = (k + i.phase) * cell, (row + i.phase) * cell
                        square = [(left, up), (left + cell, up), (left + cell, up + cell), (left, up + cell)]
                        draw.polygon(self._place(np.array(square)), fill=colour)

    def gloss(self, points: Points, strength: int = 110) -> None:
        """A highlight on the cloth of `skin`; strength 0 to 255."""
        ImageDraw.Draw(self._cloth, "RGBA").polygon(self._place(points), fill=(255, 255, 255, strength))

    def skin(self, points: Points) -> None:
        """A shape cut out of the patterned cloth."""
        xy = self._place(points)
        stencil = Image.new("L", self.canvas.size, 0)
        ImageDraw.Draw(stencil).polygon(xy, fill=255)
        self.canvas.paste(self._cloth, mask=stencil)
        self._outline(xy, self.main)

    def eye(self, x: float, y: float, r: float, iris: RGB) -> None:
        """A round eye that looks at the viewer."""
        self.fill(ellipse(x, y, r, r * 1.1, n=20), WHITE)
        self.fill(ellipse(x, y + 0.01, r * 0.68, r * 0.74, n=16), iris, outline=False)
        self.fill(ellipse(x, y + 0.01, r * 0.42, r * 0.5, n=14), INK, outline=False)
