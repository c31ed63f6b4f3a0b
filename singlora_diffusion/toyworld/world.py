"""Toyworld in one place: seeded images of one object in one place, their labels and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .captions import PLACES, caption, compose, vocabulary
from .identities import BACKGROUNDS, CLASSES, COLOURS, PALETTE, PATTERNS, Identity, Scene, identity, scene
from .render import render
from .subjects import (
    HELD_OUT,
    PRETRAINING_SEEDS,
    SUBJECTS,
    TEST,
    TUNING,
    Subject,
    pretraining_identity,
    references,
    subject,
    unused_backgrounds,
    write_subject,
)

__all__ = [
    "BACKGROUNDS",
    "CLASSES",
    "COLOURS",
    "HELD_OUT",
    "PALETTE",
    "PATTERNS",
    "PLACES",
    "PRETRAINING_SEEDS",
    "SUBJECTS",
    "TEST",
    "TUNING",
    "Identity",
    "Scene",
    "Subject",
    "batch",
    "caption",
    "compose",
    "identity",
    "labels",
    "pretraining_identity",
    "references",
    "render",
    "scene",
    "subject",
    "unused_backgrounds",
    "vocabulary",
    "write_subject",
]

CAPTIONS_PER_PICTURE = 2


def labels(identity: Identity, scene: Scene) -> dict[str, int]:
    """Indices into CLASSES, BACKGROUNDS, COLOURS and PATTERNS under "class", "background", "colour" and "pattern"."""
    return {
        "class": CLASSES.index(identity.cls),
        "background": BACKGROUNDS.index(scene.background),
        "colour": COLOURS.index(identity.colour),
        "pattern": PATTERNS.index(identity.pattern),
    }


def batch(seeds: Sequence[int]) -> dict[str, Any]:
    """Pretraining images, one per seed below `PRETRAINING_SEEDS`, the same bytes for the same seed.

    Returns "images" (n, 64, 64, 3) uint8, "captions" (n lists of 2 strings) and "labels" (name to (n,) int64).
    """
    images = np.empty((len(seeds), 64, 64, 3), dtype=np.uint8)
    captions: list[list[str]] = []
    read: list[dict[str, int]] = []
    for row, seed in enumerate(seeds):
        who, where = pretraining_identity(int(seed)), scene(int(seed))
        images[row], _ = render(who, where)
        rng = np.random.default_rng((23, int(seed)))
        captions.append([caption(who, where, rng) for _ in range(CAPTIONS_PER_PICTURE)])
        read.append(labels(who, where))
    names = ("class", "background", "colour", "pattern")
    return {
        "images": images,
        "captions": captions,
        "labels": {name: np.array([one[name] for one in read], dtype=np.int64) for name in names},
    }
