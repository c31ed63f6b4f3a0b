"""The one table of scores: pure functions of unit vectors, and what is to be known of each.

A metric gives one number for each generated image, or one for all of them. Nothing is rescaled or clamped but where the
row's unit says so. Averages go from images to prompts to the subject, so that a prompt counts once however many images
it has.

To add a metric: a function, in the file of its kind (`cosines`, `prior`, `retrieval`, `memorising`), and a row in
`METRICS`. The function is given the images' vectors, then one argument for each of the row's `needs`, in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from . import memorising, retrieval
from .cosines import (
    Scores,
    Vectors,
    clipscore,
    direction,
    masked_cosine,
    mean_cosine,
    paired_cosine,
    paired_distance,
    pairwise_cosine,
)
from .prior import prior_drift, prior_likeness

Need = Literal[
    "references",
    "prompt",
    "prompt_without_token",
    "class_prompt",
    "base_images",
    "prompt_groups",
    "training_images",
    "prior_images",
    "base_prior_images",
    "gallery",
    "masked_images",
    "masked_references",
]
"""What a metric is given beside the N images' vectors, all from the same encoder:

- `references`: (M, D) vectors of the real images of the subject.
- `prompt`, `prompt_without_token`: (N, D) vectors of each image's own prompt, with and without the identifier.
- `base_images`: (N, D) vectors of what the base model makes of each image's prompt and seed.
- `prompt_groups`: N values, equal for images of one prompt.
- `class_prompt`: (N, D) vectors of "a photo of a CLASS", the class noun of each image's subject.
- `training_images`: (T, D) vectors of the images that the model was trained on.
- `prior_images`, `base_prior_images`: (K, D) vectors of what the model, and its base model, make of prompts with the
  class noun and without the identifier.
- `gallery`: a `retrieval.Gallery` of real images of several subjects.
- `masked_images`, `masked_references`: (N, D) and (M, D) vectors of the images and references with everything but the
  subject painted grey.
"""

T = TypeVar("T")


def diversity(images: Vectors, prompts: Sequence[Hashable]) -> float | None:
    """1 - mean pairwise cosine of the images of one prompt, averaged over prompts; None where none has two images."""
    groups = by_prompt(range(len(images)), prompts).values()
    within = [pairwise_cosine(images[group]) for group in groups]
    known = [1.0 - value for value in within if value is not None]
    return float(np.mean(known)) if known else None


def mean_over_prompts(scores: Scores, prompts: Sequence[Hashable]) -> float:
    """One subject's score: the mean over its prompts of the mean over each prompt's images.

    Args:
        scores: (N,) one number per image.
        prompts: what tells the prompt of each image.
    """
    if len(scores) == 0 or len(scores) != len(prompts):
        raise ValueError(f"{len(scores)} scores for {len(prompts)} prompts")
    groups = by_prompt([float(score) for score in scores], prompts)
    return float(np.mean([np.mean(group, dtype=np.float64) for group in groups.values()], dtype=np.float64))


def by_prompt(items: Sequence[T], prompts: Sequence[Hashable]) -> dict[Hashable, list[T]]:
    """The items of each prompt, in order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item, prompt in zip(items, prompts, strict=True):
        groups.setdefault(prompt, []).append(item)
    return groups


@dataclass(frozen=True)
class Metric:
    """One row of `METRICS`."""

    label: str
    description: str  # of what it measures, to follow the label and a colon
    encoder: str  # a role of eval.encoders.ROLES
    needs: tuple[Need, ...]
    per: Literal["image", "set"]
    function: Callable[..., Scores] | Callable[..., float | None]
    """Vectors and what it needs -> (N,) for `per` image, one number or None for `per` set."""
    unit: str = "cosine"
    higher_is_better: bool = True
    of_references: Callable[[Vectors], float | None] | None = None
    """What the real images score among themselves; None: that means nothing."""
    on_request: bool = False
    """Computed only when --metrics names it."""
    variant_of: str | None = None
    """The row that stands for both where there is little room."""


METRICS: dict[str, Metric] = {
    "clip_i": Metric(
        "CLIP-I",
        "likeness to the references, by CLIP",
        "clip",
        ("references",),
        "image",
        mean_cosine,
        of_references=pairwise_cosine,
    ),
    "dino": Metric(
        "DINO",
        "likeness to the references, by DINO",
        "dino",
        ("references",),
        "image",
        mean_cosine,
        of_references=pairwise_cosine,
    ),
    "clip_t": Metric(
        "CLIP-T",
        "agreement with the prompt, identifier left out",
        "clip",
        ("prompt_without_token",),
        "image",
        paired_cosine,
    ),
    "clip_t_token": Metric(
        "CLIP-T, identifier kept",
        "agreement with the whole prompt",
        "clip",
        ("prompt",),
        "image",
        paired_cosine,
        variant_of="clip_t",
    ),
    "clipscore": Metric(
        "CLIPScore",
        "agreement with the whole prompt, 2.5 max(cosine, 0)",
        "clip",
        ("prompt",),
        "image",
        clipscore,
        unit="2.5 x cosine",
        on_request=True,
        variant_of="clip_t",
    ),
    "dinov2": Metric(
        "DINOv2",
        "likeness to the references, by DINOv2",
        "dinov2",
        ("references",),
        "image",
        mean_cosine,
        of_references=pairwise_cosine,
        on_request=True,
    ),
    "masked_dino": Metric(
        "DINO, masked",
        "likeness of the subject to that of the references, all else painted grey, by DINO",
        "dino",
        ("masked_images", "masked_references"),
        "image",
        masked_cosine,
        on_request=True,
    ),
    "drift": Metric(
        "Drift",
        "distance from the base model's image of the same prompt and seed, by DINO",
        "dino",
        ("base_images",),
        "image",
        paired_distance,
        unit="1 - cosine",
        higher_is_better=False,
        on_request=True,
    ),
    "diversity": Metric(
        "Diversity",
        "mean distance between images of one prompt, by DINO",
        "dino",
        ("prompt_groups",),
        "set",
        diversity,
        unit="1 - cosine",
        on_request=True,
    ),
    "prior_likeness": Metric(
        "PRES",
        "likeness of images of the class, made without the identifier, to the subject, by DINO; prior preservation",
        "dino",
        ("prior_images", "references"),
        "set",
        prior_likeness,
        higher_is_better=False,
        on_request=True,
    ),
    "prior_drift": Metric(
        "Prior drift",
        "distance of images of the class, made without the identifier, from the base model's, by DINO",
        "dino",
        ("prior_images", "base_prior_images"),
        "set",
        prior_drift,
        unit="1 - cosine",
        higher_is_better=False,
        on_request=True,
    ),
    "rank_one": Metric(
        "Rank-1",
        "share of images whose nearest image in the gallery is of the subject, by DINO",
        "dino",
        ("gallery",),
        "image",
        retrieval.rank_one,
        unit="share",
        on_request=True,
    ),
    "average_precision": Metric(
        "mAP",
        "average precision of finding the subject in the gallery, by DINO",
        "dino",
        ("gallery",),
        "image",
        retrieval.average_precision,
        unit="share",
        on_request=True,
    ),
    "direction": Metric(
        "Directional CLIP",
        "whether the image differs from the subject's as the prompt differs from the class noun, by CLIP",
        "clip",
        ("references", "prompt_without_token", "class_prompt"),
        "image",
        direction,
        on_request=True,
    ),
    "nearest": Metric(
        "Nearest training image",
        "likeness to the training image most like it, by DINO; near 1 it may be a copy",
        "dino",
        ("training_images",),
        "image",
        memorising.nearest,
        higher_is_better=False,
        on_request=True,
    ),
    "copied": Metric(
        "Copies",
        "share of images more like a training image than 95 % of training images are like each other, by DINO",
        "dino",
        ("training_images",),
        "image",
        memorising.copied,
        unit="share",
        higher_is_better=False,
        on_request=True,
    ),
    "gap": Metric(
        "Held-out gap",
        "likeness to the training images less that to held-out ones, by DINO",
        "dino",
        ("references", "training_images"),
        "image",
        memorising.gap,
        unit="difference of cosines",
        higher_is_better=False,
        on_request=True,
    ),
}
