"""Stable Diffusion 1.x and 2.x, and anything else a stock StableDiffusionPipeline folder holds, toyworld included."""

from __future__ import annotations

import hashlib
import json
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
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UserError
from . import cpu_layers

SAMPLERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
PREDICTIONS = ("epsilon", "v_prediction")
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
        scheduler: Any,
        *,
        source: str,
        fingerprint: str,
        hints: Mapping[str, Any] | None = None,
    ) -> None:
        self.unet, self.text_encoder, self.vae, self.tokenizer = unet, text_encoder, vae, tokenizer
        self.scheduler = scheduler
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(f"its scheduler's prediction_type is {kind!r}, which is none of {', '.join(PREDICTIONS)}")
        self.noise_schedule = DDPMScheduler.from_config(scheduler.config)
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
        with torch.no_grad():
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
        """A stock pipeline around the same modules; `sampler` None keeps the model's own scheduler.

        The autoencoder is in float32: with the others in half precision, ask the pipeline for `output_type="latent"`.
        """
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
        steps: int = 25,
        guidance: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
    ) -> list[Image.Image]:
        """One picture per prompt and seed. Each has its own generator, so a picture does not depend on its batch.

        Raises:
            UserError: a side that the autoencoder and the network cannot halve evenly.
        """
        height, width = height or self.resolution, width or self.resolution
        if height % 8 or width % 8 or min(height, width) < 8:
            raise UserError(f"{width}x{height} pixels: both sides must be multiples of 8")
        pipe = self.pipeline(sampler)
        latents = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            negative_prompt=[negative_prompt] * len(prompts),
            generator=[torch.Generator().manual_seed(seed) for _, seed in zip(prompts, seeds, strict=True)],
            output_type="latent",
        ).images
        scale, shift = self.vae.config.scaling_factor, getattr(self.vae.config, "shift_factor", None) or 0.0
        # One at a time and in float32: full-size pictures do not fit otherwise, and half precision shows in flat areas.
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
    module.requires_grad_(False).eval().to(device)
    cpu_layers.prepare(module)
    return module


def _scheduler(folder: Path) -> Any:
    """The scheduler that the model names; DDIM where diffusers has none of that name or it adds no noise."""
    config = DDIMScheduler.load_config(folder, local_files_only=True)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    return kind.from_config(config) if hasattr(kind, "add_noise") else DDIMScheduler.from_config(config)
