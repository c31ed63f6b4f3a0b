"""Which method is better? Every method against the first, metric by metric, over the test subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import statistics
from ..statistics import Comparison, Interval, Spread
from .records import Done, Tables
from .scores import SCORES

LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """One method by one metric."""

    method: str
    metric: str
    mean: float
    interval: Interval | None
    """Of the mean over subjects, at `LEVEL`."""
    difference: Comparison | None
    """Against the first method, positive where this one is better; None for the first itself. The verdict on a primary
    metric is by the adjusted p."""
    adjusted: float | None
    """Its p, adjusted for all primary metrics and methods (Holm); None for other metrics."""
    needed: int | None
    """Subjects that show a difference as large as the bound."""
    spread: Spread
    """Of the difference; of the score for the first method."""


def rows(tables: Tables, bound: float, primary: Sequence[str]) -> list[Row]:
    """All of them, metric by metric, the primary ones first.

    Args:
        bound: the largest difference that does not matter, named beforehand.
        primary: the metrics that decide, named beforehand.
    """
    if not tables.subjects:
        return []
    found = []
    for metric in sorted(tables.scores, key=lambda name: name not in primary):
        by_method = tables.scores[metric]
        sign = 1.0 if SCORES[metric].higher_is_better else -1.0
        first, *_ = by_method.values()
        for method, scores in by_method.items():
            means = scores.mean(axis=1)
            against = None if scores is first else sign * (scores - first)
            difference = None if against is None else statistics.compare(against.mean(axis=1), bound=bound)
            found.append(
                Row(
                    method=method,
                    metric=metric,
                    mean=float(means.mean()),
                    interval=statistics.t_interval(means, LEVEL),
                    difference=difference,
                    adjusted=None,
                    needed=_needed(difference, bound),
                    spread=statistics.spread(scores if against is None else against),
                )
            )
    return _adjusted(found, bound, primary)


def _needed(difference: Comparison | None, bound: float) -> int | None:
    if difference is None or difference.sd is None or bound == 0:
        return None
    return statistics.subjects_needed(difference.sd, bound)


def _adjusted(found: Sequence[Row], bound: float, primary: Sequence[str]) -> list[Row]:
    """With Holm's p over the primary comparisons, and verdicts by it."""
    p = {f"{row.metric} {row.method}": row.difference.p for row in found if row.difference and row.metric in primary}
    held = statistics.holm(p)
    adjusted = []
    for row in found:
        if row.difference and row.metric in primary:
            value = held[f"{row.metric} {row.method}"]
            verdict = statistics.verdict(row.difference.t_interval, value, bound, LEVEL)
            row = replace(row, adjusted=value, difference=replace(row.difference, verdict=verdict))
        adjusted.append(row)
    return adjusted


def noise(found: Sequence[Done], again: Sequence[Done]) -> dict[str, float]:
    """By metric: how far one and the same cell comes apart where sums are done in another order.

    Args:
        found: cells with the usual number of threads.
        again: the same cells with another.
    """
    usual = {(one.cell.subject, one.cell.method, one.cell.rate, one.cell.seed): one for one in found}
    pairs = [(usual[key], two) for two in again if (key := _key(two)) in usual]
    sizes = {}
    for metric in SCORES:
        known = [(a.scores.get(metric), b.scores.get(metric)) for a, b in pairs]
        if known and all(a is not None and b is not None for a, b in known):
            first, second = np.array(known, dtype=np.float64).T
            size = statistics.repeat_sd(first, second)
            if size is not None:
                sizes[metric] = size
    return sizes


def _key(one: Done) -> tuple[str, str, float, int]:
    return one.cell.subject, one.cell.method, one.cell.rate, one.cell.seed


WORDS = {
    "better": "is better than",
    "worse": "is worse than",
    "tie": "equals, within the bound,",
    "undecided": "is not told apart from",
}


def sentence(row: Row, label: Callable[[str], str], first: str) -> str:
    """A verdict in words."""
    found = row.difference
    assert found is not None
    numbers = [f"{found.mean:+.3f}"]
    if found.t_interval is not None:
        numbers.append(f"95 % interval {found.t_interval[0]:+.3f} to {found.t_interval[1]:+.3f}")
    numbers.append(f"adjusted p {row.adjusted:.2g}")
    if found.verdict == "undecided" and row.needed:
        numbers.append(f"about {row.needed} subjects would show a difference of {found.bound:g}")
    what = f"{label(row.method)} {WORDS[found.verdict]} {label(first)}"
    return f"{SCORES[row.metric].label}: {what} ({'; '.join(numbers)})."
