"""The contract of a base-model family: what training and sampling ask of a model, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..terminal import escaped
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


class NoiseProcess(Protocol):
    """How a model is trained: from images to noise, the answers wanted on the way, and how they count."""

    @property
    def prediction_type(self) -> str:
        """What the denoiser answers with: epsilon, v_prediction or flow."""
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


class Family(Protocol):
    """A loaded, frozen base model."""

    name: str
    """Of the family: `stable_diffusion`."""
    source: str
    """What the user named: a packaged model, a folder, a hub id."""
    fingerprint: str
    """sha256 of samples of the denoiser's weight files (`parts.fingerprint`)."""
    networks: dict[str, NetworkSpec]
    """What can be adapted, by name, the denoiser first."""
    device: torch.device
    dtype: torch.dtype
    resolution: int
    """The native side in pixels."""
    multiple: int
    """Sides are multiples of so many pixels."""
    largest: int | None
    """The longest side in pixels that the model knows; None: it has no such limit."""
    guidance: float
    """The guidance scale that the model likes."""
    steps: int
    """The number of sampling steps that it likes."""
    scheduler: Any
    """The model's own sampling scheduler."""
    schedulers: Mapping[str, Any]
    """Further schedulers by the names that `--scheduler` takes."""
    prompt_set: str | None
    """Name of the bundled prompt set that the model gives for itself."""
    noise_process: NoiseProcess
    """How images become noise in training, and what the denoiser answers."""

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

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer (N, C, h, w) to noisy latents, in its dtype."""
        ...

    def pipeline(self, scheduler: str | None = None) -> Any:
        """A stock diffusers pipeline around the same modules; `scheduler` None keeps the model's own scheduler."""
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
        scheduler: str | None = None,
    ) -> list[Image.Image]:
        """One image per prompt and seed. Each has its own generator, so it depends on its batch to rounding only.

        None stands for what the model likes: `steps`, `guidance`, `resolution`.
        """
        ...


def denoiser(family: Family) -> NetworkSpec:
    """The network that takes the noise out of latents; each family has one."""
    return next(network for network in family.networks.values() if network.role == "denoiser")


def check_sides(
    family: Family, height: int | None, width: int | None, flags: tuple[str, str] | None = None
) -> tuple[int, int]:
    """Height and width in pixels that the model can do; None stands for its native side.

    Args:
        flags: by which the user gives height and width, for the message.

    Raises:
        UserError: a side that is not a multiple of `family.multiple`, or longer than `family.largest`.
    """
    sides = height or family.resolution, width or family.resolution
    size = f"{sides[1]}x{sides[0]} pixels"
    named = (
        [f"{flag} {side}:" for flag, side in zip(flags, sides, strict=True)]
        if flags
        else [f"{size}: height", f"{size}: width"]
    )
    for side, name in zip(sides, named, strict=True):
        source = escaped(family.source)
        if side % family.multiple or side < family.multiple:
            raise UserError(f"{name} must be a multiple of {family.multiple} pixels for {source}")
        if family.largest is not None and side > family.largest:
            raise UserError(f"{name} must be smaller, {source} knows sides of up to {family.largest} pixels")
    return sides
