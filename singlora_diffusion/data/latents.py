"""Images as latents: encoded once, since nothing that makes them is trained, then drawn by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from . import crops, draws
from .images import open_image

if TYPE_CHECKING:
    from ..models.family import Latents


class ImageEncoder(Protocol):
    """What encodes images: a `Family`, or something before it."""

    def encode_images(self, pixels: Tensor) -> Latents: ...


class EncodedImage(NamedTuple):
    """The latent distributions of an image, as `Family.encode_images` gives them, and how it was cropped."""

    mean: Tensor
    """(views, C, h, w) float32; views is 2, the second one mirrored, where images are flipped at random."""
    std: Tensor
    original: Tensor
    """(2,) int64: height and width of the image file."""
    crop: Tensor
    """(2,) int64: top and left of the crop, after scaling."""


class Stream(NamedTuple):
    """Images that examples are drawn from."""

    images: Sequence[EncodedImage]
    repeats: Sequence[int]
    """How often an epoch has each of them."""


class Examples(NamedTuple):
    """What a step learns from, on the CPU, N examples."""

    latents: Tensor
    """(N, C, h, w) float32."""
    noise: Tensor
    """(N, C, h, w) float32."""
    quantile: Tensor
    """(N,) float64, for `Family.times`."""
    original: Tensor
    """(N, 2), as in `EncodedImage`."""
    crop: Tensor


def encode(encoder: ImageEncoder, path: Path, resolution: int, flip: bool) -> EncodedImage:
    """Decode, crop and encode one image.

    Raises:
        UserError: the image cannot be read.
    """
    image = open_image(path)
    crop = crops.to_square(image, resolution)
    pixels = torch.from_numpy(crop.pixels)
    views = torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])
    mean, std = encoder.encode_images(views)
    original, corner = torch.tensor([image.height, image.width]), torch.tensor([crop.top, crop.left])
    return EncodedImage(mean.cpu(), std.cpu(), original, corner)


def batch(data: Stream, seed: int, positions: range, kind: int, noise_offset: float = 0.0) -> Examples:
    """The examples at these positions of a stream.

    Args:
        kind: of the stream, `draws.INSTANCE` or another.
        noise_offset: how much noise is added to a latent's channels as wholes.
    """
    drawn = draws.draw(seed, positions, tuple(data.images[0].mean.shape[1:]), kind)
    chosen = [data.images[place] for place in draws.examples(seed, positions, data.repeats, kind)]
    views = [int(flip) * (len(image.mean) - 1) for image, flip in zip(chosen, drawn.flip, strict=True)]
    mean = torch.stack([image.mean[view] for image, view in zip(chosen, views, strict=True)])
    std = torch.stack([image.std[view] for image, view in zip(chosen, views, strict=True)])
    noise = drawn.noise + noise_offset * drawn.offset if noise_offset else drawn.noise
    original, crop = (torch.stack(column) for column in ([i.original for i in chosen], [i.crop for i in chosen]))
    return Examples(mean + std * drawn.latent_noise, noise, drawn.quantile, original, crop)


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several streams in one batch, in order."""
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))
