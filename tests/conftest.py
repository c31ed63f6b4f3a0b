"""A complete Stable Diffusion small enough for every test: random, 32 pixels, saved as diffusers saves a real one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import nn

    from singlora_diffusion.training.recipe import Recipe

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: no test asks the network

settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")

WORDS = """a an photo picture of sks zwx dog cat toy bear teapot the in on with red blue green snow beach grass house"""

MakeNetworks = Callable[..., dict[str, "nn.Module"]]


def build_pipeline() -> StableDiffusionPipeline:
    """A random pipeline: pictures (3, 32, 32), latents (4, 8, 8), noise-predicting, hidden states (24, 48).

    The UNet's 32 and 64 channels stand below and above the text's 48, so that self-attention has square weights and
    cross-attention wide (32, 48) and tall (64, 48) ones.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from singlora_diffusion.toyworld.architecture import tokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tokenizer(WORDS.split())
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=48,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        return StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                norm_num_groups=8,
                mid_block_add_attention=False,
                sample_size=32,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=words,
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=48,
                attention_head_dim=4,
                norm_num_groups=8,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="session")
def _pipeline() -> StableDiffusionPipeline:
    return build_pipeline()


@pytest.fixture(scope="session")
def tiny_model(_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion, for reading only: a test that damages it damages a copy."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    _pipeline.save_pretrained(path, safe_serialization=True)
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
        device="cpu",
    )
