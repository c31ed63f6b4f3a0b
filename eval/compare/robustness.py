"""How much a method's scores depend on the learning rate, from the tuning cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Interval
from .records import Done
from .scores import SCORES

NEAR = 0.02
"""Within this share of the method's own best."""
DRAWS = 2_000


@dataclass(frozen=True)
class Curve:
    """A score over the learning rates of a method."""

    method: str
    metric: str
    rates: tuple[float, ...]
    scores: NDArray[np.float64]
    """(subjects, seeds, rates)."""
    width: float
    """Decades in which the score stays within `NEAR` of the best; at most those of the grid."""
    width_interval: Interval | None
    """By a bootstrap over subjects; None for fewer than two."""
    between_rates: float | None
    """Standard deviation between rates, that of the seeds taken out; None with one seed."""

    @property
    def means(self) -> NDArray[np.float64]:
        """(rates,)"""
        found: NDArray[np.float64] = self.scores.mean(axis=(0, 1))
        return found


def curves(grids: Mapping[str, Sequence[float]], metrics: Sequence[str], found: Sequence[Done]) -> list[Curve]:
    """For every method and metric, over the subjects that have all rates with all seeds.

    Args:
        grids: the learning rates of each method.
        found: tuning cells that are done.
    """
    made = []
    for method, grid in grids.items():
        own = {(o.cell.subject, o.cell.seed, o.cell.rate): o for o in found if o.cell.method == method}
        rates = tuple(sorted(grid))
        seeds = tuple(sorted({seed for _, seed, _ in own}))
        subjects = [
            name
            for name in dict.fromkeys(name for name, _, _ in own)
            if all((name, seed, rate) in own for seed in seeds for rate in rates)
        ]
        for metric in metrics:
            values = [own[n, s, r].scores.get(metric) for n in subjects for s in seeds for r in rates]
            if values and all(value is not None for value in values):
                table = np.array(values, dtype=np.float64).reshape(len(subjects), len(seeds), len(rates))
                made.append(_curve(method, metric, rates, table))
    return made


def _curve(method: str, metric: str, rates: tuple[float, ...], scores: NDArray[np.float64]) -> Curve:
    sign = 1.0 if SCORES[metric].higher_is_better else -1.0
    subjects = len(scores)
    interval = None
    if subjects > 1:
        draws = np.random.default_rng(0).integers(0, subjects, size=(DRAWS, subjects))
        widths = [width(rates, sign * scores[draw].mean(axis=(0, 1))) for draw in draws]
        low, high = np.quantile(widths, (0.025, 0.975))
        interval = float(low), float(high)
    return Curve(
        method=method,
        metric=metric,
        rates=rates,
        scores=scores,
        width=width(rates, sign * scores.mean(axis=(0, 1))),
        width_interval=interval,
        between_rates=between_rates(scores),
    )


def width(rates: Sequence[float], scores: NDArray[np.float64], near: float = NEAR) -> float:
    """Decades around the best rate in which a score, linear in between, is at most `near` of its size below the best.

    Args:
        rates: ascending, (R,).
        scores: (R,), higher is better.
    """
    places, best = np.log10(rates), int(np.argmax(scores))
    least = scores[best] - near * abs(scores[best])
    ends = []
    for step in (-1, 1):
        here = best
        while 0 <= here + step < len(scores) and scores[here + step] >= least:
            here += step
        end = places[here]
        if 0 <= here + step < len(scores):  # it crosses the line on the way to the next rate
            share = (scores[here] - least) / (scores[here] - scores[here + step])
            end += share * (places[here + step] - places[here])
        ends.append(end)
    return float(ends[1] - ends[0])


def between_rates(scores: NDArray[np.float64]) -> float | None:
    """sqrt(max(0, variance between rates - variance of the seeds / S)), averaged over subjects.

    A range over rates grows with noise alone; this does not.

    Args:
        scores: (subjects, S seeds, rates).
    """
    seeds = scores.shape[1]
    if seeds < 2 or scores.shape[2] < 2:
        return None
    between = scores.mean(axis=1).var(axis=1, ddof=1).mean()
    within = scores.var(axis=1, ddof=1).mean()
    return float(max(0.0, between - within / seeds) ** 0.5)
