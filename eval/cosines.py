"""Likeness and agreement as cosines of unit vectors: dot products in float32, means in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (N, D), rows of unit length
Scores = NDArray[np.float64]  # (N,)


def mean_cosine(images: Vectors, references: Vectors) -> Scores:
    """Mean cosine of each image with all references: (N, D), (M, D) -> (N,)."""
    cosines: Vectors = images @ references.T
    return np.asarray(cosines.mean(axis=1, dtype=np.float64))


def masked_cosine(images: Vectors, masked: Vectors, references: Vectors) -> Scores:
    """`mean_cosine` of the images' masked forms: (N, D), (N, D), (M, D) -> (N,)."""
    return mean_cosine(masked, references)


def paired_cosine(images: Vectors, others: Vectors) -> Scores:
    """Cosine of each image with its own text or image: (N, D), (N, D) -> (N,)."""
    cosines: Vectors = np.einsum("nd,nd->n", images, others)
    return cosines.astype(np.float64)


def clipscore(images: Vectors, texts: Vectors) -> Scores:
    """2.5 max(cosine, 0) of each image with its own text (arXiv 2104.08718): (N, D), (N, D) -> (N,)."""
    return 2.5 * np.maximum(paired_cosine(images, texts), 0.0)


def paired_distance(images: Vectors, others: Vectors) -> Scores:
    """1 - cosine of each image with its own counterpart: (N, D), (N, D) -> (N,)."""
    return 1.0 - paired_cosine(images, others)


def pairwise_cosine(vectors: Vectors) -> float | None:
    """Mean cosine of all N (N - 1) pairs, an image never with itself: (N, D) -> a number; None for a single image."""
    count = len(vectors)
    if count < 2:
        return None
    cosines = (vectors @ vectors.T).astype(np.float64)
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def direction(images: Vectors, references: Vectors, texts: Vectors, plain: Vectors) -> Scores:
    """Does the image differ from the subject's as the prompt differs from the class noun alone?

    Cosine of (image - mean reference) and (prompt - "a photo of a CLASS"); 0 where one of them is no change at all.
    (N, D), (M, D), (N, D), (N, D) -> (N,).
    """
    seen = images.astype(np.float64) - references.mean(axis=0, dtype=np.float64)
    said = texts.astype(np.float64) - plain
    sizes = np.linalg.norm(seen, axis=1) * np.linalg.norm(said, axis=1)
    products = np.einsum("nd,nd->n", seen, said)
    return np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 1e-6)
