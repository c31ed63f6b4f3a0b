"""Stable Diffusion XL: two text encoders, and a UNet that is told sizes and crops (arXiv 2307.01952)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..errors import UserError
from ..terminal import escaped
from . import autoencoder, network, noise_schedule, parts, stock
from .family import Conditioning, Geometry, Latents, NoiseProcess
from .network import Part
from .stable_diffusion import SCHEDULERS
from .stored import Stored

NETWORKS = {  # kohya's tools number the text encoders from 1
    "unet": Part(UNet2DConditionModel, network.unet, large=True),
    "text_encoder": Part(CLIPTextModel, partial(network.clip_text_encoder, prefix="lora_te1")),
    "text_encoder_2": Part(CLIPTextModelWithProjection, partial(network.clip_text_encoder, prefix="lora_te2")),
}


class StableDiffusionXL:
    """Stable Diffusion XL behind the contract of `family.Family`."""

    name = "stable_diffusion_xl"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: Any,
        *,
        force_zeros_for_empty_prompt: bool,
        origin: parts.Origin,
    ) -> None:
        self.unet, self.text_encoder, self.text_encoder_2, self.vae = unet, text_encoder, text_encoder_2, vae
        self.tokenizer, self.tokenizer_2, self.scheduler = tokenizer, tokenizer_2, scheduler
        self.schedulers: Mapping[str, Any] = SCHEDULERS
        self.noise_process: NoiseProcess = noise_schedule.of(scheduler)
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.source, self.fingerprint, self.vae_source = origin.source, origin.fingerprint, origin.vae_source
        self.vae_fingerprint, self.text_fingerprint = origin.vae_fingerprint, origin.text_fingerprint
        hints = origin.hints
        self.networks = network.specs_of(NETWORKS, self)
        downsampling = autoencoder.downsampling(vae)
        self.multiple = math.lcm(downsampling, 8)  # as the stock pipeline asks
        self.resolution = int(unet.config.sample_size) * downsampling
        self.largest: int | None = None
        self.device, self.dtype = unet.device, unet.dtype
        self.guidance = float(hints.get("guidance_scale", 5.0))  # the stock pipeline's
        self.steps = 30
        self.learning_rate = float(hints.get("learning_rate", 1e-4))  # diffusers' train_dreambooth_lora_sdxl.py
        self.prompt_set: str | None = hints.get("prompts")

    def encode_images(self, pixels: Tensor) -> Latents:
        return autoencoder.encode(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Differentiable, in the text encoders' dtype.

        `text`: (N, L, D1 + D2), the last hidden states but one of both encoders side by side, without a final norm.
        `pooled`: (N, P), the projected text of the second.
        """
        ids = parts.token_ids(self.tokenizer, prompts).to(self.device)
        ids_2 = parts.token_ids(self.tokenizer_2, prompts).to(self.device)
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Conditioning({"text": text, "pooled": second.text_embeds})

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """`sizes`: (N, 6), in the order of diffusers' train_dreambooth_lora_sdxl.py: original height and width, top and
        left of the crop, target height and width."""
        sizes = torch.cat([geometry.original, geometry.crop, geometry.target], dim=1)
        return Conditioning({**conditioning.tensors, "sizes": sizes.to(self.device)})

    def prompt_overflow(self, prompt: str) -> int:
        return max(parts.overflow(tokenizer, prompt) for tokenizer in (self.tokenizer, self.tokenizer_2))

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Without `sizes` in the conditioning the image counts as one that was not cropped, as in sampling."""
        sizes = conditioning.tensors.get("sizes")
        if sizes is None:
            height, width = (side * autoencoder.downsampling(self.vae) for side in noisy.shape[2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device).expand(len(noisy), 6)
        return self.unet(
            noisy.to(self.dtype),
            times,
            conditioning["text"].to(self.dtype),
            added_cond_kwargs={"text_embeds": conditioning["pooled"].to(self.dtype), "time_ids": sizes.to(self.dtype)},
        ).sample

    def pipeline(self, scheduler: str | None = None) -> StableDiffusionXLPipeline:
        """The autoencoder is in float32: with the others in half precision, ask it for `output_type="latent"`."""
        return stock.pipeline(StableDiffusionXLPipeline, self, scheduler, add_watermarker=False)

    def encode_negative(self, prompt: str) -> Conditioning:
        """Of an empty one: zeros where the model says so, else an encoded empty text."""
        encoded = self.encode_prompts([prompt])
        if prompt or not self.force_zeros_for_empty_prompt:
            return encoded
        return Conditioning({name: torch.zeros_like(tensor) for name, tensor in encoded.tensors.items()})

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        return autoencoder.decode(self.vae, latents)


def load(stored: Stored, dtype: str, device: str, quantization: str | None) -> StableDiffusionXL:
    """Load the parts, frozen; the autoencoder in float32, the rest in `dtype`.

    Raises:
        UserError: the refiner, which reads one text encoder and is told five numbers of another meaning.
    """
    index = parts.index(stored.path)
    if not parts.listed(index, "text_encoder"):
        raise UserError(
            f"{escaped(stored.shown, 1000)} is a Stable Diffusion XL refiner: adapters are for the base model"
        )
    with parts.loading(stored.shown, "Stable Diffusion XL"):
        networks = parts.networks(NETWORKS, stored, device, dtype, quantization)
        unet, projection = networks["unet"].config, networks["text_encoder_2"].config.projection_dim
        told = unet.projection_class_embeddings_input_dim or 0
        if told != 6 * (unet.addition_time_embed_dim or 0) + projection:
            raise ValueError(f"its UNet takes {told} numbers beside the text, not a pooled text and six sizes")
        return StableDiffusionXL(
            **networks,
            vae=parts.autoencoder(AutoencoderKL, stored, device),
            tokenizer=parts.tokenizer(CLIPTokenizer, stored.path / "tokenizer"),
            tokenizer_2=parts.tokenizer(CLIPTokenizer, stored.path / "tokenizer_2"),
            scheduler=parts.scheduler(stored.path / "scheduler"),
            force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
            origin=parts.origin(stored, "unet"),
        )
