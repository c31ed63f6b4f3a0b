"""The stock pipelines of diffusers: built around a family's own parts, called with what the family likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..randomness import seeded
from . import parts
from .family import Conditioning, Family, check_sides


def pipeline(kind: Any, family: Any, scheduler: str | None, **components: Any) -> Any:
    """A pipeline without a progress bar; `scheduler` None keeps the model's own.

    Raises:
        UserError: no scheduler of that name.
    """
    chosen = parts.chosen_scheduler(family.scheduler, family.schedulers, scheduler)
    made = kind(vae=family.vae, scheduler=chosen, **components)
    made.set_progress_bar_config(disable=True)
    return made


def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
) -> list[Image.Image]:
    """One image per prompt and seed. Each has its own generator, so it depends on its batch to rounding only.

    None stands for what the model likes: `family.steps`, `guidance`, `resolution`, its own scheduler.

    Raises:
        UserError: sides or a scheduler that the model does not know, a negative prompt where it takes none.
    """
    height, width = check_sides(family, height, width)
    with torch.no_grad():
        conditioning, negative = family.encode_prompts(prompts), family.encode_negative(negative_prompt)
    return sample_encoded(
        family,
        conditioning,
        negative,
        seeds,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        scheduler=scheduler,
    )


@torch.no_grad()
def sample_encoded(
    family: Family,
    conditioning: Conditioning,
    negative: Conditioning | None,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
) -> list[Image.Image]:
    """`sample` of prompts that are encoded already: no text encoder is called.

    Args:
        conditioning: of N prompts.
        negative: of one negative prompt, as `family.encode_negative` gives it.
        seeds: N of them.
    """
    height, width = check_sides(family, height, width)
    several = None if negative is None else negative.select([0] * len(conditioning))
    latents = family.pipeline(scheduler)(
        **family.embeddings(conditioning, several),
        num_inference_steps=family.steps if steps is None else steps,
        guidance_scale=family.guidance if guidance is None else guidance,
        height=height,
        width=width,
        generator=[seeded(seed) for _, seed in zip(range(len(conditioning)), seeds, strict=True)],
        output_type="latent",
    ).images
    return family.decode(latents, height, width)
