"""Images cropped to a model's square."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_square(
    image: Image.Image,
    resolution: int,
    *,
    center_crop: bool = True,
    random_flip: bool = False,
    rng: np.random.Generator | None = None,
) -> NDArray[np.float32]:
    """The largest square of an image, at the model's resolution.

    The shorter side becomes `resolution` pixels (Lanczos, either direction); of the longer one the middle is kept, or a
    piece drawn at random.

    Args:
        image: mode "RGB", as `open_image` gives it.
        resolution: side of the result in pixels.
        center_crop: False draws the place of the crop from `rng`.
        random_flip: mirrors one image in two, drawn from `rng`.
        rng: source of both draws; the same state gives the same crop. Needed only for drawing.

    Returns:
        (3, resolution, resolution) float32 in [-1, 1], channels R, G, B.
    """
    if rng is None and (random_flip or not center_crop):
        raise ValueError("a random crop or flip needs rng")
    width, height = image.size
    side = min(width, height)
    place = 0.5 if center_crop or rng is None else rng.random()
    left, top = (width - side) * place, (height - side) * place  # one of the two is 0
    # Cropping within the resize keeps a very long image from being enlarged whole.
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1.0)
    if random_flip and rng is not None and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)
