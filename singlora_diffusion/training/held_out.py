"""Held-out images: always the same noise at the same times, so that their loss tells of learning and not of chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..data import draws, latents
from ..data.latents import EncodedImage
from .examples import Batch, Examples

DRAWS = 8
"""Of each image: in the middle of so many equal shares of the model's times."""
SEED = 0
"""Whatever the training's seed, so that trainings can be compared."""


def batches(examples: Examples, images: Sequence[EncodedImage], size: int) -> Iterator[Batch]:
    """All images with all their draws, each asked about with its caption, or else the instance prompt; those of a batch
    have one size."""
    captions, said = examples.streams.held_out, [0] * len(images)
    if captions is not None:
        said = [examples.streams.first_of(captions) + own[0] for own in captions.of_image]
    for some in _positions(images, size):
        drawn = draws.draw(SEED, some, tuple(images[some[0] // DRAWS].mean.shape[2:]), draws.HELD_OUT)
        seen = latents.together(images[position // DRAWS].view() for position in some)
        quantile = torch.tensor([(position % DRAWS + 0.5) / DRAWS for position in some], dtype=torch.float64)
        shown = latents.Examples(seen.mean, drawn.noise, quantile, seen.original, seen.crop, seen.size, seen.mask)
        yield examples.batch(shown, [said[position // DRAWS] for position in some])


def _positions(images: Sequence[EncodedImage], size: int) -> Iterator[list[int]]:
    of_size: dict[latents.Size, list[int]] = {}
    for number, image in enumerate(images):
        of_size.setdefault(latents.size_of(image), []).extend(range(number * DRAWS, (number + 1) * DRAWS))
    for positions in of_size.values():
        yield from (positions[start : start + size] for start in range(0, len(positions), size))
