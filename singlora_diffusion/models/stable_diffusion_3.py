"""Stable Diffusion 3 and 3.5, medium and large: a transformer over image and text, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from . import autoencoder, flow_matching, network, parts, stock
from .family import Conditioning, Geometry, Latents, NoiseProcess
from .network import NetworkSpec, Part
from .stored import Stored


def transformer(name: str, module: nn.Module) -> NetworkSpec:
    """A diffusers SD3Transformer2DModel.

    `attention` are the targets of diffusers' train_dreambooth_lora_sd3.py. They leave out `attn2`, the second
    attention of some blocks of Stable Diffusion 3.5 medium; `attention+attn2` takes it in.
    """
    attention = tuple(f"attn.{projection}" for projection in network.JOINT_ATTENTION)
    return NetworkSpec(
        name,
        module,
        "denoiser",
        attention,
        presets={
            "attention": attention,
            "attention+attn2": network.JOINT_ATTENTION,
            "attention+mlp": (*attention, *network.JOINT_MLP),
        },
        prefixes={"kohya": "lora_unet"},
        sample_inputs=lambda: transformer_inputs(module),
    )


def transformer_inputs(module: nn.Module) -> dict[str, Any]:
    """A batch of two images of 2 x 3 patches with five tokens of text."""
    config: Any = module.config
    draw = network.normal(module)
    return {
        "hidden_states": draw(2, config.in_channels, 2 * config.patch_size, 3 * config.patch_size),
        "encoder_hidden_states": draw(2, 5, config.joint_attention_dim),
        "pooled_projections": draw(2, config.pooled_projection_dim),
        "timestep": torch.tensor([300.0, 800.0], device=next(module.parameters()).device),
    }


NETWORKS = {
    "transformer": Part(SD3Transformer2DModel, transformer, large=True),
    "text_encoder": Part(CLIPTextModelWithProjection, partial(network.clip_text_encoder, prefix="lora_te1")),
    "text_encoder_2": Part(CLIPTextModelWithProjection, partial(network.clip_text_encoder, prefix="lora_te2")),
    "text_encoder_3": Part(T5EncoderModel, partial(network.t5_encoder, prefix="lora_te3"), large=True),
}
T5_LENGTH = 256
"""Tokens of a prompt that T5 reads: the stock pipeline's own."""


class StableDiffusion3:
    """Stable Diffusion 3 behind the contract of `family.Family`.

    Times are logit-normal, of mean 0 and deviation 1, as in diffusers' train_dreambooth_lora_sd3.py. The loss is the
    velocity's; the script's default compares images, which weighs it by s^2 (--precondition_outputs).
    T5 may be absent, as the stock pipeline allows: zeros stand for its hidden states.
    """

    name = "stable_diffusion_3"

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5TokenizerFast | None = None,
        origin: parts.Origin,
    ) -> None:
        self.transformer, self.vae, self.scheduler = transformer, vae, scheduler
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = text_encoder, text_encoder_2, text_encoder_3
        self.tokenizer, self.tokenizer_2, self.tokenizer_3 = tokenizer, tokenizer_2, tokenizer_3
        self.schedulers: Mapping[str, Any] = flow_matching.SCHEDULERS
        self.noise_process: NoiseProcess = flow_matching.of(scheduler, flow_matching.logit_normal)
        self.source, self.fingerprint, self.vae_source = origin.source, origin.fingerprint, origin.vae_source
        self.vae_fingerprint, self.text_fingerprint = origin.vae_fingerprint, origin.text_fingerprint
        hints = origin.hints
        self.networks = network.specs_of(NETWORKS, self)
        downsampling = autoencoder.downsampling(vae)
        self.multiple = int(transformer.config.patch_size) * downsampling
        self.resolution = int(transformer.config.sample_size) * downsampling
        self.largest: int | None = int(transformer.config.pos_embed_max_size) * self.multiple  # positions learned
        self.device, self.dtype = transformer.device, transformer.dtype
        self.guidance, self.steps = float(hints.get("guidance_scale", 7.0)), 28  # the stock pipeline's
        length = int(hints.get("t5_length", T5_LENGTH))
        self.prompt_length = length if tokenizer_3 is None else min(length, tokenizer_3.model_max_length)
        self.learning_rate = float(hints.get("learning_rate", 1e-4))  # diffusers' script
        self.prompt_set: str | None = hints.get("prompts")

    def encode_images(self, pixels: Tensor) -> Latents:
        return autoencoder.encode(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Differentiable, in the text encoders' dtype.

        `text`: (N, L + L3, D): the last hidden states but one of both CLIPs side by side, filled up with zeros to T5's
        width, then T5's last ones, padding included. `pooled`: (N, P1 + P2), the projected texts of both CLIPs.
        """
        ids = parts.token_ids(self.tokenizer, prompts).to(self.device)
        ids_2 = parts.token_ids(self.tokenizer_2, prompts).to(self.device)
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(len(clip), self.prompt_length, self.transformer.config.joint_attention_dim)
        else:
            ids_3 = parts.token_ids(self.tokenizer_3, prompts, self.prompt_length).to(self.device)
            t5 = self.text_encoder_3(ids_3).last_hidden_state
        clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return Conditioning({"text": torch.cat([clip, t5], dim=1), "pooled": pooled})

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """This family is told nothing of sizes and crops."""
        return conditioning

    def prompt_overflow(self, prompt: str) -> int:
        """Of T5, which reads the whole text, or of CLIP where there is no T5."""
        if self.tokenizer_3 is None:
            return parts.overflow(self.tokenizer, prompt)
        return parts.overflow(self.tokenizer_3, prompt, self.prompt_length)

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=1000 * times,
            encoder_hidden_states=conditioning["text"].to(self.dtype),
            pooled_projections=conditioning["pooled"].to(self.dtype),
        ).sample

    def pipeline(self, scheduler: str | None = None) -> StableDiffusion3Pipeline:
        """The autoencoder is in float32: with the others in half precision, ask it for `output_type="latent"`."""
        return stock.pipeline(StableDiffusion3Pipeline, self, scheduler)

    def encode_negative(self, prompt: str) -> Conditioning:
        return self.encode_prompts([prompt])

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        return autoencoder.decode(self.vae, latents)


def load(stored: Stored, dtype: str, device: str, quantization: str | None) -> StableDiffusion3:
    """Load the parts, frozen; the autoencoder in float32, the rest in `dtype`."""
    index = parts.index(stored.path)
    with parts.loading(stored.shown, "Stable Diffusion 3"):
        optional = {}
        if parts.listed(index, "tokenizer_3"):
            optional["tokenizer_3"] = parts.tokenizer(T5TokenizerFast, stored.path / "tokenizer_3")
        return StableDiffusion3(
            **parts.networks(NETWORKS, stored, device, dtype, quantization),
            **optional,
            vae=parts.autoencoder(AutoencoderKL, stored, device),
            tokenizer=parts.tokenizer(CLIPTokenizer, stored.path / "tokenizer"),
            tokenizer_2=parts.tokenizer(CLIPTokenizer, stored.path / "tokenizer_2"),
            scheduler=flow_matching.scheduler(stored.path / "scheduler"),
            origin=parts.origin(stored, "transformer"),
        )
