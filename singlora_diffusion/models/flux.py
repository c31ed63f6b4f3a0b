"""FLUX.1 (dev, schnell, Krea): a transformer over image patches and text, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ..errors import UserError
from . import autoencoder, flow_matching, network, parts, stock
from .family import Conditioning, Geometry, Latents, NoiseProcess
from .network import NetworkSpec, Part
from .stored import Stored


def transformer(name: str, module: nn.Module) -> NetworkSpec:
    """A diffusers FluxTransformer2DModel.

    `attention+mlp` are the targets of diffusers' train_dreambooth_lora_flux.py.
    """
    return NetworkSpec(
        name,
        module,
        "denoiser",
        network.JOINT_ATTENTION,
        presets={"attention": network.JOINT_ATTENTION, "attention+mlp": (*network.JOINT_ATTENTION, *network.JOINT_MLP)},
        prefixes={"kohya": "lora_unet"},
        sample_inputs=lambda: transformer_inputs(module),
    )


def transformer_inputs(module: nn.Module) -> dict[str, Any]:
    """A batch of two images of 2 x 3 patches with five tokens of text."""
    config: Any = module.config
    draw, device = network.normal(module), next(module.parameters()).device
    inputs: dict[str, Any] = {
        "hidden_states": draw(2, 6, config.in_channels),
        "encoder_hidden_states": draw(2, 5, config.joint_attention_dim),
        "pooled_projections": draw(2, config.pooled_projection_dim),
        "timestep": torch.tensor([0.3, 0.8], device=device),
        "img_ids": image_ids(2, 3).to(device),
        "txt_ids": torch.zeros(5, 3, device=device),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.ones(2, device=device)
    return inputs


NETWORKS = {  # kohya's tools call T5 the third text encoder in every family
    "transformer": Part(FluxTransformer2DModel, transformer, large=True),
    "text_encoder": Part(CLIPTextModel, partial(network.clip_text_encoder, prefix="lora_te1")),
    "text_encoder_2": Part(T5EncoderModel, partial(network.t5_encoder, prefix="lora_te3"), large=True),
}
PATCH = 2  # latents along a side of what the transformer sees as one token


class Flux:
    """FLUX.1 behind the contract of `family.Family`.

    Latents are (N, C, h, w) everywhere but inside the transformer, which sees patches of 2 x 2 as tokens (N, hw/4, 4C).
    A model that was distilled with guidance (dev, Krea) is told the guidance scale: 1.0 in training, as diffusers and
    kohya's sd-scripts recommend, `guidance` in sampling.
    """

    name = "flux"

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        tokenizer_2: T5TokenizerFast,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        origin: parts.Origin,
    ) -> None:
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2
        self.vae, self.tokenizer, self.tokenizer_2, self.scheduler = vae, tokenizer, tokenizer_2, scheduler
        self.schedulers: Mapping[str, Any] = flow_matching.SCHEDULERS
        self.noise_process: NoiseProcess = flow_matching.of(scheduler)
        self.source, self.fingerprint, self.vae_source = origin.source, origin.fingerprint, origin.vae_source
        self.vae_fingerprint, self.text_fingerprint = origin.vae_fingerprint, origin.text_fingerprint
        hints = origin.hints
        self.networks = network.specs_of(NETWORKS, self)
        self.multiple = PATCH * autoencoder.downsampling(vae)
        self.resolution = int(vae.config.sample_size)  # the transformer's own config names none
        self.largest: int | None = None
        self.device, self.dtype = transformer.device, transformer.dtype
        # As the model cards say: dev and Krea are told a guidance scale, schnell is not and needs few steps.
        self.guided = bool(transformer.config.guidance_embeds)
        self.guidance = float(hints.get("guidance_scale", 3.5 if self.guided else 0.0))
        self.steps = 28 if self.guided else 4
        self.prompt_length = min(tokenizer_2.model_max_length, 512 if self.guided else 256)
        self.learning_rate = float(hints.get("learning_rate", 1e-4))  # diffusers' script
        self.prompt_set: str | None = hints.get("prompts")

    def encode_images(self, pixels: Tensor) -> Latents:
        return autoencoder.encode(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`text`: (N, L, D), T5's last hidden states, padding included; `pooled`: (N, P) of CLIP; differentiable."""
        ids = parts.token_ids(self.tokenizer, prompts).to(self.device)
        ids_2 = parts.token_ids(self.tokenizer_2, prompts, self.prompt_length).to(self.device)
        text = self.text_encoder_2(ids_2).last_hidden_state
        return Conditioning({"text": text, "pooled": self.text_encoder(ids).pooler_output})

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """This family is told nothing of sizes and crops."""
        return conditioning

    def prompt_overflow(self, prompt: str) -> int:
        """Of T5, which reads the whole text; CLIP gives no more than a summary of the first 77 tokens."""
        return parts.overflow(self.tokenizer_2, prompt, self.prompt_length)

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[2:]
        text = conditioning["text"].to(self.dtype)
        prediction = self.transformer(
            hidden_states=pack(noisy).to(self.dtype),
            timestep=times,  # a noise level: diffusers' timestep / 1000
            guidance=torch.ones(len(noisy), device=noisy.device) if self.guided else None,
            pooled_projections=conditioning["pooled"].to(self.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=self.dtype),
            img_ids=image_ids(height // PATCH, width // PATCH).to(noisy.device, self.dtype),
        ).sample
        return unpack(prediction, height, width)

    def pipeline(self, scheduler: str | None = None) -> FluxPipeline:
        """The autoencoder is in float32: with the others in half precision, ask it for `output_type="latent"`."""
        return stock.pipeline(FluxPipeline, self, scheduler)

    def encode_negative(self, prompt: str) -> None:
        """
        Raises:
            UserError: there is one, which only guidance by two predictions could use.
        """
        if prompt:
            raise UserError(f"--negative_prompt: {self.source} is a FLUX.1 model, which takes none: leave it out")

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        downsampling = autoencoder.downsampling(self.vae)
        return autoencoder.decode(self.vae, unpack(latents, height // downsampling, width // downsampling))


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) to (N, hw/4, 4C): patches row by row, in each the channels first, then its rows and columns."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, to latents of this height and width."""
    maps = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return nn.functional.pixel_shuffle(maps, PATCH)


def image_ids(rows: int, columns: int) -> Tensor:
    """The place of each patch for the rotary embedding, (rows * columns, 3) float32: 0, row, column."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))


def load(stored: Stored, dtype: str, device: str, quantization: str | None) -> Flux:
    """Load the parts, frozen; the autoencoder in float32, the rest in `dtype`."""
    with parts.loading(stored.shown, "FLUX.1"):
        return Flux(
            **parts.networks(NETWORKS, stored, device, dtype, quantization),
            vae=parts.autoencoder(AutoencoderKL, stored, device),
            tokenizer=parts.tokenizer(CLIPTokenizer, stored.path / "tokenizer"),
            tokenizer_2=parts.tokenizer(T5TokenizerFast, stored.path / "tokenizer_2"),
            scheduler=flow_matching.scheduler(stored.path / "scheduler"),
            origin=parts.origin(stored, "transformer"),
        )
