"""Has the subject been learned, or have its training images?"""

from __future__ import annotations

import numpy as np

from .cosines import Scores, Vectors

PERCENTILE = 95


def nearest(images: Vectors, training: Vectors) -> Scores:
    """Cosine of each image with the training image most like it: (N, D), (M, D) -> (N,)."""
    return np.asarray((images @ training.T).max(axis=1), dtype=np.float64)


def copied(images: Vectors, training: Vectors) -> Scores:
    """1 where an image is more like a training image than these are like each other, else 0: (N, D), (M, D) -> (N,).

    The line is the 95th percentile of the cosines of different training images; of a single one there is none, and
    nothing is a copy.
    """
    pairs = (training @ training.T)[np.triu_indices(len(training), 1)]
    line = np.percentile(pairs, PERCENTILE) if len(pairs) else np.inf
    return (nearest(images, training) > line).astype(np.float64)


def gap(images: Vectors, references: Vectors, training: Vectors) -> Scores:
    """Mean cosine with the training images less that with held-out ones: (N, D), (M, D), (T, D) -> (N,)."""
    return np.asarray(
        (images @ training.T).mean(axis=1, dtype=np.float64) - (images @ references.T).mean(axis=1, dtype=np.float64)
    )
