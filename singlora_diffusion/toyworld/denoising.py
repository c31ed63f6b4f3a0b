"""Stage 2: the UNet and the text encoder, trained together on latents and captions."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from . import architecture
from .fitting import fit, sheet


class TextToLatents(nn.Module):
    """The two networks that learn together, so that one loop holds, averages and saves both."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = architecture.unet()
        self.text_encoder = architecture.text_encoder(tokenizer)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """v for noisy latents (N, 8, 16, 16), timesteps (N,), token ids (N, 24)."""
        return self.unet(noisy, t, self.text_encoder(tokens).last_hidden_state).sample


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, 24) int64."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train(
    latents: Tensor,
    captions: list[list[str]],
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    *,
    steps: int,
    batch: int = 32,
    folder: Path,
    device: str,
    seed: int = 0,
) -> TextToLatents:
    """v-prediction, min-SNR weights (gamma 5; arXiv 2303.09556) plus one; one caption in ten is empty."""
    torch.manual_seed(seed)
    model = TextToLatents(tokenizer).to(device)
    noise_schedule = architecture.scheduler()
    alphas = noise_schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    # In terms of the clean latents the weight is min(SNR, 5) + 1: without the 1, the noisiest steps, where class and
    # colour are settled, count for next to nothing.
    weights = ((snr.clamp(max=5) + 1) / (snr + 1)).to(device)
    tokens = torch.stack([tokenize(tokenizer, list(column)) for column in zip(*captions, strict=True)], dim=1)
    empty = tokenize(tokenizer, [""])[0]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (batch,), generator=draw)
        which = torch.randint(tokens.shape[1], (batch,), generator=draw)
        ids = tokens[chosen, which]
        ids[torch.rand(batch, generator=draw) < 0.1] = empty
        x0 = latents[chosen].float().to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        # One timestep from each of `batch` equal strata: the same mean with less variance between steps.
        t = ((torch.arange(batch) + torch.rand(batch, generator=draw)) / batch * 1000).long().to(device)
        noisy = noise_schedule.add_noise(x0, noise, t)
        target = noise_schedule.get_velocity(x0, noise, t)
        # On a CPU without matrix units bfloat16 is the slower of the two: 0.75 s against 0.43 s for this step.
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            v = model(noisy, t, ids.to(device))
        error = (v.float() - target).square().mean(dim=(1, 2, 3))
        return (weights[t] * error).mean(), {}

    def preview(module: nn.Module, step: int) -> None:
        prompts = [row[0] for row in captions[:24]]
        images = pipeline(model, vae, tokenizer)(
            prompts,
            num_inference_steps=25,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        ).images
        sheet(images, folder / f"denoiser-{step:06d}.png")

    fit("denoiser", model, loss, steps=steps, lr=1.2e-3, folder=folder, ema=0.9993, preview=preview)
    return model


def pipeline(model: TextToLatents, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """A stock pipeline around the parts."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=architecture.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
