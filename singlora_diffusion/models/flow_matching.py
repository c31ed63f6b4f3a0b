"""Flow matching: x_s = (1 - s) x0 + s noise, and what is predicted is noise - x0 (arXiv 2209.03003, 2403.03206).

Times are noise levels s in (0, 1]; a diffusers timestep is 1000 s. Sign and direction are those of diffusers'
train_dreambooth_lora_flux.py and train_dreambooth_lora_sd3.py; other families of that library differ in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def levels(scheduler: FlowMatchEulerDiscreteScheduler) -> Tensor:
    """The noise levels a model is trained at, ascending, (num_train_timesteps,) float32 in (0, 1].

    This is the table of a fresh scheduler, as in diffusers' scripts: a static shift (Stable Diffusion 3) is in it, a
    dynamic one (FLUX.1), which depends on the image's size, is left to sampling.
    """
    fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return fresh.sigmas[: fresh.config.num_train_timesteps].flip(0).clone()


def uniform(quantiles: Tensor) -> Tensor:
    """Uniform over the table of levels: the scripts' `--weighting_scheme none`."""
    return quantiles


def logit_normal(quantiles: Tensor) -> Tensor:
    """Uniform quantiles to those of the logistic of a standard normal variable: more in the middle, few at the ends."""
    return torch.special.ndtri(quantiles.double()).sigmoid().clamp(max=1 - 1e-9)


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """A `family.NoiseProcess`.

    Attributes:
        levels: of `levels`.
        density: where in the table examples are trained: uniform quantiles to quantiles of the table.
    """

    levels: Tensor
    density: Callable[[Tensor], Tensor]

    @property
    def prediction_type(self) -> str:
        return "flow"

    def times(self, quantiles: Tensor) -> Tensor:
        """A small quantile is little noise."""
        return self.levels.to(quantiles.device)[(self.density(quantiles) * len(self.levels)).long()]

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Corrupted:
        level = times.reshape(-1, 1, 1, 1)
        return Corrupted((1 - level) * latents + level * noise, noise - latents)

    def recover(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return noisy - times.reshape(-1, 1, 1, 1) * prediction

    def loss_weights(self, times: Tensor, snr_gamma: float | None) -> Tensor | None:
        """Every example weighs the same."""
        if snr_gamma is not None:
            raise UserError(
                "--snr_gamma is for diffusion models, and this one is trained by flow matching: leave it out"
            )
        return None


def of(scheduler: FlowMatchEulerDiscreteScheduler, density: Callable[[Tensor], Tensor] = uniform) -> FlowMatching:
    """The noise process that a model was trained with, from its sampling scheduler."""
    return FlowMatching(levels(scheduler), density)
