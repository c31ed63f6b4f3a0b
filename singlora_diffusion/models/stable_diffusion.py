"""Stable Diffusion 1.x and 2.x, and anything else a stock StableDiffusionPipeline folder holds, toyworld included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from . import autoencoder, network, noise_schedule, parts, single_file, stock
from .family import Conditioning, Geometry, Latents, NoiseProcess
from .network import Part
from .stored import Stored

NETWORKS = {
    "unet": Part(UNet2DConditionModel, network.unet, large=True),
    "text_encoder": Part(CLIPTextModel, network.clip_text_encoder),
}
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


class StableDiffusion:
    """Stable Diffusion behind the contract of `family.Family`."""

    name = "stable_diffusion"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        *,
        origin: parts.Origin,
    ) -> None:
        self.unet, self.text_encoder, self.vae, self.tokenizer = unet, text_encoder, vae, tokenizer
        self.scheduler = scheduler
        self.schedulers: Mapping[str, Any] = SCHEDULERS
        self.noise_process: NoiseProcess = noise_schedule.of(scheduler)
        self.source, self.fingerprint, self.vae_source = origin.source, origin.fingerprint, origin.vae_source
        self.vae_fingerprint, self.text_fingerprint = origin.vae_fingerprint, origin.text_fingerprint
        hints = origin.hints
        self.networks = network.specs_of(NETWORKS, self)
        downsampling = autoencoder.downsampling(vae)
        self.multiple = math.lcm(downsampling, 8)  # the stock pipeline asks for 8, whatever the autoencoder
        self.resolution = int(unet.config.sample_size) * downsampling
        self.largest: int | None = None
        self.device, self.dtype = unet.device, unet.dtype
        self.guidance = float(hints.get("guidance_scale", 7.5))
        self.steps = 25
        self.learning_rate = float(hints.get("learning_rate", 1e-3))  # arXiv 2507.05566, section 6.2
        self.prompt_set: str | None = hints.get("prompts")

    def encode_images(self, pixels: Tensor) -> Latents:
        return autoencoder.encode(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`text`: hidden states (N, L, D) of the text encoder's last layer, in its dtype; differentiable."""
        ids = parts.token_ids(self.tokenizer, prompts).to(self.device)
        return Conditioning({"text": self.text_encoder(ids).last_hidden_state})

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """This family is told nothing of sizes and crops."""
        return conditioning

    def prompt_overflow(self, prompt: str) -> int:
        return parts.overflow(self.tokenizer, prompt)

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(noisy.to(self.dtype), times, conditioning["text"].to(self.dtype)).sample

    def pipeline(self, scheduler: str | None = None) -> StableDiffusionPipeline:
        """The autoencoder is in float32: with the others in half precision, ask it for `output_type="latent"`."""
        return stock.pipeline(
            StableDiffusionPipeline,
            self,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def encode_negative(self, prompt: str) -> Conditioning:
        return self.encode_prompts([prompt])

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        return autoencoder.decode(self.vae, latents)


def load(stored: Stored, dtype: str, device: str, quantization: str | None) -> StableDiffusion:
    """Load the parts, frozen; the autoencoder in float32, the rest in `dtype`."""
    with parts.loading(stored.shown, "Stable Diffusion"):
        networks = parts.networks(NETWORKS, stored, device, dtype, quantization)
        return StableDiffusion(
            **networks,
            vae=parts.autoencoder(AutoencoderKL, stored, device),
            tokenizer=parts.tokenizer(CLIPTokenizer, stored.path / "tokenizer"),
            scheduler=single_file.asked(networks["unet"], parts.scheduler(stored.path / "scheduler")),
            origin=parts.origin(stored, "unet"),
        )
