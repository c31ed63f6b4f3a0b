"""Metrics against hand-computed values: `pytest tests/test_metrics.py`."""

from __future__ import annotations

import numpy as np
import pytest

from eval.metrics import METRICS, diversity, mean_cosine, mean_over_prompts, paired_cosine, pairwise_cosine


def unit(*angles: float) -> np.ndarray:
    """Unit vectors in the plane, at these degrees."""
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_mean_cosine_is_over_all_references() -> None:
    scores = mean_cosine(unit(0, 90), unit(0, 60))
    assert scores.dtype == np.float64
    assert np.allclose(scores, [(1 + 0.5) / 2, (0 + 3**0.5 / 2) / 2], atol=1e-7)


def test_paired_cosine_is_with_the_own_text_only() -> None:
    assert np.allclose(paired_cosine(unit(0, 90), unit(60, 90)), [0.5, 1.0], atol=1e-7)
    with pytest.raises(ValueError):
        paired_cosine(unit(0, 90, 10), unit(60, 90))


def test_nothing_is_clamped_or_rescaled() -> None:
    assert np.allclose(paired_cosine(unit(0), unit(180)), [-1.0])
    assert np.allclose(mean_cosine(unit(0), unit(120)), [-0.5], atol=1e-7)


def test_an_image_is_never_paired_with_itself() -> None:
    mean = pairwise_cosine(unit(0, 60, 90))
    assert mean == pytest.approx((0.5 + 0.0 + 3**0.5 / 2) / 3, abs=1e-7)
    assert pairwise_cosine(unit(0, 90)) == pytest.approx(0.0, abs=1e-7)  # with self pairs it would be 0.5
    assert pairwise_cosine(unit(0)) is None


def test_every_prompt_counts_once() -> None:
    scores = np.array([1.0, 1.0, 1.0, 0.0])
    assert mean_over_prompts(scores, ["a", "a", "a", "b"]) == 0.5  # not 0.75
    assert mean_over_prompts(scores, [0, 1, 0, 1]) == 0.75
    assert mean_over_prompts(scores, [None] * 4) == 0.75
    with pytest.raises(ValueError):
        mean_over_prompts(scores, ["a"])
    with pytest.raises(ValueError):
        mean_over_prompts(np.array([]), [])


def test_means_are_in_double_precision() -> None:
    scores = np.full(100_000, np.float32(0.1), dtype=np.float32)
    assert mean_over_prompts(scores.astype(np.float64), [0] * 100_000) == pytest.approx(
        np.float64(np.float32(0.1)), rel=1e-12
    )


def test_scores_do_not_depend_on_the_order_of_images_or_references() -> None:
    rng = np.random.default_rng(0)
    images, references = (rng.normal(size=(n, 16)).astype(np.float32) for n in (7, 5))
    shuffled = mean_cosine(images[::-1], references[::-1])[::-1]
    assert np.allclose(shuffled, mean_cosine(images, references), atol=1e-5)


def test_diversity_is_within_prompts() -> None:
    images = unit(0, 60, 0, 90, 120, 77)
    prompts = ["a", "a", "b", "b", "b", "c"]  # c has one image: no pair
    b = 1 - (0.0 - 0.5 + 3**0.5 / 2) / 3
    assert diversity(images, prompts) == pytest.approx((0.5 + b) / 2, abs=1e-6)
    assert diversity(images, list(range(6))) is None


def test_the_table() -> None:
    default = [name for name, metric in METRICS.items() if not metric.on_request]
    assert default == ["clip_i", "dino", "clip_t", "clip_t_token"]
    assert list(METRICS) == [*default, "dinov2", "drift", "diversity"]
    images = unit(0, 30, 45)
    given = {"references": unit(0, 60), "prompt_groups": [1, 1, 2]}
    for metric in METRICS.values():
        found = metric.function(images, *(given.get(need, images) for need in metric.needs))
        assert isinstance(found, float) if metric.per == "set" else found.shape == (3,)
    assert METRICS["drift"].function(images, images) == pytest.approx(np.zeros(3), abs=1e-6)
