"""The contract of a base-model family: what training and sampling ask of a model, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .network import NetworkSpec


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told beside the noisy latents: named tensors, the first axis of each counts the examples."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The examples at these places, in this order; a place may come twice."""
        chosen = list(indices)
        return Conditioning({name: tensor[chosen] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def detach(self) -> Conditioning:
        return Conditioning({name: tensor.detach() for name, tensor in self.tensors.items()})


class Latents(NamedTuple):
    """The distribution of an image's latents, both (N, C, h, w) float32, in the scale that the denoiser works in."""

    mean: Tensor
    std: Tensor


class Geometry(NamedTuple):
    """Of each training example, in pixels: (N, 2) int64 each, height before width."""

    original: Tensor
    """Size of the image file, before it was scaled."""
    crop: Tensor
    """Top and left of the crop, after scaling."""
    target: Tensor
    """Size of the crop."""


class Corrupted(NamedTuple):
    """Latents with noise, and the answer wanted of the denoiser, both (N, C, h, w)."""

    noisy: Tensor
    target: Tensor


class Family(Protocol):
    """A loaded, frozen base model."""

    name: str
    """Of the family: `stable_diffusion`."""
    source: str
    """What the user named: `toyworld`, a folder, a hub id."""
    fingerprint: str
    """sha256 of the denoiser's weights."""
    networks: dict[str, NetworkSpec]
    """What can be adapted, by name, the denoiser first."""
    device: torch.device
    dtype: torch.dtype
    resolution: int
    """The native side in pixels."""
    multiple: int
    """Sides are multiples of so many pixels."""
    guidance: float
    """The guidance scale that the model likes."""
    steps: int
    """The number of sampling steps that it likes."""
    scheduler: Any
    """The model's own sampling scheduler."""
    samplers: Mapping[str, Any]
    """Further schedulers by the names that `--scheduler` takes."""
    prompts: str | None
    """The bundled prompt set that the model names for itself."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What the text encoders say of N prompts; differentiable."""
        ...

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """The conditioning of N training examples with their sizes and crops, where the model is told of them."""
        ...

    def prompt_overflow(self, prompt: str) -> int:
        """By how many tokens a prompt is too long for the model, which cuts them off; 0 if it fits."""
        ...

    def encode_images(self, pixels: Tensor) -> Latents:
        """The latents of images (N, 3, H, W) in [-1, 1]."""
        ...

    def times(self, quantiles: Tensor) -> Tensor:
        """Where on the way from image to noise examples are trained: the model's training distribution of times.

        Args:
            quantiles: (N,) float64, uniform in [0, 1). Equal quantiles give equal times.

        Returns:
            (N,): integer timesteps of a diffusion model, noise levels in (0, 1] of flow matching.
        """
        ...

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Corrupted:
        """Mix noise into latents. Answering with `target` exactly would give the latents back."""
        ...

    def recover(self, noisy: Tensor, answer: Tensor, times: Tensor) -> Tensor:
        """The latents that a denoiser's answer to noisy latents implies; the inverse of `corrupt`."""
        ...

    def loss_weights(self, times: Tensor, snr_gamma: float | None) -> Tensor | None:
        """(N,) weights of the examples' losses, None: all 1. `snr_gamma`: min-SNR, for diffusion models only.

        Raises:
            UserError: min-SNR is asked of a model that has no signal-to-noise ratio.
        """
        ...

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer (N, C, h, w) to noisy latents, in its dtype."""
        ...

    def pipeline(self, sampler: str | None = None) -> Any:
        """A stock diffusers pipeline around the same modules; `sampler` None keeps the model's own scheduler."""
        ...

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
    ) -> list[Image.Image]:
        """One image per prompt and seed. Each has its own generator, so it depends on its batch to rounding only.

        None stands for what the model likes: `steps`, `guidance`, `resolution`.
        """
        ...


def check_sides(family: Family, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels to sample at; None: the model's native side.

    Raises:
        UserError: a side that is not a multiple of `family.multiple`.
    """
    height, width = height or family.resolution, width or family.resolution
    if height % family.multiple or width % family.multiple or min(height, width) < family.multiple:
        raise UserError(f"{width}x{height} pixels: both sides must be multiples of {family.multiple}")
    return height, width
