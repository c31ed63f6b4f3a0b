"""The stock pipelines of diffusers: built around a family's own parts, called with what the family likes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..randomness import seeded
from . import parts
from .family import Family, check_sides

EMBEDDINGS = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
"""The arguments of the stock pipelines that take encoded prompts, by the names of a conditioning's tensors."""


def pipeline(kind: Any, family: Any, scheduler: str | None, **others: Any) -> Any:
    """A stock pipeline without a progress bar, made of the parts that the family holds under the pipeline's own names.

    Args:
        kind: the pipeline's class.
        scheduler: by name; None keeps the model's own.
        others: arguments of the pipeline's constructor that are no parts of the family.

    Raises:
        UserError: no scheduler of that name.
    """
    wanted = inspect.signature(kind.__init__).parameters
    components = {name: getattr(family, name) for name in wanted if hasattr(family, name)}
    components["scheduler"] = parts.chosen_scheduler(family.scheduler, family.schedulers, scheduler)
    made = kind(**components, **others)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
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
    conditioning, negative = family.encode_prompts(prompts), family.encode_negative(negative_prompt)
    embeddings = {EMBEDDINGS[name]: tensor for name, tensor in conditioning.tensors.items()}
    if negative is not None:
        several = negative.select([0] * len(prompts))
        embeddings |= {f"negative_{EMBEDDINGS[name]}": tensor for name, tensor in several.tensors.items()}
    latents = family.pipeline(scheduler)(
        **embeddings,
        num_inference_steps=family.steps if steps is None else steps,
        guidance_scale=family.guidance if guidance is None else guidance,
        height=height,
        width=width,
        generator=[seeded(seed) for _, seed in zip(prompts, seeds, strict=True)],
        output_type="latent",
    ).images
    return family.decode(latents, height, width)
