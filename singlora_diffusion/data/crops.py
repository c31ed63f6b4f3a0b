"""Images cropped to a model's square."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Crop(NamedTuple):
    """The largest square in the middle of an image, at a model's resolution."""

    pixels: NDArray[np.float32]
    """(3, resolution, resolution) in [-1, 1], channels R, G, B."""
    top: int
    """Where it begins in the image that was scaled with it, in pixels; the same in the mirrored image."""
    left: int


def to_square(image: Image.Image, resolution: int) -> Crop:
    """The shorter side becomes `resolution` pixels (Lanczos, either direction); of the longer one the middle is kept.

    Args:
        image: mode "RGB", as `open_image` gives it.
        resolution: side of the result in pixels.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2  # one of the two is 0
    # Cropping within the resize keeps a very long image from being enlarged whole.
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1.0)
    scale = resolution / side
    return Crop(np.ascontiguousarray(pixels), top=round(top * scale), left=round(left * scale))
