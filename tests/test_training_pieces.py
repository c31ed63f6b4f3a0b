"""What a step is made of: batches by position, the average of the weights, the base model as teacher, optimizers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import train_dreambooth
from singlora_diffusion import models
from singlora_diffusion.data import draws
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import averaging, compiling, loop, optimizers
from singlora_diffusion.training.quantiles import quantile_of
from singlora_diffusion.training.recipe import OptimizationSettings, Recipe, check


class Weights:
    """Stands for an adapter of one tensor."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(2)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"a": self.tensor}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor.copy_(state["a"])


def test_the_moving_average_is_the_closed_form() -> None:
    adapter: Any = Weights()
    average = averaging.Moving(adapter, 0.25)
    expected = 0.0
    for step in (1, 2, 3):
        adapter.tensor += 1
        average.follow(step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.weights()["a"], torch.full((2,), expected))
    with averaging.in_use(adapter, average):
        assert torch.equal(adapter.tensor, average.weights()["a"])
    assert adapter.tensor.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sd3"])
def test_a_range_of_timesteps_holds_and_is_used_to_its_ends(model: str, request: pytest.FixtureRequest) -> None:
    process = models.load(str(request.getfixturevalue(model))).noise_process
    low, high = quantile_of(process, 0.2), quantile_of(process, 0.7)
    times = process.times(low + torch.linspace(0, 1 - 1e-9, 20_001, dtype=torch.float64) * (high - low)).double()
    share = times if times.max() <= 1 else times / 1000
    assert 0.2 <= share.min() < 0.204 and 0.696 < share.max() <= 0.7
    assert (quantile_of(process, 0.0), quantile_of(process, 1.0)) == (0.0, 1.0)


def test_offset_noise_is_one_number_per_channel_and_changes_no_other_draw() -> None:
    drawn = draws.draw(3, range(5), (4, 8, 8))
    assert drawn.offset.shape == (5, 4, 1, 1) and drawn.noise.shape == (5, 4, 8, 8)
    assert len(set(drawn.offset.flatten().tolist())) == 20


def test_without_class_images_the_base_model_is_the_teacher(recipe: Recipe, tmp_path: Path) -> None:
    """Without weight it changes nothing, with much it holds the adapter back, and no images are made."""
    taught = replaced(recipe, with_prior_preservation=True, num_class_images=0, init="offset", ramp_steps=0)
    free = load_file(train_dreambooth.main(replaced(recipe, init="offset", ramp_steps=0)))
    light = load_file(train_dreambooth.main(replaced(taught, prior_loss_weight=0.0, output_dir=tmp_path / "light")))
    heavy = load_file(train_dreambooth.main(replaced(taught, prior_loss_weight=1e3, output_dir=tmp_path / "heavy")))
    for key, tensor in free.items():
        torch.testing.assert_close(light[key], tensor, atol=2e-5, rtol=1e-3)
    assert any(not torch.allclose(heavy[key], free[key], atol=1e-4) for key in free)
    assert not (tmp_path / "heavy" / "class_images").exists()


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_steps_or_names_what_to_install(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    groups = [{"params": [parameter], "lr": 1.0}]
    settings = OptimizationSettings(optimizer=name, learning_rate=1.0)
    package = optimizers.OPTIMIZERS[name].package
    if package and importlib.util.find_spec(package) is None:
        with pytest.raises(UserError, match=rf"--optimizer {name} needs {package}: pip install"):
            optimizers.make(groups, settings)
        return
    optimizer = optimizers.make(groups, settings)
    if package == "bitsandbytes" and not torch.cuda.is_available():
        return  # it steps on GPUs
    parameter.square().sum().backward()
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3, 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr_num_cycles": 2}, "only with --lr_scheduler cosine_with_restarts"),
        ({"lr_power": 2.0}, "only with --lr_scheduler polynomial"),
        ({"optimizer": "prodigy", "learning_rate": 1e-3}, "give --learning_rate 1"),
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "take constant"),
        ({"optimizer": "schedule_free", "ema_decay": 0.9}, "averages already"),
        ({"min_timestep": 500, "max_timestep": 500}, "must be less"),
        ({"ema_decay": 1.0}, "ema_decay"),
        (
            {"with_prior_preservation": True, "num_class_images": 0, "class_data_dir": Path("c")},
            "there are no class images",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_together_is_named(recipe: Recipe, change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(replaced(recipe, **change))


def test_compiled_blocks_train_the_same_weights_and_are_gone_afterwards(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the base model as teacher, a preview in between, and a ramp that moves."""
    with pytest.raises(UserError, match="--compile: pays on cuda only"):
        train_dreambooth.main(replaced(recipe, compile=True))
    monkeypatch.setitem(compiling.BACKENDS, "cpu", "eager")
    monkeypatch.setattr(UNet2DConditionModel, "_repeated_blocks", ["FeedForward"])
    family = models.load(recipe.model.pretrained_model_name_or_path)
    taught = replaced(recipe, with_prior_preservation=True, num_class_images=0, ramp_steps=3, max_train_steps=3)
    taught = replaced(taught, targets=("to_q", "ff.net.2"), num_validation_images=1)
    plain, made = replaced(taught, output_dir=tmp_path / "plain"), replaced(taught, compile=True, validation_steps=2)
    for one in (plain, made):
        list(loop.run(one, family=family))
    files = [load_file(one.output.output_dir / "adapter.safetensors") for one in (plain, made)]
    assert all(torch.equal(files[1][key], tensor) for key, tensor in files[0].items())
    assert all(module._compiled_call_impl is None for module in family.unet.modules())
