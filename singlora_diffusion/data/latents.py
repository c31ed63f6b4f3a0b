"""Images as latents: encoded once, since nothing that makes them is trained, then drawn by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import crops, draws
from .images import open_image

if TYPE_CHECKING:
    from ..models import Family


class EncodedImages(NamedTuple):
    """Latent distributions of n images, as `Family.encode_images` gives them, and how the images were cropped."""

    mean: Tensor
    """(n, views, C, h, w) float32; views is 2, the second one mirrored, where images are flipped at random."""
    std: Tensor
    original: Tensor
    """(n, 2) int64: height and width of the image file."""
    crop: Tensor
    """(n, 2) int64: top and left of the crop, after scaling."""


class Examples(NamedTuple):
    """What a step learns from, on the CPU, N examples."""

    latents: Tensor
    """(N, C, h, w) float32."""
    noise: Tensor
    """(N, C, h, w) float32."""
    quantile: Tensor
    """(N,) float64, for `Family.times`."""
    original: Tensor
    """(N, 2), as in `EncodedImages`."""
    crop: Tensor


def encode(family: Family, path: Path, resolution: int, flip: bool) -> EncodedImages:
    """Decode, crop and encode one image.

    Raises:
        UserError: the image cannot be read.
    """
    image = open_image(path)
    crop = crops.to_square(image, resolution)
    pixels = torch.from_numpy(crop.pixels)
    views = torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])
    mean, std = family.encode_images(views)
    original, corner = torch.tensor([[image.height, image.width]]), torch.tensor([[crop.top, crop.left]])
    return EncodedImages(mean.cpu()[None], std.cpu()[None], original, corner)


def together(encoded: Sequence[EncodedImages]) -> EncodedImages:
    """Several of them as one, in order."""
    return EncodedImages(*(torch.cat(column) for column in zip(*encoded, strict=True)))


def batch(data: EncodedImages, seed: int, positions: range, stream: int, noise_offset: float = 0.0) -> Examples:
    """The examples at these positions of a stream.

    Args:
        noise_offset: how much noise is added to a latent's channels as wholes.
    """
    drawn = draws.draw(seed, positions, tuple(data.mean.shape[2:]), stream)
    chosen = draws.examples(seed, positions, len(data.mean), stream)
    view = drawn.flip.long() * (data.mean.shape[1] - 1)
    latents = data.mean[chosen, view] + data.std[chosen, view] * drawn.latent_noise
    noise = drawn.noise + noise_offset * drawn.offset if noise_offset else drawn.noise
    return Examples(latents, noise, drawn.quantile, data.original[chosen], data.crop[chosen])


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several streams in one batch, in order."""
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))
