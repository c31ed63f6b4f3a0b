"""Held-out images: always the same noise at the same times, so that their loss tells of learning and not of chance."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..data import draws, latents
from ..data.latents import EncodedImages
from .examples import Batch, Examples

DRAWS = 8
"""Of each image: in the middle of so many equal shares of the model's times."""
SEED = 0
"""Whatever the training's seed, so that trainings can be compared."""


def batches(examples: Examples, images: EncodedImages, size: int) -> Iterator[Batch]:
    """All images with all their draws, asked about with the instance prompt."""
    positions = range(len(images.mean) * DRAWS)
    for start in range(0, len(positions), size):
        some = positions[start : start + size]
        drawn = draws.draw(SEED, some, tuple(images.mean.shape[2:]), draws.HELD_OUT)
        which = torch.tensor([position // DRAWS for position in some])
        quantile = torch.tensor([(position % DRAWS + 0.5) / DRAWS for position in some], dtype=torch.float64)
        shown = latents.Examples(
            images.mean[which, 0], drawn.noise, quantile, images.original[which], images.crop[which]
        )
        yield examples.batch(shown, [0] * len(some))
