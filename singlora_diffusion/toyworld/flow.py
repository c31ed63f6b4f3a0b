"""Stage 3: the joint-attention transformer, by flow matching, on the UNet's autoencoder and frozen text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..models import flow_matching
from . import architecture
from .fitting import fit, sheet


def pipeline(
    transformer: SD3Transformer2DModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusion3Pipeline:
    """A stock pipeline around the parts: toyworld's text encoder is its first and its second, and there is no T5."""
    vae.register_to_config(shift_factor=0.0)  # this pipeline computes with one, the other does without
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=architecture.flow_scheduler(),
        vae=vae,
        text_encoder=architecture.projected(text_encoder).to(vae.device).eval(),
        tokenizer=tokenizer,
        text_encoder_2=architecture.projected(text_encoder).to(vae.device).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(
    pipe: StableDiffusion3Pipeline,
    latents: Tensor,
    captions: list[list[str]],
    *,
    steps: int,
    batch: int,
    folder: Path,
    device: str,
    seed: int = 0,
) -> None:
    """Fit the pipeline's transformer to the velocity noise - x0; one caption in ten is empty.

    Times are those that the family trains adapters at.
    """
    model = pipe.transformer.to(device)
    process = flow_matching.of(pipe.scheduler, flow_matching.logit_normal)
    text, pooled, rows = _encoded(pipe, [["", *column] for column in zip(*captions, strict=True)])
    rows, empty = rows[:, 1:], rows[0, 0]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (batch,), generator=draw)
        said = rows[torch.randint(len(rows), (batch,), generator=draw), chosen]
        said[torch.rand(batch, generator=draw) < 0.1] = empty
        x0 = latents[chosen].float().to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        # One time from each of `batch` equal strata: the same mean with less variance between steps.
        times = process.times(((torch.arange(batch) + torch.rand(batch, generator=draw)) / batch).to(device))
        noisy, target = process.corrupt(x0, noise, times)
        # Unlike the UNet's convolutions, these matrices are faster in bfloat16 on a CPU that has it: 173 images a
        # second against 107 on one core.
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            answer = model(
                hidden_states=noisy,
                timestep=1000 * times,
                encoder_hidden_states=text[said].float().to(device),
                pooled_projections=pooled[said].float().to(device),
            ).sample
        return (answer.float() - target).square().mean(), {}

    def preview(module: SD3Transformer2DModel, step: int) -> None:
        images = pipe(
            [row[0] for row in captions[:24]],
            num_inference_steps=28,
            guidance_scale=3.0,
            max_sequence_length=0,
            generator=[torch.Generator().manual_seed(i) for i in range(24)],
        ).images
        sheet(images, folder / f"flow-{step:06d}.png")

    fit("flow", model, loss, steps=steps, lr=1.5e-3, folder=folder, ema=0.9993, preview=preview)


@torch.no_grad()
def _encoded(pipe: StableDiffusion3Pipeline, columns: list[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Different captions (M, 24, 224) and their pooled texts (M, 224), float16, and which caption stands where."""
    different = list(dict.fromkeys(caption for column in columns for caption in column))
    place = {caption: i for i, caption in enumerate(different)}
    text, pooled = [], []
    for start in range(0, len(different), 256):
        part = pipe.encode_prompt(
            different[start : start + 256], None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        text.append(part[0].half().cpu())
        pooled.append(part[2].half().cpu())
    rows = torch.tensor([[place[caption] for caption in column] for column in columns])
    return torch.cat(text), torch.cat(pooled), rows
