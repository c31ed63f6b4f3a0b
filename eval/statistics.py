"""Is method A better than method B? Paired differences over subjects.

The unit of replication is the subject: d_s is the mean over seeds, prompts and images of (A - B) on subject s, with
the same prompts, noise seeds and references on both sides. Images of one subject are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "tie", "undecided"]

EXACT_UP_TO = 20  # subjects; 2^20 sign patterns fit in 8 MB


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds about the differences A - B of n subjects."""

    n: int
    mean: float
    sd: float | None  # over subjects, n - 1 in the denominator; None for one subject
    t_interval: Interval | None
    bootstrap_interval: Interval | None
    p: float  # two-sided, sign-flip permutation
    wins: int
    losses: int
    bound: float | None  # the equivalence bound, as named beforehand
    verdict: Verdict


def compare(differences: ArrayLike, *, bound: float | None = None, level: float = 0.95, seed: int = 0) -> Comparison:
    """All of this file on one set of paired differences.

    Args:
        differences: (n,) one per subject, A - B of a score where higher is better.
        bound: largest difference that does not matter, named before looking; without one there are no ties.
        level: coverage of the intervals.
        seed: of the bootstrap, and of the permutations where they are drawn.
    """
    d = _checked(differences)
    interval, p = t_interval(d, level), sign_flip_p(d, seed=seed)
    return Comparison(
        n=len(d),
        mean=float(d.mean()),
        sd=float(d.std(ddof=1)) if len(d) > 1 else None,
        t_interval=interval,
        bootstrap_interval=studentised_bootstrap(d, level, seed=seed),
        p=p,
        wins=int((d > 0).sum()),
        losses=int((d < 0).sum()),
        bound=bound,
        verdict=verdict(interval, p, bound, level),
    )


def t_interval(differences: ArrayLike, level: float = 0.95) -> Interval | None:
    """Student's interval for the mean difference; None for fewer than two subjects."""
    from scipy import stats  # type: ignore[import-untyped]  # 0.7 s to import, and nothing else here needs it

    d = _checked(differences)
    if len(d) < 2:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1)) * float(d.std(ddof=1)) / len(d) ** 0.5
    return float(d.mean()) - half, float(d.mean()) + half


def studentised_bootstrap(
    differences: ArrayLike, level: float = 0.95, *, draws: int = 10_000, seed: int = 0
) -> Interval | None:
    """Bootstrap-t interval for the mean difference over resampled subjects.

    The plain percentile bootstrap covers 84 % instead of 95 % at n = 5; dividing by each resample's own standard error
    mends most of that. None where there are too few subjects for a finite interval (fewer than four).
    """
    d = _checked(differences)
    if len(d) < 2:
        return None
    mean, error = d.mean(), d.std(ddof=1) / len(d) ** 0.5
    if error <= _rounding(d):
        return float(mean), float(mean)
    resamples = np.random.default_rng(seed).choice(d, size=(draws, len(d)))
    errors = resamples.std(axis=1, ddof=1) / len(d) ** 0.5
    shifts = resamples.mean(axis=1) - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        # One subject drawn n times has no spread: its t is infinite, and it stays in as the extreme value that it is.
        t = np.where(errors > _rounding(d), shifts / errors, np.copysign(np.inf, shifts))
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    if not np.isfinite([low, high]).all():
        return None
    return float(mean - high * error), float(mean - low * error)


def sign_flip_p(differences: ArrayLike, *, draws: int = 100_000, seed: int = 0) -> float:
    """Two-sided p of the mean difference under random exchange of A and B within each subject.

    Exact over all 2^n sign patterns up to `EXACT_UP_TO` subjects, by `draws` random patterns above.
    """
    d = _checked(differences)
    observed = abs(d.sum()) - len(d) * _rounding(d)
    if len(d) <= EXACT_UP_TO:
        sums = d[:1]  # a pattern and its mirror give the same |sum|: the first sign can stay
        for difference in d[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= observed))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, 10_000):
        signs = rng.integers(0, 2, size=(min(10_000, draws - start), len(d))) * 2.0 - 1.0
        hits += int((np.abs(signs @ d) >= observed).sum())
    return (hits + 1) / (draws + 1)  # the observed pattern is one of them


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of a family of tests (all metrics times all baselines), in the order given."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def verdict(interval: Interval | None, p: float, bound: float | None = None, level: float = 0.95) -> Verdict:
    """What the differences A - B say.

    "better" and "worse" take both: an interval that leaves out zero, and a sign-flip p of at most 1 - level. The
    interval alone is not enough for a handful of subjects: two equal differences have an interval of no width and
    p = 0.5. Of n subjects the exact p is at least 2^(1 - n), so at 95 % nothing is better or worse with fewer than
    six: five give 0.0625 at best.

    "tie" takes an interval that lies wholly inside (-bound, bound), even one that leaves out zero: a difference known
    to be smaller than what matters does not matter. A large p is no tie, it is "undecided".

    Args:
        interval: of `t_interval`, at `level`.
        p: of `sign_flip_p`.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    if bound is not None and -bound < low and high < bound:
        return "tie"
    if p > 1 - level + 1e-12:  # 1 - 0.95 is a little more than 0.05 in binary, 1 - 0.9 a little less than 0.1
        return "undecided"
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def smallest_detectable(sd: float, n: int) -> float:
    """The mean difference that n subjects show with 80 % probability at 5 %: 2.8 sd / sqrt(n)."""
    return 2.8 * sd / n**0.5


def subjects_needed(sd: float, bound: float) -> int:
    """How many subjects show a mean difference of `bound`, as `smallest_detectable`; at least six (see `verdict`).

    Args:
        sd: of the differences over subjects.
    """
    return max(6, math.ceil((2.8 * sd / bound) ** 2))


@dataclass(frozen=True)
class Spread:
    """Standard deviations of one score or difference, taken apart; None: not known."""

    subject: float | None
    seed: float | None


def spread(table: ArrayLike) -> Spread:
    """Between subjects and between seeds, by the analysis of variance of a balanced table.

    Args:
        table: (subjects, seeds). The seeds' part takes two or more of them, the subjects' two or more subjects;
            a part below zero is zero. With one seed, the subjects' part holds the seeds' too.
    """
    values = np.asarray(table, dtype=np.float64)
    subjects, seeds = values.shape
    within = float(values.var(axis=1, ddof=1).mean()) if seeds > 1 else None
    between = float(values.mean(axis=1).var(ddof=1)) if subjects > 1 else None
    apart = None if between is None else max(0.0, between - (within or 0.0) / seeds)
    return Spread(None if apart is None else apart**0.5, None if within is None else within**0.5)


def repeat_sd(first: ArrayLike, second: ArrayLike) -> float | None:
    """Standard deviation of one run around what all its repetitions would give: (N,), (N,) -> sqrt(mean d^2 / 2)."""
    d = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(np.sqrt(np.mean(d**2) / 2)) if len(d) else None


def _checked(differences: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0:
        raise ValueError(f"differences must be one number per subject, not of shape {d.shape}")
    if not np.isfinite(d).all():
        raise ValueError("a difference is not a number; a run that diverged needs a score of its own, not a gap")
    return d


def _rounding(d: NDArray[np.float64]) -> float:
    """Below this, a sum or spread of these numbers is rounding error."""
    return 1e-12 * float(np.abs(d).max())
