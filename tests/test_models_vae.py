"""Another autoencoder in place of the base model's own: loading it, training with it, and images made with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import original_checkpoints as original
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import make_tiny
from singlora_diffusion import formats, models, settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import autoencoder, parts
from singlora_diffusion.sampling.generate import generate
from singlora_diffusion.sampling.settings import GenerateSettings
from singlora_diffusion.training import loop
from singlora_diffusion.training.recipe import Recipe


@pytest.fixture(scope="module")
def vae() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make_tiny.autoencoder(scaling_factor=0.25).eval()


@pytest.fixture(scope="module")
def places(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder / "alone")
    vae.save_pretrained(folder / "model" / "vae")
    plain = {name.removeprefix("first_stage_model."): t for name, t in original.autoencoder(vae).items()}
    save_file(plain, folder / "plain.safetensors")
    save_file({**original.autoencoder(vae), "cond_stage_model.x": torch.zeros(1)}, folder / "whole.safetensors")
    names = ("alone", "model", "plain.safetensors", "whole.safetensors")
    return {name: folder / name for name in names}


@pytest.mark.numerical
@pytest.mark.parametrize("place", ["alone", "model", "plain.safetensors", "whole.safetensors"])
def test_it_is_loaded_from_wherever_it_is(place: str, places: dict[str, Path], vae: Any, tiny_model: Path) -> None:
    family = models.load(str(tiny_model), vae=str(places[place]))
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in family.vae.state_dict().items())
    own = models.load(str(tiny_model))
    assert (family.vae_source, own.vae_source) == (str(places[place]), None)
    assert family.fingerprint == own.fingerprint and family.vae_fingerprint != own.vae_fingerprint
    assert own.vae_fingerprint == parts.fingerprint([*(tiny_model / "vae").glob("*.safetensors")])
    # a folder has a scale of its own, a file that of the base model
    scale = own.vae.config.scaling_factor if place.endswith(".safetensors") else 0.25
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * scale
    torch.testing.assert_close(family.encode_images(pixels).mean, expected)
    assert autoencoder.downsampling(family.vae) == 4


def test_what_is_none(places: dict[str, Path], tiny_model: Path, tiny_flux: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(places["plain.safetensors"].read_bytes()[:5000])
    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "part.safetensors")
    make_tiny.autoencoder(latent_channels=8).save_pretrained(tmp_path / "wide")
    for named, message in (
        (tmp_path / "nowhere", "--pretrained_vae_model_name_or_path: no model at"),
        (tmp_path, "--pretrained_vae_model_name_or_path: .* holds no autoencoder"),
        (tmp_path / "cut.safetensors", "--pretrained_vae_model_name_or_path: .*is damaged"),
        (tmp_path / "part.safetensors", "lacks tensors of an autoencoder"),
        (tmp_path / "wide", "latents have 8 channels at 1/4 of a side, those of the base model 4 channels at 1/4"),
        (tiny_flux / "transformer", "cannot be loaded as a VAE model"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            models.load(str(tiny_model), vae=str(named))
        assert "\n" not in str(caught.value)


def test_images_are_made_with_what_was_trained_with(
    recipe: Recipe, places: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    named = str(places["alone"])
    recipe = settings.replaced(
        recipe, pretrained_vae_model_name_or_path=named, max_train_steps=1, resolution=32, checkpointing_steps=1
    )
    assert list(loop.run(recipe))
    out = recipe.output.output_dir
    assert json.loads((out / "recipe.json").read_text())["pretrained_vae_model_name_or_path"] == named
    assert formats.read_header(out).vae == named
    other = settings.replaced(
        recipe, pretrained_vae_model_name_or_path=None, max_train_steps=2, resume_from_checkpoint="latest"
    )
    with pytest.raises(UserError, match="--pretrained_vae_model_name_or_path"):
        list(loop.run(other))
    copied = shutil.copytree(named, tmp_path / "copied")  # another autoencoder under the name of the first
    recipe = settings.replaced(recipe, pretrained_vae_model_name_or_path=str(copied), output_dir=tmp_path / "changed")
    assert list(loop.run(recipe))
    make_tiny.autoencoder(scaling_factor=0.25).save_pretrained(copied)
    more = settings.replaced(recipe, max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="with another base model of that name"):
        list(loop.run(more))

    def made(folder: str, **more: Any) -> dict[str, Any]:
        asked = settings.build(
            GenerateSettings,
            output_dir=tmp_path / folder,
            prompt=("a photo of sks dog",),
            seeds="0",
            num_inference_steps=1,
            device="cpu",
            **more,
        )
        return generate(asked, quiet=True)[0]

    found = made("adapter", adapter=(out,))
    same = made("named", adapter=(out,), pretrained_model_name_or_path=str(tiny_model))
    base = models.load(str(tiny_model), vae=named)
    assert found["vae"] == same["vae"] == named and found["vae_hash"] == base.vae_fingerprint
    alone = made("base", pretrained_model_name_or_path=str(tiny_model), pretrained_vae_model_name_or_path=named)
    own = made("own", pretrained_model_name_or_path=str(tiny_model))
    assert (alone["vae_hash"], own["vae_hash"]) == (base.vae_fingerprint, None)
    files = {name: (tmp_path / name / "000-0.png").read_bytes() for name in ("adapter", "named", "base", "own")}
    assert files["adapter"] == files["named"] and files["base"] != files["own"]
    with pytest.raises(UserError, match="vae_hash"):
        made("own", pretrained_model_name_or_path=str(tiny_model), pretrained_vae_model_name_or_path=named)
