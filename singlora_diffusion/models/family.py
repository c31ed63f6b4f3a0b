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
from .times import TimeSettings


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
    """Latents with noise, and what the denoiser is to predict from them, both (N, C, h, w)."""

    noisy: Tensor
    target: Tensor


class NoiseProcess(Protocol):
    """How a model is trained: from images to noise, what is predicted on the way, and how they count."""

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: epsilon, v_prediction or flow."""
        ...

    def with_times(self, chosen: TimeSettings, tokens: int) -> NoiseProcess:
        """The process with the times and weights that the user chose; nothing chosen: as it is.

        Args:
            tokens: of a training image, as the denoiser sees it. A model's own shift may depend on their number.

        Raises:
            UserError: a choice that means nothing to this model.
        """
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
        """Mix noise into latents. Predicting `target` exactly would give the latents back."""
        ...

    def recover(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """The latents that a prediction for noisy latents implies; the inverse of `corrupt`."""
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
    vae_source: str | None
    """What the user named as another autoencoder; None: the model's own."""
    vae_fingerprint: str
    """sha256 of samples of the autoencoder's weight files."""
    text_fingerprint: str
    """The same of the text encoders and tokenizers."""
    networks: dict[str, NetworkSpec]
    """What can be adapted, by name, the denoiser first."""
    vae: Any
    """The autoencoder, in float32."""
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
    learning_rate: float
    """Peak rate that is usual for adapters of it."""
    scheduler: Any
    """The model's own sampling scheduler."""
    schedulers: Mapping[str, Any]
    """Further schedulers by the names that `--scheduler` takes."""
    prompt_set: str | None
    """Name of the bundled prompt set that the model gives for itself."""
    noise_process: NoiseProcess
    """How images become noise in training, and what the denoiser predicts."""

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
        """The denoiser's prediction (N, C, h, w) for noisy latents, in its dtype."""
        ...

    def pipeline(self, scheduler: str | None = None) -> Any:
        """A stock diffusers pipeline around the same modules; `scheduler` None keeps the model's own scheduler."""
        ...

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """What guidance leads away from: one negative prompt, which may be empty; None: the model is not guided so.

        Raises:
            UserError: there is one, and the model takes none.
        """
        ...

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of so many pixels from what the stock pipeline gives out as latents."""
        ...


def denoiser(family: Family) -> NetworkSpec:
    """The network that takes the noise out of latents; each family has one."""
    return next(network for network in family.networks.values() if network.role == "denoiser")


def noise_process(family: Family, chosen: TimeSettings, side: int) -> NoiseProcess:
    """What training on images of `side` pixels uses: the family's noise process with what the user chose.

    Raises:
        UserError: a choice that means nothing to this model.
    """
    return family.noise_process.with_times(chosen, (side // family.multiple) ** 2)


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
