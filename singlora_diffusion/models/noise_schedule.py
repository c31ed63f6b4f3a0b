"""Diffusion in discrete time: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (arXiv 2006.11239).

The a_t are the `alphas_cumprod` of a DDPMScheduler. Times are integer timesteps. The answer wanted is the noise or,
where the schedule says so, the velocity sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512).
"""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from .family import Corrupted

PREDICTIONS = ("epsilon", "v_prediction")


def of(scheduler: Any) -> DDPMScheduler:
    """The noise schedule that a model was trained with, from its sampling scheduler.

    Raises:
        ValueError: it was trained to answer with something else.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"its scheduler's prediction_type is {kind!r}, which is none of {', '.join(PREDICTIONS)}")
    return DDPMScheduler.from_config(scheduler.config)


def times(schedule: DDPMScheduler, quantiles: Tensor) -> Tensor:
    """Uniform timesteps."""
    return (quantiles * schedule.config.num_train_timesteps).long()


def corrupt(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, times: Tensor) -> Corrupted:
    target = schedule.get_velocity(latents, noise, times) if _velocity(schedule) else noise
    return Corrupted(schedule.add_noise(latents, noise, times), target)


def recover(schedule: DDPMScheduler, noisy: Tensor, answer: Tensor, times: Tensor) -> Tensor:
    alphas = _alphas(schedule, times).reshape(-1, 1, 1, 1)
    if _velocity(schedule):
        return alphas.sqrt() * noisy - (1 - alphas).sqrt() * answer
    return (noisy - (1 - alphas).sqrt() * answer) / alphas.sqrt()


def min_snr(schedule: DDPMScheduler, times: Tensor, gamma: float | None) -> Tensor | None:
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity prediction (arXiv 2303.09556); None without gamma."""
    if gamma is None:
        return None
    alphas = _alphas(schedule, times)
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr + 1 if _velocity(schedule) else snr)


def _velocity(schedule: DDPMScheduler) -> bool:
    return bool(schedule.config.prediction_type == "v_prediction")


def _alphas(schedule: DDPMScheduler, times: Tensor) -> Tensor:
    return schedule.alphas_cumprod.to(times.device)[times]
