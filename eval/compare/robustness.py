"""How much a method's scores depend on the learning rate, from the tuning cells.

One rate moves the weights of one method farther than those of another, so the same is told over the size of the update
that was learned, and at sizes that all methods reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Ascending; or the sizes of the update at them."""
    scores: NDArray[np.float64]
    """(subjects, seeds, rates)."""
    subjects: tuple[str, ...]
    width: float
    """Decades in which the score stays within `NEAR` of the best; at most those of the rates."""
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
    return [
        _curve(method, metric, rates, names, table)
        for method, grid in grids.items()
        for metric in metrics
        for rates, names, table in _table(grid, [o for o in found if o.cell.method == method], _score(metric))
    ]


def over_size(grids: Mapping[str, Sequence[float]], metrics: Sequence[str], found: Sequence[Done]) -> list[Curve]:
    """As `curves`, over the size of what was learned at each rate: the geometric mean over subjects and seeds.

    Rates from the first on that moves the weights no farther than the one before are left out, and so are methods with
    trainings that have no size: they diverged.
    """
    made = []
    for method, grid in grids.items():
        own = [o for o in found if o.cell.method == method]
        for _, _, moved in _table(grid, own, lambda one: one.update("learned")):
            sizes = np.exp(np.log(moved).mean(axis=(0, 1)))
            more = 1 + int(np.argmin([*(np.diff(sizes) > 0), False]))
            for metric in metrics:
                for _, names, table in _table(grid, own, _score(metric)):
                    made.append(_curve(method, metric, tuple(map(float, sizes[:more])), names, table[..., :more]))
    return made


def at_equal_sizes(found: Sequence[Curve], methods: Sequence[str], points: int) -> list[Curve]:
    """Curves over sizes that all methods reach, and over the subjects that all have.

    Between the rates of its grid a score is taken as linear in the logarithm of the size; nothing is extrapolated.

    Args:
        found: of `over_size`.
        points: so many sizes, from the largest of the methods' smallest sizes to the smallest of their largest.

    Returns:
        Nothing where a method has no curve, or there is no such range.
    """
    made = []
    for metric in dict.fromkeys(curve.metric for curve in found):
        own = {curve.method: curve for curve in found if curve.metric == metric}
        if set(methods) - set(own):
            continue
        low = max(own[method].rates[0] for method in methods)
        high = min(own[method].rates[-1] for method in methods)
        names = tuple(n for n in own[methods[0]].subjects if all(n in own[method].subjects for method in methods))
        if not 0 < low < high or not names:
            continue
        sizes = np.geomspace(low, high, points)
        for method in methods:
            curve = own[method]
            scores = curve.scores[[curve.subjects.index(name) for name in names]]
            made.append(_curve(method, metric, tuple(map(float, sizes)), names, _between(curve.rates, scores, sizes)))
    return made


def _between(rates: Sequence[float], scores: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., rates) -> (..., len(at)), linear in the logarithm."""
    each = scores.reshape(-1, scores.shape[-1])
    found = np.stack([np.interp(np.log(at), np.log(rates), one) for one in each])
    return found.reshape(*scores.shape[:-1], len(at))


def _score(metric: str) -> Callable[[Done], float | None]:
    return lambda one: one.scores.get(metric)


def _table(
    grid: Sequence[float], found: Sequence[Done], value: Callable[[Done], float | None]
) -> Iterator[tuple[tuple[float, ...], tuple[str, ...], NDArray[np.float64]]]:
    """(rates, subjects, values (subjects, seeds, rates)) of one method; nothing where no subject is whole, or a value
    is not known."""
    by_place = {(o.cell.subject, o.cell.seed, o.cell.rate): o for o in found}
    rates = tuple(sorted(grid))
    whole = {
        seed: [n for n in dict.fromkeys(n for n, _, _ in by_place) if all((n, seed, r) in by_place for r in rates)]
        for seed in sorted({seed for _, seed, _ in by_place})
    }
    most = max(map(len, whole.values()), default=0)
    seeds = [seed for seed, names in whole.items() if len(names) == most]  # of one that has begun nothing is lost
    names = tuple(n for n in whole[seeds[0]] if all(n in whole[seed] for seed in seeds)) if seeds else ()
    values = [value(by_place[n, s, r]) for n in names for s in seeds for r in rates]
    if values and all(one is not None for one in values):
        yield rates, names, np.array(values, dtype=np.float64).reshape(len(names), len(seeds), len(rates))


def _curve(
    method: str, metric: str, rates: tuple[float, ...], names: tuple[str, ...], scores: NDArray[np.float64]
) -> Curve:
    def wide(means: Sequence[NDArray[np.float64]]) -> float:
        return width(rates, means[0])

    found, interval = _bootstrapped(wide, [SIGN[metric] * scores])
    return Curve(
        method=method,
        metric=metric,
        rates=rates,
        scores=scores,
        subjects=names,
        width=found,
        width_interval=interval,
        between_rates=between_rates(scores),
    )


@dataclass(frozen=True)
class Together:
    """How much of a grid is good by several scores at once."""

    method: str
    all_near: float
    """Decades in which each score is within `NEAR` of its own best; 0 where there is no such rate."""
    all_near_interval: Interval | None
    product: float
    """Decades in which the product of the scores, by which rates are tuned, is within `NEAR` of its best."""
    product_interval: Interval | None


def together(found: Sequence[Curve]) -> list[Together]:
    """For every method that has curves of the same subjects and seeds by two metrics or more."""
    made = []
    for method in dict.fromkeys(curve.method for curve in found):
        own = [curve for curve in found if curve.method == method]
        if len(own) < 2 or len({(curve.subjects, curve.scores.shape) for curve in own}) > 1:
            continue
        rates, tables = own[0].rates, [SIGN[curve.metric] * curve.scores for curve in own]

        def shared(means: Sequence[NDArray[np.float64]], rates: tuple[float, ...] = rates) -> float:
            windows = [window(rates, one) for one in means]
            return max(0.0, min(high for _, high in windows) - max(low for low, _ in windows))

        def of_product(means: Sequence[NDArray[np.float64]], rates: tuple[float, ...] = rates) -> float:
            return width(rates, np.prod([one.clip(min=0.0) for one in means], axis=0))

        made.append(Together(method, *_bootstrapped(shared, tables), *_bootstrapped(of_product, tables)))
    return made


def _bootstrapped(
    measure: Callable[[Sequence[NDArray[np.float64]]], float], tables: Sequence[NDArray[np.float64]]
) -> tuple[float, Interval | None]:
    """A number of the mean curves, and its 95 % interval by a bootstrap over subjects; None for fewer than two.

    Args:
        measure: of one (rates,) for each of the tables.
        tables: (subjects, seeds, rates).
    """
    found, subjects = measure([table.mean(axis=(0, 1)) for table in tables]), len(tables[0])
    if subjects < 2:
        return found, None
    draws = np.random.default_rng(0).integers(0, subjects, size=(DRAWS, subjects))
    widths = [measure([table[draw].mean(axis=(0, 1)) for table in tables]) for draw in draws]
    low, high = np.quantile(widths, (0.025, 0.975))
    return found, (float(low), float(high))


SIGN = {name: 1.0 if metric.higher_is_better else -1.0 for name, metric in SCORES.items()}


def width(rates: Sequence[float], scores: NDArray[np.float64], near: float = NEAR) -> float:
    """Decades of `window`."""
    low, high = window(rates, scores, near)
    return high - low


def window(rates: Sequence[float], scores: NDArray[np.float64], near: float = NEAR) -> tuple[float, float]:
    """From where to where, around the best rate, a score is at most `near` of its size below the best: log10 of rates.

    Args:
        rates: ascending, (R,).
        scores: (R,), higher is better; linear in between.
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
        ends.append(float(end))
    return ends[0], ends[1]


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
