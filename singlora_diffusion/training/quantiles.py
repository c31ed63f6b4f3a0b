"""Which of a model's times are trained, and which of them more often: uniform numbers -> quantiles of its times."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.family import NoiseProcess
from .recipe import OptimizationSettings


class Quantiles:
    """The map, piecewise linear and rising, so that what an example gets still follows from its position alone.

    Args:
        process: says what time a quantile has, and so where a share of the way from image to noise is reached.
        chosen: the range, and a part of it whose density is multiplied.
    """

    def __init__(self, process: NoiseProcess, chosen: OptimizationSettings) -> None:
        low, high = (quantile_of(process, step / 1000) for step in (chosen.min_timestep, chosen.max_timestep))
        self.low, self.high, self.times_as_often = low, high, chosen.timestep_bias_multiplier
        self.edges: Tensor | None = None
        if chosen.timestep_bias_strategy != "none":
            first, last = (quantile_of(process, step / 1000) for step in biased(chosen))
            edges = [low, min(max(first, low), high), min(max(last, low), high), high]
            self.edges = torch.tensor(edges, dtype=torch.float64)

    def __call__(self, uniform: Tensor) -> Tensor:
        """
        Args:
            uniform: (N,) float64 in [0, 1).

        Returns:
            (N,) float64 in [0, 1), for `NoiseProcess.times`.
        """
        if self.edges is None:
            return self.low + uniform * (self.high - self.low)
        density = torch.tensor([1.0, self.times_as_often, 1.0], dtype=torch.float64)
        mass = density * self.edges.diff()
        reached = mass.cumsum(0)
        drawn = uniform * reached[-1]
        piece = torch.bucketize(drawn, reached[:-1], right=True)
        into = drawn - (reached - mass)[piece]
        below = torch.nextafter(self.edges[-1], torch.zeros((), dtype=torch.float64))  # 1.0 is no quantile
        return (self.edges[piece] + into / density[piece]).clamp(max=below)


def biased(chosen: OptimizationSettings) -> tuple[int, int]:
    """From which of 1000 timesteps to before which the density is multiplied."""
    count = int(chosen.timestep_bias_portion * 1000)  # as diffusers' script rounds it
    return {
        "earlier": (0, count),
        "later": (1000 - count, 1000),
        "range": (chosen.timestep_bias_begin, chosen.timestep_bias_end),
    }[chosen.timestep_bias_strategy]


def quantile_of(process: NoiseProcess, share: float) -> float:
    """The lowest quantile whose time has gone this share of the way from image to noise; 0.0 and 1.0 are the ends.

    Times rise with their quantiles: a bisection, to the last bit of a float64.
    """
    if share in (0.0, 1.0):
        return share
    last = process.times(torch.tensor([1.0 - 2.0**-53], dtype=torch.float64))
    bound = share if last.is_floating_point() else share * (int(last) + 1)
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        reached = float(process.times(torch.tensor([middle], dtype=torch.float64))) >= bound
        low, high = (low, middle) if reached else (middle, high)
    return high
