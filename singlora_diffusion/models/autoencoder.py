"""Images to latents and back through a diffusers AutoencoderKL in float32, in which no known one overflows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .family import Latents


def downsampling(vae: Any) -> int:
    """Pixels per latent along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Latents:
    """Of images (N, 3, H, W) in [-1, 1]: mean and standard deviation in the scale that the denoiser works in."""
    posterior = vae.encode(pixels.to(vae.device, torch.float32)).latent_dist
    shift, scale = _scale(vae)
    return Latents((posterior.mean - shift) * scale, posterior.std * scale)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Latents (N, C, h, w) in the denoiser's scale to images."""
    shift, scale = _scale(vae)
    return to_images(vae, latents.float() / scale + shift)


@torch.no_grad()
def to_images(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Latents (N, C, h, w) in the autoencoder's own scale to images.

    One at a time and in float32: full-size images do not fit otherwise, and half precision shows in flat areas.
    """
    decoded = torch.cat([vae.decode(one[None].float()).sample for one in latents])
    pixels = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def _scale(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale of latents = (z - shift) * scale. Some SDXL autoencoders state both by channel."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    by_channel = (torch.tensor(values, device=vae.device).reshape(1, -1, 1, 1) for values in (mean, std))
    shift, spread = by_channel
    return shift, config.scaling_factor / spread
