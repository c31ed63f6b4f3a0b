"""Flow matching: x_s = (1 - s) x0 + s noise, and what is predicted is noise - x0 (arXiv 2209.03003, 2403.03206).

Times are noise levels s in (0, 1]; a diffusers timestep is 1000 s. Sign and direction are those of diffusers'
train_dreambooth_lora_flux.py and train_dreambooth_lora_sd3.py; other families of that library differ in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..errors import UserError
from . import parts
from .family import Corrupted

SCHEDULERS = {"euler": FlowMatchEulerDiscreteScheduler}


def scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a model's folder.

    Raises:
        ValueError: it is of another kind.
    """
    config = FlowMatchEulerDiscreteScheduler.load_config(parts.existing(folder), local_files_only=True)
    if config.get("_class_name") != FlowMatchEulerDiscreteScheduler.__name__:
        raise ValueError(f"its scheduler is a {config.get('_class_name')}, not a FlowMatchEulerDiscreteScheduler")
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def levels(scheduler: FlowMatchEulerDiscreteScheduler, shift: float | None = None) -> Tensor:
    """The noise levels a model is trained at, ascending, (num_train_timesteps,) float32 in (0, 1].

    Args:
        shift: s becomes shift s / (1 + (shift - 1) s); above 1, it is towards more noise. None: the scheduler's own.

    This is the table of a fresh scheduler, as in diffusers' scripts: a static shift (Stable Diffusion 3) is in it, a
    dynamic one (FLUX.1), which depends on the image's size, is left to sampling.
    """
    other = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **other)
    return fresh.sigmas[: fresh.config.num_train_timesteps].flip(0).clone()


def uniform(quantiles: Tensor) -> Tensor:
    """Uniform over the table of levels: the scripts' `--weighting_scheme none`."""
    return quantiles


def logit_normal(quantiles: Tensor) -> Tensor:
    """Uniform quantiles to those of the logistic of a standard normal variable: more in the middle, few at the ends."""
    return torch.special.ndtri(quantiles.double()).sigmoid().clamp(max=1 - 1e-9)


def mode(quantiles: Tensor) -> Tensor:
    """More in the middle, with the scale 1.29 (arXiv 2403.03206, section 3.1)."""
    return quantiles + 1.29 * ((math.pi / 2 * quantiles).cos().square() - 1 + quantiles)


def sigma_sqrt(levels: Tensor) -> Tensor:
    return levels.pow(-2)


def cosmap(levels: Tensor) -> Tensor:
    return 2 / (math.pi * (1 - 2 * levels + 2 * levels.square()))


class Weighting(NamedTuple):
    """How often noise levels are trained, and how much examples weigh."""

    density: Callable[[Tensor], Tensor] = uniform
    """Where in the table of levels examples are trained: uniform quantiles to quantiles of the table, rising."""
    weight: Callable[[Tensor], Tensor] | None = None
    """Noise levels to weights of the loss; None: all 1."""


WEIGHTINGS: Mapping[str, Weighting] = {
    "none": Weighting(),
    "logit_normal": Weighting(logit_normal),
    "mode": Weighting(mode),
    "sigma_sqrt": Weighting(weight=sigma_sqrt),
    "cosmap": Weighting(weight=cosmap),
}
"""By the names that `--weighting_scheme` takes, as in diffusers' scripts."""


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """A `family.NoiseProcess`.

    Attributes:
        scheduler: the model's own.
        levels: of `levels`.
        weighting: the one that the model was trained with, or another.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    levels: Tensor
    weighting: Weighting

    @property
    def prediction_type(self) -> str:
        return "flow"

    def times(self, quantiles: Tensor) -> Tensor:
        """A small quantile is little noise."""
        return self.levels.to(quantiles.device)[(self.weighting.density(quantiles) * len(self.levels)).long()]

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Corrupted:
        level = times.reshape(-1, 1, 1, 1)
        return Corrupted((1 - level) * latents + level * noise, noise - latents)

    def recover(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return noisy - times.reshape(-1, 1, 1, 1) * prediction

    def loss_weights(self, times: Tensor, snr_gamma: float | None) -> Tensor | None:
        if snr_gamma is not None:
            raise UserError(
                "--snr_gamma is for diffusion models, and this one is trained by flow matching: leave it out"
            )
        return None if self.weighting.weight is None else self.weighting.weight(times)

    def varied(self, weighting: str | None, shift: float | None) -> FlowMatching:
        chosen = self.weighting if weighting is None else WEIGHTINGS[weighting]
        return replace(self, levels=self.levels if shift is None else levels(self.scheduler, shift), weighting=chosen)


def of(scheduler: FlowMatchEulerDiscreteScheduler, weighting: str = "none") -> FlowMatching:
    """The noise process that a model was trained with, from its sampling scheduler."""
    return FlowMatching(scheduler, levels(scheduler), WEIGHTINGS[weighting])
