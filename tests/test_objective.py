"""The loss and the stream of random numbers behind it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from singlora_diffusion.data import draws
from singlora_diffusion.training import objective


def test_loss_is_the_mean_square_and_the_prior_adds_its_own() -> None:
    prediction, target = torch.zeros(3, 1, 2, 2), torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert objective.loss(prediction, target).item() == pytest.approx((1 + 4 + 9) / 3)
    assert objective.loss(prediction, target, prior=1, prior_weight=0.5).item() == pytest.approx((1 + 4) / 2 + 0.5 * 9)
    weights = torch.tensor([1.0, 0.0, 2.0])
    assert objective.loss(prediction, target, weights=weights).item() == pytest.approx((1 + 0 + 18) / 3)


def test_a_mask_makes_a_weighted_mean_of_each_example() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 3, 4, generator=generator)
    plain = objective.loss(prediction, target, prior=1, weights=torch.tensor([1.0, 3.0]))
    white = torch.ones(2, 1, 3, 4)
    assert torch.equal(objective.loss(prediction, target, prior=1, weights=torch.tensor([1.0, 3.0]), mask=white), plain)
    mask = torch.zeros(2, 1, 3, 4)
    mask[0, 0, 1, 2], mask[1] = 0.5, 1.0
    square = (prediction - target).square()
    expected = (square[0, :, 1, 2].mean() + square[1].mean()) / 2
    torch.testing.assert_close(objective.loss(prediction, target, mask=mask), expected)


def test_loss_takes_the_difference_in_float32() -> None:
    prediction = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    assert objective.loss(prediction, torch.full((1, 1, 1, 1), 1.001)).item() == pytest.approx(1e-6, rel=1e-3)


def test_an_examples_noise_depends_on_its_position_alone() -> None:
    whole = draws.draw(3, range(10, 16), (4, 2, 2))
    parts = [draws.draw(3, [position], (4, 2, 2)) for position in range(10, 16)]
    for field in draws.Draw._fields:
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    other = draws.draw(4, range(10, 16), (4, 2, 2))
    prior = draws.draw(3, range(10, 16), (4, 2, 2), draws.PRIOR)
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.noise, prior.noise)


def test_noise_is_standard_normal_and_timesteps_uniform() -> None:
    drawn = draws.draw(0, range(2000), (1, 4, 4))
    for noise in (drawn.noise, drawn.latent_noise):
        assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
    counts = torch.bincount((drawn.quantile * 10).long(), minlength=10)
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250
    assert 900 < drawn.flip.sum() < 1100


def test_every_epoch_shows_every_example_once_in_a_new_order() -> None:
    stream = draws.examples(0, range(35), [1] * 7)
    epochs = [stream[i : i + 7] for i in range(0, 35, 7)]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert draws.examples(0, [20], [1] * 7) == [stream[20]]
