"""What became of the class: images made with the class noun and without the identifier."""

from __future__ import annotations

from .cosines import Vectors, mean_cosine, paired_distance


def prior_likeness(images: Vectors, prior: Vectors, references: Vectors) -> float:
    """Mean cosine of images of the class with the subject's: (K, D), (M, D); `images` do not count."""
    return float(mean_cosine(prior, references).mean())


def prior_drift(images: Vectors, prior: Vectors, base: Vectors) -> float:
    """Mean of 1 - cosine of each image of the class with the base model's: (K, D), (K, D)."""
    return float(paired_distance(prior, base).mean())
