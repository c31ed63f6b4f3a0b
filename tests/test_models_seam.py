"""The next family costs one file and one row: the loop, the adapters, the files and the sampling stay as they are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth
from singlora_diffusion import formats, models
from singlora_diffusion.models.family import Conditioning
from singlora_diffusion.models.stable_diffusion_xl import StableDiffusionXL
from singlora_diffusion.sampling.generate import generate
from singlora_diffusion.sampling.settings import (
    AdapterSettings,
    GenerateSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    SamplingSettings,
)
from singlora_diffusion.settings import parse, replaced
from singlora_diffusion.training.recipe import Recipe

LAYERS = {
    "tiny_sdxl": {"unet": 64, "text_encoder": 8, "text_encoder_2": 8},  # 8 transformer blocks of two attentions
    "tiny_sd3": {"transformer": 15, "text_encoder": 8, "text_encoder_2": 8},  # blocks of 8 and 7
    "tiny_flux": {"transformer": 11, "text_encoder": 8},  # a double block of 8, a single one of 3
    "tiny_flux2": {"transformer": 6},  # a double block of 4, a single one of 2, and no text encoder by default
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k, size in enumerate(((40, 56), (32, 32))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize("tiny", LAYERS)
def test_train_save_load_generate(tiny: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = str(request.getfixturevalue(tiny))
    run = tmp_path / "run"
    networks = models.meta_networks(base)
    flags = f"""
        --instance_data_dir {images} --output_dir {run} --pretrained_model_name_or_path {base} --device cpu
        --with_prior_preservation --num_class_images 2 --gradient_checkpointing
        --max_train_steps 2 --train_batch_size 2 --rank 2
        --validation_steps 2 --num_validation_images 1 --checkpointing_steps 1 --report_to none
    """
    text = ["--train_text_encoder"] if "text_encoder" in LAYERS[tiny] else []
    recipe = parse(Recipe, ["--instance_prompt", "a photo of sks dog", *text, *flags.split()], "train", "")
    path = train_dreambooth.main(recipe, hint=False)
    assert [file.suffix for file in (run / "previews").iterdir()] == [".png"]
    unbroken = load_file(path)
    shutil.rmtree(run / "checkpoint-2")
    resumed = load_file(train_dreambooth.main(replaced(recipe, resume_from_checkpoint="latest"), hint=False))
    assert unbroken.keys() == resumed.keys() and all(torch.equal(unbroken[key], resumed[key]) for key in resumed)

    family = models.load(base)
    header = formats.read_header(path)
    assert header.recipe["learning_rate"] == family.learning_rate == 1e-4  # that of diffusers' scripts
    assert (header.family, header.base_model, header.base_hash) == (family.name, base, family.fingerprint)
    adapter = formats.load(path, family.networks)
    found = Counter(layer.partition(".")[0] for layer in adapter.layers())
    assert dict(found) == LAYERS[tiny] and set(found) == {n for n, network in networks.items() if network.targets}
    adapted = np.asarray(models.sample(family, ["a photo of sks dog"], [0], steps=2)[0])
    adapter.detach()

    settings = GenerateSettings(
        OutputSettings(tmp_path / "images"),
        ModelSettings(device="cpu"),
        AdapterSettings((run,)),
        PromptSettings(prompt=("a photo of sks dog",)),
        SamplingSettings(seeds="0", num_inference_steps=2),
    )
    (record,) = generate(settings, quiet=True)
    made = np.asarray(Image.open(tmp_path / "images" / record["file"]))
    assert np.abs(made.astype(int) - adapted).max() <= 1


def test_sdxl_is_told_sizes_and_crops(
    tiny_sdxl: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example its own: of the image file, of the crop after scaling, and of the result."""
    told: set[tuple[int, ...]] = set()
    denoise = StableDiffusionXL.denoise

    def spy(family: StableDiffusionXL, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        told.update(map(tuple, conditioning["sizes"].tolist()))
        return denoise(family, noisy, times, conditioning)

    monkeypatch.setattr(StableDiffusionXL, "denoise", spy)
    flags = f"""
        --instance_data_dir {images} --output_dir {tmp_path} --pretrained_model_name_or_path {tiny_sdxl} --device cpu
        --max_train_steps 4 --validation_steps 0 --checkpointing_steps 0 --report_to none
    """
    recipe = parse(Recipe, ["--instance_prompt", "a photo of sks dog", *flags.split()], "train", "")
    train_dreambooth.main(recipe, hint=False)
    assert told == {(40, 56, 0, 6, 32, 32), (32, 32, 0, 0, 32, 32)}  # 40 x 56 becomes 32 x 45
