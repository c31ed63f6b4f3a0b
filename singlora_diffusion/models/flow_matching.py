"""Flow matching: x_s = (1 - s) x0 + s noise, and what is predicted is noise - x0 (arXiv 2209.03003, 2403.03206).

Times are noise levels s in (0, 1]; a diffusers timestep is 1000 s. Sign and direction are those of diffusers'
train_dreambooth_lora_flux.py and train_dreambooth_lora_sd3.py; other families of that library differ in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..errors import UserError
from . import parts
from .family import Corrupted
from .times import AUTO, TimeSettings

Curve = Callable[[Tensor], Tensor]

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


def sampling_shift(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """The shift that the stock pipelines sample with: static, or growing with the number of an image's tokens."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Levels in (0, 1] towards 1, where the shift is greater than 1; 1 stays 1."""
    return shift * levels / (1 + (shift - 1) * levels)


def uniform(quantiles: Tensor) -> Tensor:
    """Uniform over the table of levels: the scripts' `--weighting_scheme none`."""
    return quantiles


def logit_normal(quantiles: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Uniform quantiles to those of the logistic of a normal variable: more in the middle, few at the ends.

    The scripts index a table that descends, so that their positive mean is less noise; hence the sign.
    """
    return (std * torch.special.ndtri(quantiles.double()) - mean).sigmoid().clamp(max=BELOW_ONE)


def mode(quantiles: Tensor, scale: float = 1.29) -> Tensor:
    """arXiv 2403.03206, equation 20: more in the middle; symmetric, so that the table's direction does not matter."""
    u = quantiles.double()
    return (u + scale * ((math.pi / 2 * u).cos().square() - 1 + u)).clamp(0, BELOW_ONE)


def sigma_sqrt(levels: Tensor) -> Tensor:
    """The scripts' weight 1 / s^2."""
    return levels**-2


def cosmap(levels: Tensor) -> Tensor:
    """arXiv 2403.03206, equation 21: the weight 2 / (pi (1 - 2 s + 2 s^2))."""
    return 2 / (math.pi * (1 - 2 * levels + 2 * levels**2))


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "none": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "sigma_sqrt": uniform,
    "cosmap": uniform,
}
"""Where in the table of levels examples are trained, by weighting scheme: uniform quantiles -> quantiles of it."""
WEIGHTS: dict[str, Curve] = {"sigma_sqrt": sigma_sqrt, "cosmap": cosmap}
"""How levels count in the loss, by weighting scheme; the others weigh all the same."""
BELOW_ONE = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class FlowMatching:
    """A `family.NoiseProcess`.

    Attributes:
        levels: of `levels`.
        density: a row of `DENSITIES`.
        sampling_shift: the shift that the model samples with, by the number of an image's tokens.
        weight: a row of `WEIGHTS`; None: all levels weigh the same.
    """

    levels: Tensor
    density: Curve
    sampling_shift: Callable[[int], float]
    weight: Curve | None = None

    @property
    def prediction_type(self) -> str:
        return "flow"

    def with_times(self, chosen: TimeSettings, tokens: int) -> FlowMatching:
        process, shift, scheme = self, chosen.timestep_shift, chosen.weighting_scheme
        if shift is not None:
            even = torch.arange(1, len(self.levels) + 1) / len(self.levels)
            factor = self.sampling_shift(tokens) if shift == AUTO else float(shift)
            process = replace(process, levels=shifted(even, factor))
        if scheme is not None:
            given = {"mean": chosen.logit_mean, "std": chosen.logit_std, "scale": chosen.mode_scale}
            options = {name: value for name, value in given.items() if value is not None}
            process = replace(process, density=partial(DENSITIES[scheme], **options), weight=WEIGHTS.get(scheme))
        return process

    def times(self, quantiles: Tensor) -> Tensor:
        """A small quantile is little noise."""
        return self.levels.to(quantiles.device)[(self.density(quantiles) * len(self.levels)).long()]

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
        return None if self.weight is None else self.weight(times)


def of(
    scheduler: FlowMatchEulerDiscreteScheduler,
    density: Curve = uniform,
    shift: Callable[[int], float] | None = None,
) -> FlowMatching:
    """The noise process that a model was trained with, from its sampling scheduler.

    Args:
        shift: the shift that the model samples with, by the number of tokens. None: `sampling_shift`.
    """
    return FlowMatching(levels(scheduler), density, shift or partial(sampling_shift, scheduler))
