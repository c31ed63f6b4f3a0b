"""A step whose numbers are not finite, and what to make of it."""

from __future__ import annotations

import math

from .recipe import Recipe


class NotFinite(Exception):
    """The loss or the gradient of a step is NaN or infinite. Nothing was changed by that step."""

    def __init__(self, step: int, loss: float, grad_norm: float) -> None:
        self.step = step
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {grad_norm}"
        super().__init__(f"step {step}: the {what}")


def cause(error: NotFinite, recipe: Recipe) -> str:
    """The most likely one, and what to do."""
    if recipe.model.mixed_precision == "fp16":
        return "fp16 overflows; --mixed_precision bf16 does not"
    if error.step == 1:
        return "the base model gives no finite numbers here; try --mixed_precision no, or another base model"
    return f"--learning_rate {recipe.optimization.learning_rate:g} is likely too high; try a third of it"
