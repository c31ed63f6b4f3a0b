"""Previews: a row of images with fixed seeds, of what has been learned so far."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .. import models
from ..data import png
from . import run_folder
from .recipe import Recipe

if TYPE_CHECKING:
    from ..models import Family


def preview(family: Family, recipe: Recipe, step: int, resolution: int) -> Path:
    """Write the preview of a step; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    from ..sampling import contact_sheet

    prompt = recipe.validation.validation_prompt or recipe.data.instance_prompt
    seeds = range(recipe.validation.num_validation_images)
    row = []
    for start in range(0, len(seeds), recipe.prior.sample_batch_size):
        some = seeds[start : start + recipe.prior.sample_batch_size]
        row += models.sample(
            family, [prompt] * len(some), some, guidance=family.guidance, height=resolution, width=resolution
        )
    path = recipe.output.output_dir / run_folder.PREVIEWS / f"step-{step:06d}.png"
    png.write(contact_sheet.grid([row], [prompt], [f"seed {seed}" for seed in seeds]), path, prompt=prompt)
    return path
