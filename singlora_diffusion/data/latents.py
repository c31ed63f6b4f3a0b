"""Pictures as latents: encoded once, since nothing that makes them is trained, then drawn by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..progress import track
from . import crops, draws, images

if TYPE_CHECKING:
    from rich.console import Console

    from ..models import Family


class Encoded(NamedTuple):
    """Latent distributions of a folder of pictures."""

    mean: Tensor
    """(n, flips, C, h, w) float32; flips is 2 with --random_flip."""
    std: Tensor


def encode_pictures(family: Family, pictures: Sequence[Path], resolution: int, flip: bool, console: Console) -> Encoded:
    """Decode, crop and encode every picture once: nothing that makes the latents is trained."""
    means, stds = [], []
    for path in track(pictures, "encoding pictures", console):
        pixels = torch.from_numpy(crops.to_square(images.open_picture(path), resolution))
        views = torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])
        mean, std = family.encode_images(views)
        means.append(mean.cpu())
        stds.append(std.cpu())
    return Encoded(torch.stack(means), torch.stack(stds))


def batch(data: Encoded, seed: int, positions: range, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and quantiles of the time for these positions of the stream, on the CPU."""
    drawn = draws.draw(seed, positions, tuple(data.mean.shape[2:]), stream)
    chosen = draws.examples(seed, positions, len(data.mean), stream)
    view = drawn.flip.long() * (data.mean.shape[1] - 1)
    return data.mean[chosen, view] + data.std[chosen, view] * drawn.latent_noise, drawn.noise, drawn.quantile
