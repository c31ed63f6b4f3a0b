"""Each method's learning rate: chosen on the tuning subjects, by a rule that is named beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .settings import CompareSettings, learning_rates


@dataclass(frozen=True)
class Choice:
    """A method's rate."""

    rate: float
    at_the_edge: bool
    """It is the lowest or the highest of the grid: a better one may lie beyond."""


def choose(settings: CompareSettings, records: Iterable[Mapping[str, Any]]) -> dict[str, Choice]:
    """The rate of each method at which the product of the primary scores is largest; of equal ones the lowest.

    Each score is averaged over subjects and seeds first; below 0 it counts as 0.

    Args:
        records: of all tuning cells.
    """
    records = list(records)
    found = {}
    for method, grid in learning_rates(settings.what).items():
        products = []
        for rate in grid:
            of_rate = [one["scores"] for one in records if (one["method"], one["learning_rate"]) == (method, rate)]
            means = [float(np.mean([scores[name] for scores in of_rate])) for name in settings.decision.primary]
            products.append(math.prod(max(mean, 0.0) for mean in means))
        best = int(np.argmax(products))
        found[method] = Choice(grid[best], len(grid) > 1 and best in (0, len(grid) - 1))
    return found
