"""Scores as pure functions of unit vectors, and the one table of them.

A metric gives one number per generated picture. Cosines are dot products in float32, means are in float64, and nothing
is rescaled or clamped: a score is a raw cosine. Averages go from pictures to prompts to the subject, so that a prompt
counts once however many pictures it has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (N, D), rows of unit length
Scores = NDArray[np.float64]  # (N,)


def mean_cosine(images: Vectors, references: Vectors) -> Scores:
    """Mean cosine of each picture with all references: (N, D), (M, D) -> (N,)."""
    cosines: Vectors = images @ references.T
    return np.asarray(cosines.mean(axis=1, dtype=np.float64))


def paired_cosine(images: Vectors, texts: Vectors) -> Scores:
    """Cosine of each picture with its own text: (N, D), (N, D) -> (N,)."""
    cosines: Vectors = np.einsum("nd,nd->n", images, texts)
    return cosines.astype(np.float64)


def real_to_real(references: Vectors) -> float | None:
    """What real pictures of the subject score: mean cosine of all their M (M - 1) pairs, a picture never with itself.

    None for a single reference.
    """
    count = len(references)
    if count < 2:
        return None
    cosines = (references @ references.T).astype(np.float64)
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def mean_over_prompts(scores: Scores, prompts: Sequence[Hashable]) -> float:
    """One subject's score: the mean over its prompts of the mean over each prompt's pictures.

    Args:
        scores: (N,) one number per picture.
        prompts: what tells the prompt of each picture.
    """
    if len(scores) == 0 or len(scores) != len(prompts):
        raise ValueError(f"{len(scores)} scores for {len(prompts)} prompts")
    groups: dict[Hashable, list[float]] = {}
    for score, prompt in zip(scores, prompts, strict=True):
        groups.setdefault(prompt, []).append(float(score))
    return float(np.mean([np.mean(group, dtype=np.float64) for group in groups.values()], dtype=np.float64))


@dataclass(frozen=True)
class Metric:
    """One row of `METRICS`."""

    encoder: Literal["clip", "dino"]
    against: Literal["references", "prompt_without_token", "prompt"]
    function: Callable[[Vectors, Vectors], Scores]
    higher_is_better: bool
    about: str


METRICS: dict[str, Metric] = {
    "clip_i": Metric("clip", "references", mean_cosine, True, "likeness to the references, by CLIP"),
    "dino": Metric("dino", "references", mean_cosine, True, "likeness to the references, by DINO"),
    "clip_t": Metric(
        "clip", "prompt_without_token", paired_cosine, True, "agreement with the prompt, identifier left out"
    ),
    "clip_t_token": Metric("clip", "prompt", paired_cosine, True, "agreement with the prompt, identifier kept"),
}
