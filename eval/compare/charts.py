"""The plots of a comparison as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..plots import FAINT, GRID, INK, SOFT, panel, round_numbers
from .records import Tables
from .robustness import Curve
from .scores import SCORES
from .verdicts import Row

Label = Callable[[str], str]


def differences(
    metric: str, tables: Tables, rows: Sequence[Row], label: Label, colours: Mapping[str, str], bound: float
) -> str:
    """A line per method: a dot per subject, and the mean with its interval; the band is what does not matter."""
    sign = 1.0 if SCORES[metric].higher_is_better else -1.0
    first, *others = tables.scores[metric]
    base = tables.scores[metric][first]
    title = f"{SCORES[metric].label}: better than {label(first)} by"
    with panel(title, 0.9 + 0.42 * len(others)) as (axes, finish):
        axes.axvspan(-bound, bound, color=GRID, zorder=0)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
        for place, method in enumerate(others):
            each = sign * (tables.scores[metric][method] - base).mean(axis=1)
            axes.plot(each, [place + 0.16] * len(each), "o", color=colours[method], alpha=0.5, markersize=4, zorder=2)
            found = next(row.difference for row in rows if (row.method, row.metric) == (method, metric))
            if found and found.t_interval:
                axes.plot(found.t_interval, [place - 0.12] * 2, color=colours[method], linewidth=2, zorder=3)
            axes.plot([each.mean()], [place - 0.12], "D", color=colours[method], markersize=5.5, zorder=4)
        axes.set_ylim(len(others) - 0.4, -0.6)
        axes.set_yticks(range(len(others)), [label(method) for method in others])
        axes.locator_params(axis="x", nbins=5)
        return finish(f"{title}: dots are subjects, diamonds means with 95 % intervals")


def plane(across: str, up: str, tables: Tables, colours: Mapping[str, str]) -> str:
    """Two scores against each other: a point per method with its standard errors over subjects."""
    title = f"{SCORES[up].label} against {SCORES[across].label}"
    with panel(title, 3.6) as (axes, finish):
        for method, scores in tables.scores[across].items():
            x, y = scores.mean(axis=1), tables.scores[up][method].mean(axis=1)
            errors = [float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0 for v in (x, y)]
            axes.errorbar(x.mean(), y.mean(), errors[1], errors[0], fmt="o", color=colours[method], linewidth=1)
        axes.margins(0.12)
        axes.locator_params(nbins=6)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_xlabel(SCORES[across].label, fontsize=9, color=SOFT)
        return finish(f"{title}: better is up and to the right; bars are standard errors over subjects")


def rates(metric: str, over: str, curves: Sequence[Curve], colours: Mapping[str, str]) -> str:
    """A score over the learning rate or what follows from it, a line per method; the band is one standard error over
    subjects."""
    title = f"{SCORES[metric].label} over the {over}"
    with panel(title, 3.4) as (axes, finish):
        for curve in (curve for curve in curves if curve.metric == metric):
            each = curve.scores.mean(axis=1)  # (subjects, rates)
            error = each.std(axis=0, ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.zeros(len(curve.rates))
            colour = colours[curve.method]
            axes.fill_between(
                curve.rates, curve.means - error, curve.means + error, color=colour, alpha=0.12, linewidth=0
            )
            axes.plot(curve.rates, curve.means, "o-", color=colour, markersize=4, linewidth=1.6)
        axes.set_xscale("log")
        axes.minorticks_off()
        low, high = axes.get_xlim()
        decades = [10.0**power for power in range(-12, 9) if low <= 10.0**power <= high]
        ticks = decades if len(decades) > 1 else round_numbers(low, high)[::2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines["bottom"].set_color(FAINT)
        axes.set_xlabel(over, fontsize=9, color=SOFT)
        return finish(title)
