"""Complete models small enough for every test: random, 32 pixels, saved as diffusers saves real ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from benchmarks import make_tiny

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import nn

    from singlora_diffusion.training.recipe import Recipe

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: no test asks the network

settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")

MakeNetworks = Callable[..., dict[str, "nn.Module"]]


@pytest.fixture(scope="session")
def _pipeline() -> StableDiffusionPipeline:
    """Images (3, 32, 32), latents (4, 8, 8), noise-predicting, hidden states (24, 48).

    The UNet's 32 and 64 channels stand below and above the text's 48, so that self-attention has square weights and
    cross-attention wide (32, 48) and tall (64, 48) ones.
    """
    return make_tiny.build("stable_diffusion")


@pytest.fixture(scope="session")
def tiny_model(_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion, for reading only: a test that damages it damages a copy."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    _pipeline.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion XL, for reading only."""
    path = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    make_tiny.build("stable_diffusion_xl").save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion 3.5, for reading only."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd3"
    make_tiny.build("stable_diffusion_3").save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny FLUX.1 (dev), for reading only."""
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    make_tiny.build("flux").save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny FLUX.2 klein base, for reading only."""
    path = tmp_path_factory.mktemp("models") / "tiny-flux2"
    make_tiny.build("flux_2").save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def make_networks(_pipeline: StableDiffusionPipeline) -> MakeNetworks:
    """make_networks(dtype=None) -> {"unet": ..., "text_encoder": ...} of `tiny_model`, frozen, fresh at each call."""

    def make(dtype: object = None) -> dict[str, nn.Module]:
        parts = {"unet": _pipeline.unet, "text_encoder": _pipeline.text_encoder}
        fresh = {name: copy.deepcopy(part).requires_grad_(False).eval() for name, part in parts.items()}
        return fresh if dtype is None else {name: part.to(dtype) for name, part in fresh.items()}

    return make


@pytest.fixture
def networks(make_networks: MakeNetworks) -> dict[str, nn.Module]:
    """The tiny model's frozen UNet and text encoder in float32, fresh for each test."""
    return make_networks()


@pytest.fixture(scope="session")
def training_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images, for reading only."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.new("RGB", (40 + i, 36), (90 * i, 40, 200 - 60 * i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def recipe(tiny_model: Path, training_images: Path, tmp_path: Path) -> Recipe:
    """Four steps on the tiny model, with neither previews nor checkpoints nor curves, into `tmp_path / "run"`."""
    from singlora_diffusion.settings import build
    from singlora_diffusion.training.recipe import Recipe

    return build(
        Recipe,
        instance_data_dir=training_images,
        instance_prompt="a photo of sks dog",
        output_dir=tmp_path / "run",
        pretrained_model_name_or_path=str(tiny_model),
        max_train_steps=4,
        train_batch_size=2,
        rank=2,
        validation_steps=0,
        checkpointing_steps=0,
        report_to="none",
        portable=False,
        device="cpu",
    )
