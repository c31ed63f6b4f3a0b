"""How often each of a model's times is trained: the distribution in closed form, and diffusers' weights for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from singlora_diffusion import models
from singlora_diffusion.errors import UserError
from singlora_diffusion.models.family import noise_process
from singlora_diffusion.models.times import TimeSettings
from singlora_diffusion.settings import replaced
from singlora_diffusion.training.quantiles import Quantiles
from singlora_diffusion.training.recipe import OptimizationSettings, Recipe, check

COUNT = 200_000
EVEN = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
"""As many uniform numbers as evenly as can be: how often one falls into an interval is its length, to 1 / COUNT."""


def weights(strategy: str, multiplier: float, *, portion: float = 0.25, begin: int = 0, end: int = 1000) -> Tensor:
    """Probabilities of 1000 timesteps, as diffusers' SDXL script describes its flags."""
    found = torch.ones(1000, dtype=torch.float64)
    count = int(portion * 1000)
    part = {"earlier": slice(0, count), "later": slice(1000 - count, 1000), "range": slice(begin, end)}[strategy]
    found[part] *= multiplier
    return found


@pytest.mark.parametrize(
    ("strategy", "multiplier", "options"),
    [
        ("earlier", 3.0, {}),
        ("later", 0.5, {"portion": 0.4}),
        ("range", 10.0, {"begin": 200, "end": 201}),
        ("range", 2.0, {"begin": 0, "end": 300}),
    ],
)
@pytest.mark.parametrize(("low", "high"), [(0, 1000), (100, 260)])
def test_timesteps_come_as_often_as_diffusers_weights_say(
    strategy: str, multiplier: float, options: dict[str, Any], low: int, high: int, tiny_model: Path
) -> None:
    process = models.load(str(tiny_model)).noise_process
    named = {f"timestep_bias_{name}": value for name, value in options.items()}
    chosen = OptimizationSettings(
        timestep_bias_strategy=strategy,  # type: ignore[arg-type]
        timestep_bias_multiplier=multiplier,
        min_timestep=low,
        max_timestep=high,
        **named,
    )
    quantiles = Quantiles(process, chosen)(EVEN)
    assert torch.all(quantiles.diff() >= 0) and quantiles.min() >= 0 and quantiles.max() < 1
    expected = weights(strategy, multiplier, **options)
    expected[:low], expected[high:] = 0, 0
    found = process.times(quantiles).bincount(minlength=1000)
    assert (found - COUNT * expected / expected.sum()).abs().max() < 2  # of each timestep, both its ends


@pytest.mark.parametrize("scheme", ["none", "logit_normal"])
def test_noise_levels_of_flow_matching_too(scheme: str, tiny_sd3: Path) -> None:
    """The density of levels in the part is multiplied, whatever it was: m F / (m F + 1 - F)."""
    family = models.load(str(tiny_sd3))
    process = noise_process(family, TimeSettings(weighting_scheme=scheme), 64)  # type: ignore[arg-type]
    chosen = OptimizationSettings(
        timestep_bias_strategy="range", timestep_bias_multiplier=4.0, timestep_bias_begin=300, timestep_bias_end=600
    )

    def share(levels: Tensor) -> float:
        return float(((levels >= 0.3) & (levels < 0.6)).double().mean())

    before, after = share(process.times(EVEN)), share(process.times(Quantiles(process, chosen)(EVEN)))
    assert after == pytest.approx(4 * before / (4 * before + 1 - before), abs=4 / COUNT)  # two ends, twice


def test_without_a_bias_the_numbers_are_what_they_were(tiny_model: Path) -> None:
    process = models.load(str(tiny_model)).noise_process
    assert torch.equal(Quantiles(process, OptimizationSettings())(EVEN), EVEN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep_bias_multiplier": 2.0}, "--timestep_bias_multiplier: only with --timestep_bias_strategy earlier"),
        ({"timestep_bias_strategy": "later"}, "changes nothing without --timestep_bias_multiplier"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0, "timestep_bias_portion": 0.5},
            "--timestep_bias_portion: only with --timestep_bias_strategy earlier or later",
        ),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 500, "timestep_bias_end": 500},
            "--timestep_bias_begin 500: must be less than --timestep_bias_end 500",
        ),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(recipe: Recipe, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(replaced(recipe, **change))
