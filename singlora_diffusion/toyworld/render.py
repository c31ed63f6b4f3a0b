"""Puts an object into a place: pose, light, shadow, downsampling."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .identities import Identity, Scene
from .objects import DRAWINGS
from .pen import OVERSAMPLING, Pen
from .scenery import backdrop

SHADOW = 0.5
"""Darkness of the contact shadow at its middle, 0 to 1."""
FALLOFF = 0.3
"""How much the light changes over the image's width on the object."""


def render(identity: Identity, scene: Scene, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw an identity in a scene.

    Returns the image, (size, size, 3) uint8 RGB, and the object's mask, (size, size) bool (shadow not included).
    """
    pen = Pen(identity, scene, size)
    DRAWINGS[identity.cls](pen)
    small = np.asarray(pen.canvas.convert("RGBa").reduce(OVERSAMPLING), dtype=np.float32)
    alpha = small[..., 3:] / 255
    mask = alpha[..., 0] > 0.5

    ground = backdrop(scene.background, scene.layout, scene.layout % 2 == 1, size)
    ground = ground * (1 - SHADOW * _contact(mask, scene.light, size))
    image = ground * (1 - alpha) + small[..., :3] * _light(scene.light, size)
    image = image * np.asarray(scene.tint, dtype=np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), mask


def _light(direction: float, size: int) -> np.ndarray:
    """Brightness factors (size, size, 1) of a light from above and from the side `direction`."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    factor = 1.02 + FALLOFF * (direction * axis[None, :] - 0.6 * axis[:, None])
    return np.clip(factor, 0.75, 1.2)[..., None]


def _contact(mask: np.ndarray, direction: float, size: int) -> np.ndarray:
    """A soft shadow (size, size, 1), 0 to 1, where the object meets the ground, drawn away from the light."""
    rows = np.flatnonzero(mask.any(axis=1))
    bottom = int(rows[-1])
    feet = np.flatnonzero(mask[max(0, bottom - size // 8) : bottom + 1].any(axis=0))
    away = -direction * 0.05 * size
    left, right = feet[0] - 0.03 * size + away, feet[-1] + 0.03 * size + away
    layer = Image.new("L", (size, size), 0)
    ImageDraw.Draw(layer).ellipse((left, bottom - 0.07 * size, right, bottom + 0.06 * size), fill=255)
    return np.asarray(layer.filter(ImageFilter.GaussianBlur(0.032 * size)), dtype=np.float32)[..., None] / 255
