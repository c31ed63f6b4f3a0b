"""The packaged flow-matching model: small, stock, built on toyworld's own parts, and it draws what prompts say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from singlora_diffusion import models
from singlora_diffusion.models.hub import PACKAGED
from singlora_diffusion.toyworld import architecture, figures

FOLDER = PACKAGED["toyworld-flow"]


@pytest.fixture(scope="module")
def family() -> Any:
    return models.load("toyworld-flow")


def test_it_is_small_and_needs_no_unpickling() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    sizes = {path.parent.name: path.stat().st_size for path in files if path.suffix == ".safetensors"}
    assert sizes.keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert sizes["transformer"] < 8e6 and sum(path.stat().st_size for path in files) < 11.5e6


def test_it_says_how_it_likes_to_be_used(family: Any) -> None:
    said = (family.name, family.guidance, family.learning_rate, family.prompt_set)
    assert said == ("stable_diffusion_3", 3.0, 3e-3, "toyworld")
    assert family.resolution == architecture.RESOLUTION and family.largest == 2 * family.resolution
    text = family.encode_prompts(["a red dog"])["text"]
    assert text.shape == (1, architecture.CONTEXT, 2 * architecture.TEXT_WIDTH)  # no zeros in T5's place


def test_autoencoder_and_text_encoder_are_toyworlds(family: Any) -> None:
    toyworld = models.load("toyworld").pipeline()
    for mine, theirs in ((family.vae, toyworld.vae), (family.text_encoder.text_model, toyworld.text_encoder)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
    ids = torch.tensor(toyworld.tokenizer(["a red dog in the snow"], padding="max_length").input_ids)
    with torch.no_grad():
        pooled = [text_encoder(ids).text_embeds for text_encoder in (family.text_encoder, family.text_encoder_2)]
        hidden = toyworld.text_encoder(ids).pooler_output
    assert torch.equal(*pooled) and torch.equal(pooled[0], hidden)


def test_stock_diffusers_draws_the_same(family: Any) -> None:
    from diffusers import StableDiffusion3Pipeline

    stock = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32, local_files_only=True
    )
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    theirs = stock(
        "a red dog", num_inference_steps=4, guidance_scale=3.0, max_sequence_length=0, generator=generator
    ).images
    ours = models.sample(family, ["a red dog"], [5], steps=4)
    # Layers prepared for a CPU may add up in another order: one level of 255.
    assert np.abs(np.asarray(ours[0], dtype=int) - np.asarray(theirs[0], dtype=int)).max() <= 1


def test_prompts_are_followed() -> None:
    found = figures.prompt_following(16, guidance=3.0, seed=1, model="toyworld-flow")
    assert found["prompt following, class"] > 0.85
    assert found["prompt following, background"] > 0.9
    assert found["prompt following, colour"] > 0.85
