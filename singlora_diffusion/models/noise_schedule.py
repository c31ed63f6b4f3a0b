"""Diffusion in discrete time: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (arXiv 2006.11239).

The a_t are the `alphas_cumprod` of a DDPMScheduler. Times are integer timesteps. What is predicted is the noise or,
where the schedule says so, the velocity sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from .. import settings
from ..errors import UserError
from .family import Corrupted
from .times import TimeSettings

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """A `family.NoiseProcess`."""

    scheduler: DDPMScheduler

    def with_times(self, chosen: TimeSettings, tokens: int) -> NoiseSchedule:
        if flags := [f"--{name}" for name in settings.changed(chosen)]:
            raise UserError(
                f"{', '.join(flags)}: for models that are trained by flow matching, and this one is a diffusion model: "
                f"leave it out"
            )
        return self

    def times(self, quantiles: Tensor) -> Tensor:
        """Uniform timesteps."""
        return (quantiles * self.scheduler.config.num_train_timesteps).long()

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Corrupted:
        target = self.scheduler.get_velocity(latents, noise, times) if self._velocity else noise
        return Corrupted(self.scheduler.add_noise(latents, noise, times), target)

    def recover(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        alphas = self._alphas(times).reshape(-1, 1, 1, 1)
        if self._velocity:
            return alphas.sqrt() * noisy - (1 - alphas).sqrt() * prediction
        return (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt()

    def loss_weights(self, times: Tensor, snr_gamma: float | None) -> Tensor | None:
        """min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity prediction (arXiv 2303.09556)."""
        if snr_gamma is None:
            return None
        alphas = self._alphas(times)
        snr = alphas / (1 - alphas)
        return snr.clamp(max=snr_gamma) / (snr + 1 if self._velocity else snr)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.prediction_type)

    @property
    def _velocity(self) -> bool:
        return self.prediction_type == "v_prediction"

    def _alphas(self, times: Tensor) -> Tensor:
        return self.scheduler.alphas_cumprod.to(times.device)[times]


def of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule that a model was trained with, from its sampling scheduler.

    Raises:
        ValueError: it was trained to predict something else.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"its scheduler's prediction_type is {kind!r}, which is none of {', '.join(PREDICTIONS)}")
    return NoiseSchedule(DDPMScheduler.from_config(scheduler.config))
