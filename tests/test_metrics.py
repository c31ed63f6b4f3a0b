"""Metrics against hand-computed values: `pytest tests/test_metrics.py`."""

from __future__ import annotations

import numpy as np
import pytest

from eval.memorising import copied, gap, nearest
from eval.metrics import (
    METRICS,
    direction,
    diversity,
    mean_cosine,
    mean_over_prompts,
    paired_cosine,
    pairwise_cosine,
    prior_drift,
    prior_likeness,
)
from eval.retrieval import Gallery, average_precision, rank_one


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
    more = ["drift", "diversity", "prior_likeness", "prior_drift", "rank_one", "average_precision", "direction"]
    assert list(METRICS) == [*default, "clipscore", "dinov2", "masked_dino", *more, "nearest", "copied", "gap"]
    images = unit(0, 30, 45)
    gallery = Gallery(unit(0, 60), np.array([True, False]))
    given = {"references": unit(0, 60), "prompt_groups": [1, 1, 2], "gallery": gallery}
    for metric in METRICS.values():
        found = metric.function(images, *(given.get(need, images) for need in metric.needs))
        assert isinstance(found, float) if metric.per == "set" else found.shape == (3,)
    assert METRICS["drift"].function(images, images) == pytest.approx(np.zeros(3), abs=1e-6)


# --- retrieval, memorising, prior ------------------------------------------------------------------------------------


def test_retrieval_by_hand() -> None:
    gallery = Gallery(unit(0, 30, 90), np.array([False, True, True]))
    assert rank_one(unit(0, 60.5, 29), gallery).tolist() == [0, 1, 1]
    # ranks of the subject's two images: 2 and 3; 1 and 2 (60.5 is nearer to 90 than to 30); 1 and 3
    assert np.allclose(average_precision(unit(0, 60.5, 14), gallery), [(1 / 2 + 2 / 3) / 2, 1, (1 / 2 + 2 / 3) / 2])
    assert np.allclose(average_precision(unit(29), gallery), [(1 + 2 / 3) / 2])


def test_average_precision_is_the_mean_precision_at_each_hit() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = np.arange(20) < 6
    for image, found in zip(vectors[20:], average_precision(vectors[20:], Gallery(vectors[:20], own)), strict=True):
        scores = vectors[:20] @ image
        at = [np.mean(own[scores >= scores[place]]) for place in np.flatnonzero(own)]  # precision at each hit's score
        assert found == pytest.approx(np.mean(at))


def test_copies_are_nearer_than_training_images_are_to_each_other() -> None:
    training = unit(0, 60, 120)  # cosines 0.5, 0.5 and -0.5
    assert np.allclose(nearest(unit(10, 200), training), np.cos(np.deg2rad([10, 80])), atol=1e-6)
    assert copied(unit(10, 59, 200, 30), training).tolist() == [1, 1, 0, 1]
    assert copied(unit(0), training[:1]).tolist() == [0]


def test_gap_is_what_the_training_images_are_ahead() -> None:
    assert np.allclose(gap(unit(0), unit(60), unit(0, 90)), [0.5 - 0.5], atol=1e-6)
    assert np.allclose(gap(unit(0), unit(90), unit(0)), [1.0], atol=1e-6)


def test_directional_clip_by_hand() -> None:
    images, references = unit(90, 0), unit(0)
    right = direction(images, references, unit(90, 90), unit(0, 0))
    assert np.allclose(right, [1.0, 0.0], atol=1e-6)  # an image that did not change has no direction
    assert np.allclose(direction(images, references, unit(0, 0), unit(90, 90))[0], -1.0, atol=1e-6)


def test_prior_scores_do_not_look_at_the_scored_images() -> None:
    prior, references = unit(0, 90), unit(60)
    expected = (0.5 + 3**0.5 / 2) / 2
    assert prior_likeness(unit(17), prior, references) == pytest.approx(expected, abs=1e-6)
    assert prior_drift(unit(17), prior, prior) == pytest.approx(0, abs=1e-6)
    assert prior_drift(unit(17), prior, unit(60, 90)) == pytest.approx(0.25, abs=1e-6)
