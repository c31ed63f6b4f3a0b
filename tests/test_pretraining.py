"""Toyworld's own training: exact to resume, and every stage runs from nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singlora_diffusion.toyworld import autoencoding, fitting, pretrain, world
from singlora_diffusion.toyworld.architecture import autoencoder, tokenizer


def test_the_rate_warms_up_stays_and_decays() -> None:
    rates = [fitting.rate(step, 1000, warmup=100, decay=0.3) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[99:700] == [1.0] * 601
    assert rates[850] == pytest.approx(0.5) and rates[1000] == 0


def test_a_resumed_fit_equals_an_unbroken_one(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            return model(x).square().mean(), {}

        fitting.fit("model", model, loss, steps=8, lr=1e-2, folder=folder, keep_every=0)
        return model

    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=5)
    again = run(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.numerical
def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = autoencoder().eval()
    images = world.batch(range(16))["images"]
    pixels = autoencoding.tensor(images)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        spread = (
            vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std(dim=(0, 2, 3))[:, None, None]
        )
        autoencoding.whiten(vae, images)
        latents = vae.encode(pixels).latent_dist
        after = vae.decode(latents.mean).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.mean.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.mean.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std, spread, atol=1e-2, rtol=2e-2)


def test_every_word_of_the_vocabulary_is_one_token_and_any_other_can_be_read() -> None:
    words = tokenizer(world.vocabulary())
    assert all(len(words.tokenize(word)) == 1 for word in world.vocabulary())
    ids = words("a zebra", padding="max_length").input_ids
    assert len(ids) == 24 and words.unk_token_id not in ids[1:4]
    assert ids.index(words.eos_token_id) == 1 + len(words.tokenize("a zebra"))


def test_every_stage_runs_from_nothing(tmp_path: Path) -> None:
    steps = [f"--{stage}_steps=2" for stage in ("autoencoder", "denoiser", "flow", "reader", "clip", "dino")]
    sizes = ["--images=120", "--subjects=60", "--batch=2", "--flow_batch=2", "--device=cpu"]
    folders = [f"--work_dir={tmp_path / 'work'}", f"--output_dir={tmp_path / 'weights'}"]
    pretrain.main([*steps, *sizes, *folders])
    weights = tmp_path / "weights"
    assert json.loads((weights / "pipeline" / "singlora.json").read_text())["prompts"] == "toyworld"

    from eval.encoders import encoder
    from singlora_diffusion import models

    for name in pretrain.HINTS:
        picture = models.sample(models.load(str(weights / name)), ["a red dog"], [0], steps=2)[0]
        assert picture.size == (64, 64)
    for role in ("clip", "dino"):
        made = encoder("toyworld", role, str(weights / role))  # type: ignore[arg-type]
        assert np.linalg.norm(made.images([picture]), axis=1) == pytest.approx(1, abs=1e-5)
