"""Validation in the middle of a training: the loss on held-out images, previews with fixed seeds, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import models
from ..data import png
from ..sampling import contact_sheet
from . import held_out, run_folder
from .recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image

    from ..data.latents import EncodedImage
    from ..models import Family
    from .step import Stepper

Scorer = Callable[[Sequence["Image.Image"], Sequence["Image.Image"]], Mapping[str, float]]
"""Previews, and the base model's images of the same prompt and seeds -> `dino`, `clip_t` and `drift`, as `events.Step`
has them."""

Scoring = Callable[[Sequence[Path], str, str], Scorer]
"""Makes a `Scorer` before anything is trained. Its arguments: files of real images of the subject, the previews' prompt
without the identifier, and what the user calls the base model."""


class Validated(NamedTuple):
    """What a validation found."""

    figures: dict[str, float]
    """By their names in `events.VALIDATED`, those that were asked for."""
    preview: Path


class Validation:
    """What is done every so many steps. Nothing is learned from it, and it depends on the weights alone.

    Args:
        prompt: what the previews show.
        resolution: their side in pixels.
        images: held-out images; None: there are none.
        scorer: of the previews; None: they are not scored.
    """

    def __init__(
        self,
        stepper: Stepper,
        recipe: Recipe,
        prompt: str,
        resolution: int,
        images: Sequence[EncodedImage] | None,
        scorer: Scorer | None,
    ) -> None:
        self.stepper, self.recipe, self.prompt, self.resolution = stepper, recipe, prompt, resolution
        self.images, self.scorer = images, scorer
        self.base: list[Image.Image] | None = None

    def after(self, step: int) -> Validated:
        """Validate the weights after a step.

        Raises:
            UserError: the preview cannot be written.
        """
        figures: dict[str, float] = {}
        if self.images is not None:
            size = self.recipe.optimization.train_batch_size
            figures["validation_loss"] = self.stepper.loss_on(
                held_out.batches(self.stepper.examples, self.images, size)
            )
        with self.stepper.in_use(), self.stepper.resting.interrupted():
            row = previews(self.stepper.family, self.recipe, self.prompt, self.resolution)
            if self.scorer is not None:
                figures |= self.scorer(row, self._of_base_model())
        return Validated(figures, write(row, self.recipe, self.prompt, step))

    def _of_base_model(self) -> list[Image.Image]:
        """The same previews without the adapter; they are made once."""
        if self.base is None:
            self.stepper.adapter.set_scale(0.0)
            try:
                self.base = previews(self.stepper.family, self.recipe, self.prompt, self.resolution)
            finally:
                self.stepper.adapter.set_scale(1.0)
        return self.base


def previews(family: Family, recipe: Recipe, prompt: str, resolution: int) -> list[Image.Image]:
    """An image for each seed from 0 on, of what the model makes of the prompt now."""
    seeds = range(recipe.validation.num_validation_images)
    row = []
    for start in range(0, len(seeds), recipe.prior.sample_batch_size):
        some = seeds[start : start + recipe.prior.sample_batch_size]
        row += models.sample(
            family, [prompt] * len(some), some, guidance=family.guidance, height=resolution, width=resolution
        )
    return row


def write(row: Sequence[Image.Image], recipe: Recipe, prompt: str, step: int) -> Path:
    """Put the previews of a step on a sheet; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    path = recipe.output.output_dir / run_folder.PREVIEWS / f"step-{step:06d}.png"
    seeds = [f"seed {seed}" for seed in range(len(row))]
    png.write(contact_sheet.grid([row], [prompt], seeds), path, prompt=prompt)
    return path
