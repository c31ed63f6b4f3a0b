"""Noise levels and weights that a training may choose, held to diffusers' scripts and to its sampling schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from singlora_diffusion import models
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import flow_matching, times
from singlora_diffusion.models.family import Family, noise_process
from singlora_diffusion.models.times import TimeSettings
from singlora_diffusion.settings import parse, replaced
from singlora_diffusion.training.events import Step
from singlora_diffusion.training.loop import run
from singlora_diffusion.training.recipe import Recipe

COUNT = 1000
TABLE = torch.arange(1, COUNT + 1) / COUNT


@pytest.fixture(scope="module")
def one_flux(tiny_flux: Path) -> Family:
    return models.load(str(tiny_flux))


def drawn(scheme: str, **options: float | None) -> tuple[Tensor, Tensor]:
    """Levels that diffusers' scripts draw, and the uniform quantiles that are the same draws here."""
    count, mean, std = 500, options.get("logit_mean"), options.get("logit_std")
    u = compute_density_for_timestep_sampling(
        scheme, count, mean, std, options.get("mode_scale"), generator=torch.Generator().manual_seed(0)
    )
    levels = TABLE.flip(0)[(u * COUNT).long()]
    if scheme == "logit_normal":
        assert mean is not None and std is not None
        raw = torch.normal(mean, std, (count,), generator=torch.Generator().manual_seed(0)).double()
        return levels, torch.special.ndtr((mean - raw) / std)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    return levels, uniform if scheme == "mode" else 1 - uniform


@pytest.mark.parametrize(
    "options",
    [
        *[{"weighting_scheme": scheme} for scheme in ("none", "sigma_sqrt", "cosmap")],
        *[{"weighting_scheme": "mode", "mode_scale": scale} for scale in (1.29, -0.5)],
        *[{"weighting_scheme": "logit_normal", "logit_mean": m, "logit_std": s} for m, s in ((0.0, 1.0), (0.7, 1.5))],
    ],
    ids=str,
)
def test_schemes_of_diffusers_scripts(options: dict[str, Any], one_flux: Family) -> None:
    process = noise_process(one_flux, TimeSettings(**options), 512)
    theirs, quantiles = drawn(options["weighting_scheme"], **{k: v for k, v in options.items() if k[0] != "w"})
    ours = process.times(quantiles)
    # float32 draws there and float64 quantiles here may fall on both sides of an entry of the table.
    assert (ours - theirs).abs().max() <= 1.001 / COUNT
    weights = process.loss_weights(ours, None)
    wanted = compute_loss_weighting_for_sd3(options["weighting_scheme"], ours)
    torch.testing.assert_close(torch.ones_like(ours) if weights is None else weights, wanted)


def test_options_are_those_of_the_scripts_unless_given(one_flux: Family) -> None:
    quantiles = torch.linspace(0, 1 - 1e-9, 99, dtype=torch.float64)
    for scheme, usual in {"mode": {"mode_scale": 1.29}, "logit_normal": {"logit_mean": 0, "logit_std": 1}}.items():
        short, long = (
            noise_process(one_flux, TimeSettings(weighting_scheme=scheme, **given), 512)  # type: ignore[arg-type]
            for given in ({}, usual)
        )
        assert torch.equal(short.times(quantiles), long.times(quantiles))
    for scale in (-1, 1.75):  # the ends of its range: still a density, from the lowest level to the highest
        found = flow_matching.mode(quantiles, scale)
        assert (found.diff() >= 0).all() and found[0] == 0 and found[-1] > 0.99


def sampled(family: Any, mu: float | None) -> Tensor:
    """The whole table as sampling shifts it, ascending."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler.config)
    if mu is None:
        return scheduler.sigmas.flip(0)
    scheduler.set_timesteps(sigmas=TABLE.flip(0).tolist(), mu=mu)
    return scheduler.sigmas[:-1].flip(0)


@pytest.mark.parametrize("side", [512, 1024])
def test_auto_is_the_shift_that_the_model_samples_with(
    side: int, one_flux: Any, tiny_sd3: Path, tiny_flux2: Path
) -> None:
    klein: Any = models.load(str(tiny_flux2))
    families = [
        (one_flux, lambda tokens: calculate_shift(tokens, 256, 4096, 0.5, 1.15)),
        (klein, lambda tokens: compute_empirical_mu(tokens, 50)),
        (models.load(str(tiny_sd3)), lambda tokens: None),  # a static shift of 3
    ]
    for family, mu in families:
        found: Any = noise_process(family, TimeSettings("auto"), side)
        wanted = sampled(family, mu((side // family.multiple) ** 2))
        torch.testing.assert_close(found.levels, wanted, rtol=1e-5, atol=0)


def test_a_shift_stands_in_the_place_of_the_models_own(one_flux: Any, tiny_sd3: Path) -> None:
    for family in (one_flux, models.load(str(tiny_sd3))):
        plain: Any = noise_process(family, TimeSettings(1.0), 512)
        assert torch.equal(plain.levels, TABLE)
        thrice: Any = noise_process(family, TimeSettings(3.0), 512)
        torch.testing.assert_close(thrice.levels, 3 * TABLE / (1 + 2 * TABLE))
        kept: Any = noise_process(family, TimeSettings(), 512)
        assert kept is family.noise_process


@pytest.mark.parametrize("chosen", [TimeSettings("auto"), TimeSettings(2.0), TimeSettings(weighting_scheme="none")])
def test_diffusion_models_refuse_them_in_one_line(chosen: TimeSettings, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"^--(timestep_shift|weighting_scheme): .*diffusion model: leave it out$"):
        noise_process(models.load(str(tiny_model)), chosen, 512)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--logit_mean 1", "--logit_mean: only with --weighting_scheme logit_normal"),
        ("--weighting_scheme mode --logit_std 1", "--logit_std: only with --weighting_scheme logit_normal"),
        ("--weighting_scheme none --mode_scale 1", "--mode_scale: only with --weighting_scheme mode"),
    ],
)
def test_an_option_of_another_scheme_is_refused(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        times.check(parse(TimeSettings, words.split(), "", ""))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_shift_that_cannot_be_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="--timestep_shift"):
        parse(TimeSettings, ["--timestep_shift", value], "", "")
    assert parse(TimeSettings, ["--timestep_shift", "auto"], "", "").timestep_shift == "auto"
    assert parse(TimeSettings, ["--timestep_shift", "3"], "", "").timestep_shift == 3.0


def test_training_uses_what_is_chosen(one_flux: Family, recipe: Recipe, tmp_path: Path) -> None:
    def losses(**chosen: Any) -> list[float]:
        given = replaced(recipe, max_train_steps=1, output_dir=tmp_path / str(len(list(tmp_path.iterdir()))), **chosen)
        return [event.loss for event in run(given, family=one_flux) if isinstance(event, Step)]

    plain = losses()
    assert losses(weighting_scheme="none") == plain
    (changed,) = losses(timestep_shift="auto")
    (weighed,) = losses(weighting_scheme="sigma_sqrt")
    assert changed != plain[0] and weighed > plain[0]  # 1 / s^2 is at least 1
