"""Tables of how much scores depend on the learning rate, and on how far it moves the weights."""

from __future__ import annotations

from collections.abc import Sequence

from .. import statistics
from . import robustness as robust
from .results import Results, label
from .robustness import NEAR, Curve
from .scores import SCORES
from .table import Table, decades, interval, number
from .verdicts import LEVEL

SIZE = "||W' - W_start|| / ||W0||"
CURVES = (f"decades within {NEAR:.0%} of the best", "95 % interval", "sd between rates", "subjects", "seeds")


def all_tables(found: Results) -> list[Table]:
    """In the order of the page."""
    return [over_rate(found), over_size(found), together(found), at_equal_sizes(found)]


def over_rate(found: Results) -> Table:
    """How much scores depend on the rate."""
    return Table(
        "Robustness to the learning rate",
        ("method", "score", "rates", *CURVES),
        tuple((label(c.method), SCORES[c.metric].label, _range(c.rates), *_curve(c)) for c in found.curves),
        "On the tuning subjects. The interval is a bootstrap over subjects. A score that is best at the edge of the "
        "grid, such as agreement with the prompt where next to nothing has been learned, has no width worth the name. "
        "Sd between rates: that of the seeds taken out, so it takes two seeds.",
    )


def together(found: Results) -> Table:
    """How much of the grid is good by all primary scores."""
    names = " and ".join(SCORES[metric].label for metric in found.plan.settings.decision.primary)
    rows = []
    for curves in (found.curves, found.over_size):
        for row in robust.together(curves):
            what = "learning rate" if curves is found.curves else "size of the update"
            numbers = (row.all_near, row.all_near_interval, row.product, row.product_interval)
            rows.append((label(row.method), what, *map(decades, numbers)))
    heads = (f"{names}, each within {NEAR:.0%} of its best", f"their product within {NEAR:.0%} of its best")
    return Table(
        "Robustness by all scores at once",
        ("method", "decades of", heads[0], "95 % interval", heads[1], "95 % interval"),
        tuple(rows),
        "The product is what rates are tuned by. 0.00: no rate is as near to the best of each.",
    )


def over_size(found: Results) -> Table:
    """The same over the size of the update."""
    return Table(
        "Robustness to the size of the update",
        ("method", "score", SIZE, *CURVES),
        tuple((label(c.method), SCORES[c.metric].label, _range(c.rates), *_curve(c)) for c in found.over_size),
        f"One learning rate moves the weights of one method farther than those of another. {SIZE}: Frobenius norms, "
        f"the median over layers, then the geometric mean over subjects and seeds at each rate of the grid. W_start is "
        f"W0 for all but SingLoRA as the paper starts it (and balanced): there it is W0 and the product of the random "
        f"start, which is a change of the weights, but nothing that was learned.",
    )


def at_equal_sizes(found: Results) -> Table:
    """The methods at sizes of the update that all of them reach."""
    first, rows = found.methods[0], []
    by_place = {(curve.metric, curve.method): curve for curve in found.at_equal_sizes}
    for curve in found.at_equal_sizes:
        against, difference = by_place[curve.metric, first], ("", "")
        if curve.method != first:
            each = (curve.scores - against.scores).mean(axis=(1, 2))
            difference = (number(float(each.mean()), "+"), interval(statistics.t_interval(each, LEVEL), "+"))
        at = [f"{number(float(mean))}" for mean in curve.means]
        rows.append((label(curve.method), SCORES[curve.metric].label, *at, *difference, _curve(curve)[2]))
    sizes = [f"{size:.2g}" for size in found.at_equal_sizes[0].rates] if found.at_equal_sizes else []
    return Table(
        "At equal sizes of the update",
        (
            "method",
            "score",
            *(f"at {size}" for size in sizes),
            f"minus {label(first)}",
            "95 % interval",
            "sd between sizes",
        ),
        tuple(rows),
        f"{SIZE} from the largest of the methods' smallest to the smallest of their largest; between the rates of its "
        f"grid a score is taken as linear in the logarithm of the size, and nothing is extrapolated. On the tuning "
        f"subjects; the difference is the mean over the sizes, paired by subject, not adjusted.",
    )


def _curve(curve: Curve) -> tuple[str, ...]:
    """As `CURVES` says."""
    between = "" if curve.between_rates is None else number(curve.between_rates)
    return (decades(curve.width), decades(curve.width_interval), between, *map(str, curve.scores.shape[:2]))


def _range(rates: Sequence[float]) -> str:
    return f"{rates[0]:.3g} to {rates[-1]:.3g}"
