"""Stable Diffusion 1.x and 2.x, and anything else a stock StableDiffusionPipeline folder holds, toyworld included."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
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
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError
from ..randomness import seeded
from . import cpu_layers, network
from .family import Conditioning, Corrupted, Geometry, Latents

SAMPLERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
PREDICTIONS = ("epsilon", "v_prediction")
BLOCK = 1 << 16


class StableDiffusion:
    """Stable Diffusion behind the contract of `family.Family`.

    Training times are integer timesteps, uniform over the noise schedule (Ho et al. 2020, arXiv 2006.11239); the answer
    wanted is the noise or, where the scheduler says so, the velocity (Salimans and Ho 2022, arXiv 2202.00512).
    """

    name = "stable_diffusion"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        *,
        source: str,
        fingerprint: str,
        hints: Mapping[str, Any] | None = None,
    ) -> None:
        self.unet, self.text_encoder, self.vae, self.tokenizer = unet, text_encoder, vae, tokenizer
        self.scheduler = scheduler
        self.samplers: Mapping[str, Any] = SAMPLERS
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(f"its scheduler's prediction_type is {kind!r}, which is none of {', '.join(PREDICTIONS)}")
        self.noise_schedule = DDPMScheduler.from_config(scheduler.config)
        self.source, self.fingerprint = source, fingerprint
        self.networks = {
            "unet": network.unet("unet", unet),
            "text_encoder": network.clip_text_encoder("text_encoder", text_encoder),
        }
        downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = math.lcm(downsampling, 8)  # the stock pipeline asks for 8, whatever the autoencoder
        self.resolution = int(unet.config.sample_size) * downsampling
        self.device = next(unet.parameters()).device
        self.dtype = next(unet.parameters()).dtype
        # What a model's folder may say in singlora.json about how it likes to be used.
        self.guidance = float((hints or {}).get("guidance_scale", 7.5))
        self.steps = 25
        self.prompts: str | None = (hints or {}).get("prompts")

    def encode_images(self, pixels: Tensor) -> Latents:
        """The autoencoder computes in float32, in which no known one overflows."""
        with torch.no_grad():
            posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            scale = self.vae.config.scaling_factor
            return Latents((posterior.mean - shift) * scale, posterior.std * scale)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`text`: hidden states (N, L, D) of the text encoder's last layer, in its dtype; differentiable."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return Conditioning({"text": self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state})

    def with_geometry(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """Nothing of sizes and crops is told to this family."""
        return conditioning

    def prompt_overflow(self, prompt: str) -> int:
        return max(0, len(self.tokenizer(prompt).input_ids) - self.tokenizer.model_max_length)

    def times(self, quantiles: Tensor) -> Tensor:
        """Integer timesteps, uniform."""
        return (quantiles * self.noise_schedule.config.num_train_timesteps).long()

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Corrupted:
        schedule = self.noise_schedule
        velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, times) if velocity else noise
        return Corrupted(schedule.add_noise(latents, noise, times), target)

    def recover(self, noisy: Tensor, answer: Tensor, times: Tensor) -> Tensor:
        alphas = self.noise_schedule.alphas_cumprod.to(times.device)[times].reshape(-1, 1, 1, 1)
        if self.noise_schedule.config.prediction_type == "v_prediction":
            return alphas.sqrt() * noisy - (1 - alphas).sqrt() * answer
        return (noisy - (1 - alphas).sqrt() * answer) / alphas.sqrt()

    def loss_weights(self, times: Tensor, snr_gamma: float | None) -> Tensor | None:
        """min-SNR: min(SNR, gamma) / SNR for noise and / (SNR + 1) for velocity prediction (arXiv 2303.09556)."""
        if snr_gamma is None:
            return None
        alphas = self.noise_schedule.alphas_cumprod.to(times.device)[times]
        snr = alphas / (1 - alphas)
        velocity = self.noise_schedule.config.prediction_type == "v_prediction"
        return snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)

    def denoise(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(noisy.to(self.dtype), times, conditioning["text"].to(self.dtype)).sample

    def pipeline(self, sampler: str | None = None) -> StableDiffusionPipeline:
        """The autoencoder is in float32: with the others in half precision, ask it for `output_type="latent"`."""
        scheduler = self.scheduler
        if sampler is not None:
            scheduler = SAMPLERS[sampler].from_config(self.scheduler.config)
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

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
    ) -> list[Image.Image]:
        """One image per prompt and seed, as `Family.sample` says; None: as the model likes it.

        Raises:
            UserError: a side that is not a multiple of `multiple`.
        """
        height, width = height or self.resolution, width or self.resolution
        if height % self.multiple or width % self.multiple or min(height, width) < self.multiple:
            raise UserError(f"{width}x{height} pixels: both sides must be multiples of {self.multiple}")
        pipe = self.pipeline(sampler)
        latents = pipe(
            list(prompts),
            num_inference_steps=self.steps if steps is None else steps,
            guidance_scale=self.guidance if guidance is None else guidance,
            height=height,
            width=width,
            negative_prompt=[negative_prompt] * len(prompts),
            generator=[seeded(seed) for _, seed in zip(prompts, seeds, strict=True)],
            output_type="latent",
        ).images
        scale, shift = self.vae.config.scaling_factor, getattr(self.vae.config, "shift_factor", None) or 0.0
        # One at a time and in float32: full-size images do not fit otherwise, and half precision shows in flat areas.
        decoded = torch.cat([self.vae.decode(one[None].float() / scale + shift).sample for one in latents])
        pixels = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 of weight files: of size, head, tail and 64 blocks between, as all of some gigabytes would take long."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for k in range(66):
                stream.seek(k * max(size - BLOCK, 0) // 65)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def load(path: Path, source: str, dtype: str, device: str) -> StableDiffusion:
    """Load the parts from a diffusers folder, frozen; the autoencoder in float32, the rest in `dtype`."""
    hints = path / "singlora.json"
    compute = getattr(torch, dtype)
    try:
        return StableDiffusion(
            unet=_part(UNet2DConditionModel, path / "unet", device, torch_dtype=compute),
            text_encoder=_part(CLIPTextModel, path / "text_encoder", device, dtype=compute),
            vae=_part(AutoencoderKL, path / "vae", device, torch_dtype=torch.float32),
            tokenizer=CLIPTokenizer.from_pretrained(_folder(path / "tokenizer"), local_files_only=True),
            scheduler=_scheduler(_folder(path / "scheduler")),
            source=source,
            fingerprint=fingerprint(weights(path / "unet")[0]),
            hints=json.loads(hints.read_text()) if hints.is_file() else None,
        )
    except Exception as error:  # damage shows in many ways, and each library has its own errors
        reason = " ".join(str(error).replace(f"{path}/", "").split())[:200]
        raise UserError(f"{path} cannot be loaded as a Stable Diffusion model: {reason}") from error


def weights(folder: Path) -> tuple[list[Path], str | None]:
    """The weight files of a part that are read, and their variant (`fp16`); None where there are files without one."""
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        variants.setdefault(file.stem.partition(".")[2].partition("-")[0], []).append(file)
    variant = "" if "" in variants else next(iter(variants), "")
    return variants.get(variant, []), variant or None


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"it has no folder {path.name}")
    return path


def _part(kind: Any, folder: Path, device: str, **precision: torch.dtype) -> Any:
    """One network, at its precision from the start: a full-size UNet in float32 first would take twice the memory."""
    files, variant = weights(_folder(folder))
    if not files:
        raise FileNotFoundError(f"{folder.name} has no .safetensors file, and pickled weights are not read")
    module, report = kind.from_pretrained(
        folder,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **precision,
    )
    missing = sorted(report["missing_keys"])
    if missing:  # the libraries would leave them random
        raise ValueError(f"{folder.name} lacks {len(missing)} tensors, {missing[0]} for one")
    return cpu_layers.prepare(module.requires_grad_(False).eval().to(device))


def _scheduler(folder: Path) -> Any:
    """The scheduler that the model names; DDIM where diffusers has none of that name or it adds no noise."""
    config = DDIMScheduler.load_config(folder, local_files_only=True)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    return kind.from_config(config) if hasattr(kind, "add_noise") else DDIMScheduler.from_config(config)
