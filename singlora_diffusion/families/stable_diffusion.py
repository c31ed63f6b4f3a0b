"""Stable Diffusion 1.x and 2.x, and anything else a stock StableDiffusionPipeline folder holds, toyworld included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError

SAMPLERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
BLOCK = 1 << 16


class StableDiffusion:
    """The frozen parts of one model and the verbs the trainer and the generator need of it.

    Attributes:
        networks: what can be adapted, by name: `unet`, `text_encoder`.
        source: what the user named. fingerprint: sha256 of the weights (`fingerprint`).
        resolution: native side in pixels.
    """

    name = "stable_diffusion"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler: object,
        *,
        source: str,
        fingerprint: str,
        hints: Mapping[str, Any] | None = None,
    ) -> None:
        self.unet, self.text_encoder, self.vae, self.tokenizer = unet, text_encoder, vae, tokenizer
        self.scheduler = scheduler
        self.noise_schedule = DDPMScheduler.from_config(scheduler.config)  # type: ignore[attr-defined]
        self.source, self.fingerprint = source, fingerprint
        self.networks: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
        self.downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = int(unet.config.sample_size) * self.downsampling
        self.device = next(unet.parameters()).device
        self.dtype = next(unet.parameters()).dtype
        # What a model's folder may say in singlora.json about how it likes to be used.
        self.guidance = float((hints or {}).get("guidance_scale", 7.5))
        self.prompts: str | None = (hints or {}).get("prompts")

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures (N, 3, H, W) in [-1, 1], both (N, C, h, w) float32.

        The autoencoder computes in float32, in which no known one overflows.
        """
        with torch.inference_mode():
            posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            scale = self.vae.config.scaling_factor
            return (posterior.mean - shift) * scale, posterior.std * scale

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Hidden states (N, L, D) of the text encoder's last layer, in its dtype; differentiable."""
        return self.text_encoder(self.tokenize(prompts)).last_hidden_state

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L) int64 on the model's device, cut at the encoder's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents at timesteps t (N,) and the answer wanted of the network: noise or velocity."""
        schedule = self.noise_schedule
        noisy = schedule.add_noise(x0, noise, t)
        kind = schedule.config.prediction_type
        target = schedule.get_velocity(x0, noise, t) if kind == "v_prediction" else noise
        return noisy, target

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio at timesteps t (N,), float32."""
        alphas = self.noise_schedule.alphas_cumprod.to(t.device)[t]
        return alphas / (1 - alphas)

    def predict(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The network's answer (N, C, h, w) to noisy latents, in its dtype."""
        return self.unet(noisy.to(self.dtype), t, text.to(self.dtype)).sample

    def pipeline(self, sampler: str | None = None) -> StableDiffusionPipeline:
        """A stock pipeline around the same modules; `sampler` None keeps the model's own scheduler."""
        scheduler = self.scheduler
        if sampler is not None:
            scheduler = SAMPLERS[sampler].from_config(self.scheduler.config)  # type: ignore[attr-defined]
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 25,
        guidance: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
    ) -> list[Image.Image]:
        """One picture per prompt and seed. Each has its own generator, so a picture does not depend on its batch."""
        pipe = self.pipeline(sampler)
        latents = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height or self.resolution,
            width=width or self.resolution,
            negative_prompt=[negative_prompt] * len(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        scale, shift = self.vae.config.scaling_factor, getattr(self.vae.config, "shift_factor", None) or 0.0
        # One at a time and in float32: full-size pictures do not fit otherwise, and half precision shows in flat areas.
        decoded = torch.cat([self.vae.decode(one[None].float() / scale + shift).sample for one in latents])
        pixels = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def fingerprint(path: Path) -> str:
    """sha256 of a model's UNet weight files: of size, head, tail and 64 blocks between, as gigabytes would take long."""
    digest = hashlib.sha256()
    for file in sorted((path / "unet").glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for k in range(66):
                stream.seek(k * max(size - BLOCK, 0) // 65)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def load(path: Path, source: str, dtype: str, device: str) -> StableDiffusion:
    """Load the parts from a diffusers folder, frozen; the autoencoder in float32, the rest in `dtype`."""
    where = {"local_files_only": True, "use_safetensors": True}
    files = {**where, "variant": _variant(path)}
    kind = getattr(torch, dtype)
    try:
        parts = dict(
            # At the wanted precision from the start: a full-size UNet in float32 first would take twice the memory.
            unet=UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=kind, **files),
            vae=AutoencoderKL.from_pretrained(path, subfolder="vae", torch_dtype=torch.float32, **files),
            text_encoder=CLIPTextModel.from_pretrained(path / "text_encoder", dtype=kind, **files),
            tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True),
            scheduler=_scheduler(path),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be loaded as a Stable Diffusion model: {reason}") from error
    for name in ("unet", "text_encoder", "vae"):
        parts[name].requires_grad_(False).eval().to(device)
    hints = path / "singlora.json"
    return StableDiffusion(
        **parts,
        source=source,
        fingerprint=fingerprint(path),
        hints=json.loads(hints.read_text()) if hints.is_file() else None,
    )


def _variant(path: Path) -> str | None:
    """`fp16` where only half-precision files are there."""
    files = [file.name for file in (path / "unet").glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def _scheduler(path: Path) -> object:
    import diffusers

    config = diffusers.DDIMScheduler.load_config(path, subfolder="scheduler", local_files_only=True)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None or not hasattr(kind, "add_noise"):
        kind = diffusers.DDIMScheduler
    return kind.from_config(config)
