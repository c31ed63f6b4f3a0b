"""FLUX.2 klein (4B, 9B): a transformer over image patches and text, trained by flow matching; Qwen3 reads the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from ..errors import UserError
from . import autoencoder, flow_matching, network, parts, stock
from .family import Conditioning, Geometry, Latents, NoiseProcess
from .network import NetworkSpec, Part
from .stored import Stored

ATTENTION = (*network.ATTENTION, "to_qkv_mlp_proj", "attn.to_out")
"""The targets of diffusers' train_dreambooth_lora_flux2_klein.py: the image's side of the double blocks, and both
layers of the single blocks. The first of these computes q, k, v and the MLP's input at once and has one adapter."""
MLP = ("ff.linear_in", "ff.linear_out")
TEXT_LAYERS = (9, 18, 27)
"""The hidden states of Qwen3 that the transformer reads, side by side, as in the stock pipeline. The training script's
10, 20, 30 are those of FLUX.2 dev (https://github.com/huggingface/diffusers/issues/13445)."""
PROMPT_LENGTH = 512
"""Tokens of a prompt with its chat template: the stock pipeline's own."""
PATCH = 2  # latents along a side of what the transformer sees as one token


def transformer(name: str, module: nn.Module) -> NetworkSpec:
    """A diffusers Flux2Transformer2DModel."""
    return NetworkSpec(
        name,
        module,
        "denoiser",
        ATTENTION,
        presets={"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)},
        prefixes={"kohya": "lora_unet"},
        sample_inputs=lambda: transformer_inputs(module),
    )


def text_encoder(name: str, module: nn.Module) -> NetworkSpec:
    """A Qwen3ForCausalLM of transformers. No training script of diffusers adapts it, so its layers must be named."""
    return NetworkSpec(
        name,
        module,
        "text",
        targets=(),
        presets={"qwen3_attention": ("q_proj", "k_proj", "v_proj", "o_proj")},
        prefixes={"kohya": "lora_te"},
        sample_inputs=lambda: network.text_inputs(module),
    )


def transformer_inputs(module: nn.Module) -> dict[str, Any]:
    """A batch of two images of 2 x 3 patches with five tokens of text."""
    config: Any = module.config
    draw, device = network.normal(module), next(module.parameters()).device
    return {
        "hidden_states": draw(2, 6, config.in_channels),
        "encoder_hidden_states": draw(2, 5, config.joint_attention_dim),
        "timestep": torch.tensor([0.3, 0.8], device=device),
        "img_ids": image_ids(2, 3).to(device),
        "txt_ids": text_ids(5).to(device),
        **({"guidance": torch.ones(2, device=device)} if config.guidance_embeds else {}),
    }


NETWORKS = {
    "transformer": Part(Flux2Transformer2DModel, transformer, large=True),
    "text_encoder": Part(Qwen3ForCausalLM, text_encoder, large=True),
}


class Flux2Klein:
    """FLUX.2 klein behind the contract of `family.Family`.

    Latents are (N, 4C, h/2, w/2): patches of 2 x 2 of the autoencoder's latents, each channel normalized by the running
    mean and variance that the autoencoder keeps, as the stock pipeline does it. Times are uniform, as in diffusers'
    train_dreambooth_lora_flux2_klein.py, the loss is the velocity's. klein is told no guidance scale.
    The distilled models (klein without "base") sample in four steps without guidance; adapters are trained on the base.
    """

    name = "flux_2"

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        text_encoder: Qwen3ForCausalLM,
        vae: AutoencoderKLFlux2,
        tokenizer: Qwen2TokenizerFast,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        distilled: bool,
        origin: parts.Origin,
    ) -> None:
        self.transformer, self.text_encoder, self.vae = transformer, text_encoder, vae
        self.tokenizer, self.scheduler, self.distilled = tokenizer, scheduler, distilled
        self.schedulers: Mapping[str, Any] = flow_matching.SCHEDULERS
        self.noise_process: NoiseProcess = flow_matching.of(scheduler, shift=self._sampling_shift)
        self.source, self.fingerprint, self.vae_source = origin.source, origin.fingerprint, origin.vae_source
        self.vae_fingerprint, self.text_fingerprint = origin.vae_fingerprint, origin.text_fingerprint
        hints = origin.hints
        self.networks = network.specs_of(NETWORKS, self)
        self.multiple = PATCH * autoencoder.downsampling(vae)
        self.resolution = int(vae.config.sample_size)  # the transformer's own config names none
        self.largest: int | None = None
        self.device, self.dtype = transformer.device, transformer.dtype
        # As the model cards say: the base is guided, the distilled models are not and need few steps.
        self.guidance = float(hints.get("guidance_scale", 1.0 if distilled else 4.0))
        self.steps = 4 if distilled else 50
        self.prompt_length = min(PROMPT_LENGTH, tokenizer.model_max_length)
        self.learning_rate = float(hints.get("learning_rate", 1e-4))  # diffusers' script
        self.prompt_set: str | None = hints.get("prompts")

    def _sampling_shift(self, tokens: int) -> float:
        """The stock pipeline fits it to the number of tokens and of sampling steps."""
        return math.exp(compute_empirical_mu(tokens, self.steps))

    def encode_images(self, pixels: Tensor) -> Latents:
        """The mean alone, as the script and the stock pipeline take it."""
        with torch.no_grad():
            mean = self.vae.encode(pixels.to(self.vae.device, torch.float32)).latent_dist.mean
        centre, spread = self._normalization()
        mean = (nn.functional.pixel_unshuffle(mean, PATCH) - centre) / spread
        return Latents(mean, torch.zeros_like(mean))

    def _normalization(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the patches, (1, 4C, 1, 1)."""
        statistics: Any = self.vae.bn
        variance = statistics.running_var + self.vae.config.batch_norm_eps
        return statistics.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`text`: (N, L, 3 D), three hidden states of Qwen3 side by side, padding included; differentiable."""
        tokens = self.tokenizer(
            [self._chat(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.prompt_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # the next word is of no interest
        ).hidden_states
        return Conditioning({"text": torch.cat([states[layer] for layer in TEXT_LAYERS], dim=-1)})

    def _chat(self, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """This family is told nothing of sizes and crops."""
        return conditioning

    def prompt_overflow(self, prompt: str) -> int:
        """The chat template around the prompt counts too."""
        return parts.overflow(self.tokenizer, self._chat(prompt), self.prompt_length)

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[2:]
        text = conditioning["text"].to(self.dtype)
        prediction = self.transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=times,  # a noise level: diffusers' timestep / 1000
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=text_ids(text.shape[1]).to(noisy.device),
            img_ids=image_ids(height, width).to(noisy.device),
        ).sample
        return prediction.transpose(1, 2).unflatten(2, (height, width))

    def pipeline(self, scheduler: str | None = None) -> Flux2KleinPipeline:
        """The autoencoder is in float32: with the others in half precision, ask it for `output_type="latent"`."""
        return stock.pipeline(Flux2KleinPipeline, self, scheduler, is_distilled=self.distilled)

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """
        Raises:
            UserError: there is one for a distilled model, which is not guided.
        """
        if prompt and self.distilled:
            raise UserError(f"--negative_prompt: {self.source} is distilled and takes none: leave it out")
        return None if self.distilled else self.encode_prompts([prompt])

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """The stock pipeline has undone the patches and the normalization."""
        return autoencoder.to_images(self.vae, latents)


def image_ids(rows: int, columns: int) -> Tensor:
    """The place of each patch for the rotary embedding, (rows * columns, 4) int64: 0, row, column, 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.cartesian_prod(zero, torch.arange(rows), torch.arange(columns), zero)


def text_ids(length: int) -> Tensor:
    """The place of each token of text, (length, 4) int64: 0, 0, 0, its number."""
    ids = torch.zeros(length, 4, dtype=torch.int64)
    ids[:, 3] = torch.arange(length)
    return ids


def load(stored: Stored, dtype: str, device: str, quantization: str | None) -> Flux2Klein:
    """Load the parts, frozen; the autoencoder in float32, the rest in `dtype`."""
    index = parts.index(stored.path)
    with parts.loading(stored.shown, "FLUX.2 klein"):
        return Flux2Klein(
            **parts.networks(NETWORKS, stored, device, dtype, quantization),
            vae=parts.autoencoder(AutoencoderKLFlux2, stored, device),
            tokenizer=parts.tokenizer(Qwen2TokenizerFast, stored.path / "tokenizer"),
            scheduler=flow_matching.scheduler(stored.path / "scheduler"),
            distilled=bool(index.get("is_distilled", False)),
            origin=parts.origin(stored, "transformer"),
        )
