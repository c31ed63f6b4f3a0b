"""Sizes for training images that follow the images' own proportions: aspect-ratio buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

STEP = 64
"""Pixels from one side to the next, at the most: what base models were trained with, SDXL among them (arXiv 2307.01952,
appendix I)."""
STEPS = 8
"""A square has as many steps along its side, at the least, so that proportions are met at low resolutions too."""
STRETCH = 2
"""A side is at most so many times the square's, as in SDXL's buckets."""


class Buckets(NamedTuple):
    """All sizes whose sides are multiples of a step and whose area is no more than that of a square."""

    resolution: int
    """Side of the square in pixels."""
    step: int
    longest: int
    """No side is longer, in pixels."""

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width for an image of this width and height: of those that do not enlarge it, the one that is
        nearest in proportions, and the largest of these. A side that is shorter than a step becomes one."""
        width, height = size
        wanted = math.log(width / height)
        found = [*self._up_to(width, height), *((w, h) for h, w in self._up_to(height, width))]
        w, h = min(found, key=lambda one: (abs(math.log(one[0] / one[1]) - wanted), -one[0] * one[1], one))
        return h, w

    def _up_to(self, one: int, other: int) -> Iterator[tuple[int, int]]:
        """For each length that one side can have, the longest that the other one can; in the order of the arguments."""
        for side in range(self.step, max(self.step, min(one, self.longest)) + 1, self.step):
            room = min(max(self.step, min(other, self.longest)), self.resolution**2 // side)
            if room >= self.step:
                yield side, room // self.step * self.step


def for_model(resolution: int, multiple: int, longest: int | None = None) -> Buckets:
    """The buckets of a training. Squares stay as they are: the step divides their side.

    Args:
        resolution: side of the square in pixels, a multiple of `multiple`.
        multiple: sides that the model can do are multiples of it.
        longest: side that it knows; None: any.
    """
    largest = max(multiple, min(STEP, resolution // STEPS))
    steps = range(multiple, largest + 1, multiple)
    step = max(step for step in steps if resolution % step == 0)
    return Buckets(resolution, step, min(STRETCH * resolution, longest or STRETCH * resolution))
