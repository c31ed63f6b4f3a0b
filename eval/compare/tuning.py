"""Each method's learning rate: chosen on the tuning subjects, by a rule that is fixed beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .settings import MethodSettings, learning_rates

LIKENESS, AGREEMENT = "dino", "clip_t"
"""The rule: the rate whose product of the two is largest, each averaged over subjects and seeds."""


@dataclass(frozen=True)
class Choice:
    """A method's rate."""

    rate: float
    at_the_edge: bool
    """It is the lowest or the highest of the grid: a better one may lie beyond."""


def goodness(scores: Mapping[str, float]) -> float:
    """Likeness to the subject times agreement with the prompt, 0 where there is no likeness."""
    return max(scores[LIKENESS], 0.0) * max(scores[AGREEMENT], 0.0)


def choose(what: MethodSettings, records: Iterable[Mapping[str, Any]]) -> dict[str, Choice]:
    """The best rate of each method; of equal ones the lowest.

    Args:
        records: of all tuning cells.
    """
    records = list(records)
    found = {}
    for method, grid in learning_rates(what).items():
        means = []
        for rate in grid:
            of_rate = [one["scores"] for one in records if (one["method"], one["learning_rate"]) == (method, rate)]
            means.append(goodness({name: float(np.mean([s[name] for s in of_rate])) for name in (LIKENESS, AGREEMENT)}))
        best = int(np.argmax(means))
        found[method] = Choice(grid[best], len(grid) > 1 and best in (0, len(grid) - 1))
    return found
