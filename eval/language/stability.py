"""How much does accuracy depend on the learning rate? The article's claim, on a grid of rates with several seeds.

Per model and method: what remains of the variation between rates once that of the seeds is taken out, what a factor of
two costs at the best rate, and how many decades lie within 1 % of the method's own best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singlora_diffusion.adapters.methods import METHODS

from ..compare.robustness import between_rates, width
from ..plots import FAINT, GRID, SOFT, panel
from ..statistics import Comparison, compare, holm
from .settings import FROZEN

NEAR = 0.01
"""Within this share of the method's own best."""
FIRST = "singlora"
"""The method whose stability is claimed."""
COLOURS = {FROZEN: "#8a9099", "singlora": "#0072b2", "lora": "#d55e00", "lora+": "#009e73", "dora": "#cc79a7"}


@dataclass(frozen=True)
class Curve:
    """Accuracies of a method on a model: (seeds, rates), rates ascending."""

    model: str
    method: str
    rates: tuple[float, ...]
    accuracies: NDArray[np.float64]

    @property
    def means(self) -> NDArray[np.float64]:
        """(rates,)"""
        found: NDArray[np.float64] = self.accuracies.mean(axis=0)
        return found

    @property
    def label(self) -> str:
        """What the method is called."""
        return METHODS[self.method].label if self.method in METHODS else self.method

    @property
    def accuracy_there(self) -> str:
        """At the best rate, in percent: the mean, and the standard deviation over seeds."""
        best = self.accuracies[:, self.best]
        spread = f" ± {100 * best.std(ddof=1):.1f}" if len(best) > 1 else ""
        return f"{100 * best.mean():.1f}{spread}"

    @property
    def best(self) -> int:
        return int(np.argmax(self.means))

    @property
    def at_the_edge(self) -> bool:
        """The best rate is the lowest or the highest: a better one may lie beyond."""
        return self.best in (0, len(self.rates) - 1)

    @property
    def between(self) -> float | None:
        """Standard deviation between rates without that of the seeds; None with one seed."""
        return between_rates(self.accuracies[None])

    @property
    def factor_of_two(self) -> float:
        """What the accuracy loses, at most, from the best rate to those of the grid up to twice or half of it."""
        near = np.abs(np.log2(np.divide(self.rates, self.rates[self.best]))) < 1.01
        return float(self.means[self.best] - self.means[near].min())

    @property
    def window(self) -> float:
        """Decades within `NEAR` of the best, by the means over seeds."""
        return width(self.rates, self.means, NEAR)

    def by_seed(self, measure: str) -> NDArray[np.float64]:
        """(seeds,): `window`, or `range`, the largest less the smallest accuracy, of each seed's own curve."""
        if measure == "window":
            return np.array([width(self.rates, each, NEAR) for each in self.accuracies])
        found: NDArray[np.float64] = np.ptp(self.accuracies, axis=1)
        return found


@dataclass(frozen=True)
class Verdict:
    """SingLoRA less another method, over models and seeds."""

    measure: str
    method: str
    difference: Comparison
    p: float
    """Adjusted for the number of methods and measures (Holm)."""

    @property
    def words(self) -> str:
        low, high = self.difference.t_interval or (float("nan"), float("nan"))
        unit, more, less = ("decades", "wider", "narrower") if self.measure == "window" else ("", "larger", "smaller")
        name = {"window": "window within 1 % of the best", "range": "range of accuracies"}[self.measure]
        clear = self.p <= 0.05 and not low <= 0 <= high
        told = (more if self.difference.mean > 0 else less) if clear else "not told apart"
        scale = 1 if unit else 100
        size = f"{scale * self.difference.mean:+.2f} ({scale * low:+.2f} to {scale * high:+.2f}) {unit or 'points'}"
        return f"{name} against {METHODS[self.method].label}: {told}, {size}, adjusted p {self.p:.3f}"


def verdicts(curves: Sequence[Curve]) -> list[Verdict]:
    """SingLoRA against each other method; the units are models with seeds."""
    methods = [name for name in dict.fromkeys(curve.method for curve in curves) if name not in (FIRST, FROZEN)]
    found: dict[tuple[str, str], Comparison] = {}
    by = {(curve.model, curve.method): curve for curve in curves}
    models = [curve.model for curve in curves if curve.method == FIRST]
    for measure in ("window", "range"):
        for method in methods:
            pairs = [(by[model, FIRST], by[model, method]) for model in models if (model, method) in by]
            if pairs:
                each = [one.by_seed(measure) - other.by_seed(measure) for one, other in pairs]
                found[measure, method] = compare(np.concatenate(each))
    adjusted = holm({f"{measure} {method}": one.p for (measure, method), one in found.items()})
    return [Verdict(*key, one, adjusted[" ".join(key)]) for key, one in found.items()]


def table(curves: Sequence[Curve]) -> list[list[str]]:
    """A row per model and method, a column per statistic; the first row is the heads."""
    heads = ["model", "method", "best rate", "accuracy there", "range", "sd between rates", "factor of 2", "window"]
    rows = [heads]
    for one in curves:
        between = one.between
        rows.append(
            [
                one.model,
                one.label,
                f"{one.rates[one.best]:g}" + (" (edge)" if one.at_the_edge else ""),
                one.accuracy_there,
                f"{100 * np.ptp(one.means):.1f}",
                "" if between is None else f"{100 * between:.1f}",
                f"{100 * one.factor_of_two:.1f}",
                f"{one.window:.2f}",
            ]
        )
    return rows


def plot(model: str, curves: Sequence[Curve]) -> str:
    """SVG: accuracy over the rate, a line per method; the band is from the lowest to the highest seed."""
    with panel(f"{model}: accuracy over the learning rate", 3.6) as (axes, finish):
        for one in (one for one in curves if one.model == model):
            colour = COLOURS.get(one.method, "#333333")
            low, high = one.accuracies.min(axis=0), one.accuracies.max(axis=0)
            axes.fill_between(one.rates, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(one.rates, one.means, "o-", color=colour, markersize=3.5, linewidth=1.6, label=one.label)
        axes.set_xscale("log")
        axes.minorticks_off()
        rates = next(one.rates for one in curves if one.model == model)
        axes.set_xticks(rates[::2], [f"{rate:g}" for rate in rates[::2]])
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines["bottom"].set_color(FAINT)
        axes.set_xlabel("learning rate", fontsize=9, color=SOFT)
        axes.legend(fontsize=7, frameon=False)
        return finish(f"accuracy of {model} over the learning rate, for each method")


def curves(accuracies: Mapping[tuple[str, str, float], Sequence[float]]) -> list[Curve]:
    """Of accuracies by (model, method, rate), one for each seed; of the seeds that all rates of all methods have."""
    seeds = min((len(values) for values in accuracies.values()), default=0)
    pairs = dict.fromkeys((model, method) for model, method, _ in accuracies)
    made = []
    for model, method in pairs if seeds else ():
        rates = tuple(sorted(rate for one, other, rate in accuracies if (one, other) == (model, method)))
        values = [accuracies[model, method, rate][:seeds] for rate in rates]
        made.append(Curve(model, method, rates, np.array(values, dtype=np.float64).T))
    return made
