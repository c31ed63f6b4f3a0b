"""Stage 1: the autoencoder, and the latents of all images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from . import architecture
from .fitting import fit


def tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train(images: np.ndarray, *, steps: int, folder: Path, device: str, seed: int = 0) -> AutoencoderKL:
    """Fit the autoencoder on crops (the first 70 % of the steps) and then on whole images.

    Crops of 32 pixels buy four times the steps for the same arithmetic, and early training is short of steps, not of
    images. Loss: L1 + 5 L2 + 1e-3 KL per latent number.
    """
    vae = architecture.autoencoder().to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((seed, step))
        cropped = step < 0.7 * steps
        chosen = images[np.sort(rng.choice(len(images), 16 if cropped else 6, replace=False))]
        if cropped:
            y, x = rng.integers(0, 33, size=2)
            chosen = chosen[:, y : y + 32, x : x + 32]
        pixels = tensor(chosen).to(device)
        noise = torch.Generator(device).manual_seed(step)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(noise)).sample
        error = decoded.float() - pixels
        kl = posterior.kl().mean() / (posterior.mean[0].numel())
        square = error.square().mean()
        psnr = -10 * torch.log10(square.detach() / 4)
        return error.abs().mean() + 5 * square + 1e-3 * kl, {"psnr": psnr.item(), "kl": kl.item()}

    def preview(module: nn.Module, step: int) -> None:
        pixels = tensor(images[:16]).to(device)
        with torch.inference_mode():
            decoded = vae(pixels).sample
        rows = torch.cat([pixels, decoded]).clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).cpu().numpy()
        grid = rows.reshape(4, 8, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(256, 512, 3)
        Image.fromarray(grid).resize((1024, 512), Image.Resampling.NEAREST).save(folder / "autoencoder.png")

    fit("autoencoder", vae, loss, steps=steps, lr=2e-3, folder=folder, ema=0.998, weight_decay=0.0, preview=preview)
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior means of all images, (N, 8, 16, 16) float16, on the CPU."""
    chunks = []
    for start in range(0, len(images), 64):
        with torch.autocast(vae.device.type, torch.bfloat16):
            mean = vae.encode(tensor(images[start : start + 64]).to(vae.device)).latent_dist.mean
        chunks.append(mean.to(torch.float16).cpu())
    return torch.cat(chunks).contiguous()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold a shift and scale per channel into the two 1x1 convolutions, so that latents have mean 0 and variance 1."""
    latents = encode(vae, images).float()
    mean, std = latents.mean(dim=(0, 2, 3)).to(vae.device), latents.std(dim=(0, 2, 3)).to(vae.device)
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and post is not None
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the other half is the log-variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.inference_mode()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean over images of the PSNR in dB of decode(encode(image)), on the 8-bit images a user gets."""
    values = []
    for start in range(0, len(images), 64):
        pixels = tensor(images[start : start + 64]).to(vae.device)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        decoded = decoded.add(1).mul(127.5).round().div(127.5).sub(1)
        error = (decoded - pixels).square().mean(dim=(1, 2, 3)) / 4
        values.append(-10 * torch.log10(error.clamp_min(1e-10)))
    return torch.cat(values).mean().item()
