"""Images as latents: encoded once, since nothing that makes them is trained, then drawn by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..terminal import escaped
from . import crops, draws, masks
from .crops import Cropping
from .images import open_image

if TYPE_CHECKING:
    from ..models.family import Latents


class ImageEncoder(Protocol):
    """What encodes images: a `Family`, or something before it."""

    def encode_images(self, pixels: Tensor) -> Latents: ...


Size = tuple[int, int]
"""Height and width in pixels."""


class EncodedImage(NamedTuple):
    """The latent distributions of an image, as `Family.encode_images` gives them, and how it was cropped."""

    mean: Tensor
    """(crops, sides, C, h, w) float32; sides is 2, the second one mirrored, where images are flipped at random."""
    std: Tensor
    original: Tensor
    """(2,) int64: height and width of the image file."""
    crop: Tensor
    """(crops, sides, 2) int64: top and left of the crop, after scaling."""
    size: Tensor
    """(2,) int64: height and width of the crop."""
    mask: Tensor
    """(crops, sides, 1, h, w) float32 in [0, 1]: how much each place counts in the loss."""

    def view(self, crop: int = 0, side: int = 0) -> View:
        own = (crop, side)
        return View(self.mean[own], self.std[own], self.original, self.crop[own], self.size, self.mask[own])


def size_of(image: EncodedImage) -> Size:
    """At which an image is seen."""
    height, width = image.size.tolist()
    return height, width


class View(NamedTuple):
    """Of an encoded image: what it is where it is cropped at one place. Or N of them, then with another first axis."""

    mean: Tensor
    """(C, h, w)."""
    std: Tensor
    original: Tensor
    """(2,)."""
    crop: Tensor
    """(2,)."""
    size: Tensor
    """(2,)."""
    mask: Tensor
    """(1, h, w)."""


def together(views: Iterable[View]) -> View:
    """Views of one size as one, in order."""
    return View(*(torch.stack(column) for column in zip(*views, strict=True)))


class Stream(NamedTuple):
    """Images that examples are drawn from."""

    images: Sequence[EncodedImage]
    repeats: Sequence[int]
    """How often an epoch has each of them."""

    @property
    def sizes(self) -> list[Size]:
        """Of the images as they are seen."""
        return [size_of(image) for image in self.images]


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
    """(N, 2)."""
    size: Tensor
    """(N, 2)."""
    mask: Tensor
    """(N, 1, h, w)."""


def encode(encoder: ImageEncoder, path: Path, cropping: Cropping, flip: bool, mask: Path | None = None) -> EncodedImage:
    """Decode, crop and encode one image.

    Args:
        mask: of the image. Crops in which it is black are left out. None: all of the image counts.

    Raises:
        UserError: image or mask cannot be read, or the mask is black in all crops.
    """
    image = open_image(path)
    painted = None if mask is None else masks.open_mask(mask, image.size)
    height, width = cropping.size_of(image.size)
    found = []
    for place in cropping.places(image.size):
        crop = crops.crop(image, height, width, place)
        pixels = torch.from_numpy(crop.pixels)
        mean, std = encoder.encode_images(torch.stack([pixels, pixels.flip(-1)] if flip else [pixels]))
        counts = torch.ones(1, *mean.shape[2:])
        if painted is not None:
            part = crops.box(image.size, height, width, place)
            counts = torch.from_numpy(crops.mask(painted, part, *mean.shape[2:]))
        if counts.any():
            corners = torch.tensor([[crop.top, crop.left], [crop.top, crop.left_mirrored]])
            sides = torch.stack([counts, counts.flip(-1)])
            found.append((mean.cpu(), std.cpu(), corners[: len(mean)], sides[: len(mean)]))
    if not found:
        raise UserError(f"{escaped(mask, 1000)}: is black in what is seen of the image; crop the image to the subject")
    mean, std, corners, counts = (torch.stack(column) for column in zip(*found, strict=True))
    original, size = torch.tensor([image.height, image.width]), torch.tensor([height, width])
    return EncodedImage(mean, std, original, corners, size, counts)


def batch(
    images: Sequence[EncodedImage], seed: int, positions: range, kind: int, noise_offset: float = 0.0
) -> Examples:
    """The examples at these positions of a stream.

    Args:
        images: which stand there, all seen at one size.
        kind: of the stream, `draws.INSTANCE` or another.
        noise_offset: how much noise is added to a latent's channels as wholes.
    """
    drawn = draws.draw(seed, positions, tuple(images[0].mean.shape[2:]), kind)
    views = []
    for image, position, flip in zip(images, positions, drawn.flip, strict=True):
        crop = int(draws.crop(seed, position, kind) * len(image.mean))
        side = int(flip) * (image.mean.shape[1] - 1)
        views.append(image.view(crop, side))
    seen = together(views)
    noise = drawn.noise + noise_offset * drawn.offset if noise_offset else drawn.noise
    clean = seen.mean + seen.std * drawn.latent_noise
    return Examples(clean, noise, drawn.quantile, seen.original, seen.crop, seen.size, seen.mask)


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several streams in one batch, in order."""
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))
