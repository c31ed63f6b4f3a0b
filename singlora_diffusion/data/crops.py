"""Images cropped to what a model sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .buckets import Buckets

PLACES = 8
"""Crops of an image that is cropped at random, evenly from one end of its longer side to the other: few enough to be
encoded before the first step, and a photograph of 3:2 moves by a fourteenth of its height from one to the next."""
MIDDLE = 0.5


class Crop(NamedTuple):
    """Part of an image, scaled."""

    pixels: NDArray[np.float32]
    """(3, height, width) in [-1, 1], channels R, G, B."""
    top: int
    """Where it begins in the image that was scaled with it, in pixels."""
    left: int
    left_mirrored: int
    """Where its mirror image begins in the mirrored image."""


class Cropping(NamedTuple):
    """What a model is to see of an image."""

    height: int
    """In pixels."""
    width: int
    random: bool = False
    """At one of `PLACES`, instead of in the middle."""
    buckets: Buckets | None = None
    """Height and width follow the image's own."""

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that are seen of an image of this width and height."""
        return (self.height, self.width) if self.buckets is None else self.buckets.size_of(size)

    def places(self, size: tuple[int, int]) -> Sequence[float]:
        """Where an image of this width and height is cropped, each as in `box`."""
        height, width = self.size_of(size)
        whole = size[0] * height == size[1] * width
        return [place / (PLACES - 1) for place in range(PLACES)] if self.random and not whole else [MIDDLE]


def box(size: tuple[int, int], height: int, width: int, place: float = MIDDLE) -> tuple[float, float, float, float]:
    """The largest part of an image with the proportions of (height, width): left, top, right and bottom in its pixels.

    Args:
        size: width and height of the image.
        place: from 0.0, the left or upper end, to 1.0, the other one.
    """
    across, down = min(size[0], size[1] * width / height), min(size[1], size[0] * height / width)
    left, top = (size[0] - across) * place, (size[1] - down) * place  # one of the two is 0
    return left, top, min(left + across, size[0]), min(top + down, size[1])


def mask(image: Image.Image, part: tuple[float, float, float, float], height: int, width: int) -> NDArray[np.float32]:
    """What of a mask belongs to a crop, (1, height, width) in [0, 1], each value the mean of its place.

    Args:
        image: mode "L".
        part: of the mask, a `box`.
    """
    reduced = image.resize((width, height), Image.Resampling.BOX, box=part)
    return np.asarray(reduced, dtype=np.float32)[None] / np.float32(255)


def crop(image: Image.Image, height: int, width: int, place: float = MIDDLE) -> Crop:
    """The `box` of an image, scaled to height and width (Lanczos, either direction).

    Args:
        image: mode "RGB", as `open_image` gives it.
        height, width: of the result in pixels.
    """
    left, top, right, bottom = box(image.size, height, width, place)
    # Cropping within the resize keeps a very long image from being enlarged whole.
    part = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    pixels = np.asarray(part, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1.0)
    scale = height / (bottom - top)
    corner = (round(offset * scale) for offset in (top, left, image.width - right))
    return Crop(np.ascontiguousarray(pixels), *corner)
