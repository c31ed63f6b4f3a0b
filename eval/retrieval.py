"""Is it this subject, and not merely one like it? Each image looks for its subject in a gallery of real images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cosines import Scores, Vectors


class Gallery(NamedTuple):
    """Real images of several subjects, best of look-alikes."""

    vectors: Vectors
    """(G, D)"""
    own: NDArray[np.bool_]
    """(G,): which are of the subject."""


def rank_one(images: Vectors, gallery: Gallery) -> Scores:
    """1 where the most similar image of the gallery is of the subject, else 0: (N, D) -> (N,)."""
    nearest = (images @ gallery.vectors.T).argmax(axis=1)
    return gallery.own[nearest].astype(np.float64)


def average_precision(images: Vectors, gallery: Gallery) -> Scores:
    """Of the gallery sorted by similarity to each image: mean precision at the subject's images, (N, D) -> (N,)."""
    order = np.argsort(-(images @ gallery.vectors.T), axis=1, kind="stable")
    hits = gallery.own[order].astype(np.float64)
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    return np.asarray((precision * hits).sum(axis=1) / hits.sum(axis=1))
