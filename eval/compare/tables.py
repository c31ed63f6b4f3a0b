"""What a comparison found as tables of text, which the page and the Markdown show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from singlora_diffusion.adapters.budget import TOLERANCE

from ..prompt_kinds import KINDS
from .grid import BASE
from .results import Results, base_mean, label
from .robustness import NEAR
from .scores import SCORES
from .verdicts import Row


@dataclass(frozen=True)
class Table:
    """Text in rows."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def decisions(found: Results) -> list[Table]:
    """A table for each primary metric."""
    heads = (
        "method",
        "score",
        "95 % interval",
        "difference",
        "95 % interval, t",
        "95 % interval, bootstrap",
        "p",
        "adjusted p",
        "wins : losses",
        "verdict",
        "subjects needed",
    )
    return [
        Table(
            f"{SCORES[metric].label}: {SCORES[metric].description}",
            heads,
            (_base(found, metric), *(_decision(row) for row in found.rows if row.metric == metric)),
            f"Difference: against {label(found.methods[0])}, paired by subject. p: exact sign-flip test over subjects; "
            f"adjusted: Holm over {len(found.plan.settings.decision.primary)} scores and {len(found.methods) - 1} "
            f"methods. Equal within {found.plan.settings.decision.bound:g}, a bound named beforehand. Subjects needed: "
            f"to show a difference of that size with 80 % probability.",
        )
        for metric in dict.fromkeys(row.metric for row in found.rows)
        if metric in found.plan.settings.decision.primary
    ]


def _base(found: Results, metric: str) -> tuple[str, ...]:
    mean = base_mean(found, metric)
    return (label(BASE), "" if mean is None else _number(mean), *[""] * 9)


def _decision(row: Row) -> tuple[str, ...]:
    shown = (label(row.method), _number(row.mean), _interval(row.interval, ""))
    if row.difference is None:
        return (*shown, *[""] * 8)
    d = row.difference
    return (
        *shown,
        _number(d.mean, "+"),
        _interval(d.t_interval, "+"),
        _interval(d.bootstrap_interval, "+"),
        f"{d.p:.3g}",
        "" if row.adjusted is None else f"{row.adjusted:.3g}",
        f"{d.wins} : {d.losses}",
        d.verdict,
        "" if row.needed is None else str(row.needed),
    )


def others(found: Results) -> Table:
    """All other metrics: a row for each, with every method's mean and its difference from the first."""
    primary = found.plan.settings.decision.primary
    metrics = [metric for metric in dict.fromkeys(row.metric for row in found.rows) if metric not in primary]
    by_place = {(row.metric, row.method): row for row in found.rows}
    rows = []
    for metric in metrics:
        base = base_mean(found, metric)
        cells = [_with_difference(by_place[metric, method]) for method in found.methods]
        rows.append((SCORES[metric].label, "" if base is None else _number(base), *cells))
    about = [
        f"{SCORES[metric].label}: {SCORES[metric].description} ({SCORES[metric].unit}, "
        f"{'higher' if SCORES[metric].higher_is_better else 'lower'} is better)."
        for metric in metrics
    ]
    note = DIFFERENCE.format(label(found.methods[0])) + " "
    heads = ("score", label(BASE), *map(label, found.methods))
    return Table("Other scores", heads, tuple(rows), note + " ".join(about))


def kinds(found: Results) -> Table:
    """The primary scores by kind of prompts."""
    rows = []
    for name, own in found.kinds.items():
        by_place = {(row.metric, row.method): row for row in own}
        for metric in found.plan.settings.decision.primary:
            if (metric, found.methods[0]) in by_place:
                cells = [_with_difference(by_place[metric, method]) for method in found.methods]
                rows.append((KINDS[name], SCORES[metric].label, *cells))
    note = "By the words of a prompt. Likeness ought to be lower where the subject itself is to change. " + DIFFERENCE
    return Table(
        "Scores by kind of prompt",
        ("prompts of", "score", *map(label, found.methods)),
        tuple(rows),
        note.format(label(found.methods[0])),
    )


DIFFERENCE = "Below each mean: its difference from {} and the 95 % interval, not adjusted."


def _with_difference(row: Row) -> str:
    """In two lines, where there is a difference."""
    if row.difference is None:
        return _number(row.mean)
    sign = 1.0 if SCORES[row.metric].higher_is_better else -1.0
    text = f"{_number(row.mean)}\n{_number(sign * row.difference.mean, '+')}"
    if row.difference.t_interval is None:
        return text
    low, high = sorted(sign * end for end in row.difference.t_interval)
    return f"{text} ({_number(low, '+')} to {_number(high, '+')})"


def costs(found: Results) -> Table:
    """What each method trains, at which rate, how fast."""
    rows = []
    for method in found.methods:
        size, choice = found.plan.sizes[method], found.choices.get(method)
        runs = [one.record for one in (*found.tuned, *found.tested) if one.cell.method == method]
        off = f" ({size.deviation:+.1%}{', off the budget' if abs(size.deviation) > TOLERANCE else ''})"
        rows.append(
            (
                label(method),
                str(size.rank),
                f"{size.parameters:,}{off}",
                "" if choice is None else f"{choice.rate:g}{' (edge of the grid)' if choice.at_the_edge else ''}",
                _median([run["seconds_per_step"] for run in runs], 3),
                _median([run["processor_seconds_per_step"] for run in runs], 3),
                _median([run["peak_bytes"] and run["peak_bytes"] / 1e6 for run in runs], 0),
                f"{sum(run['diverged'] is not None for run in runs)} of {len(runs)}",
            )
        )
    heads = ("method", "rank", "trained parameters", "learning rate", "seconds a step", "processor seconds a step")
    return Table(
        "Size and cost",
        (*heads, "peak memory, MB", "diverged"),
        tuple(rows),
        "Rank: block size for OFT; a layer that it does not divide has the nearest that does. Seconds and memory: "
        "medians over trainings; memory is of the whole process, base model and encoders included. A training that "
        "diverged scores what the base model scores.",
    )


def robustness(found: Results) -> Table:
    """How much scores depend on the rate."""
    rows = tuple(
        (
            label(curve.method),
            SCORES[curve.metric].label,
            f"{curve.rates[0]:g} to {curve.rates[-1]:g}",
            f"{curve.width:.2f}",
            "" if curve.width_interval is None else "{:.2f} to {:.2f}".format(*curve.width_interval),
            "" if curve.between_rates is None else _number(curve.between_rates),
            str(curve.scores.shape[0]),
            str(curve.scores.shape[1]),
        )
        for curve in found.curves
    )
    heads = ("method", "score", "rates", f"decades within {NEAR:.0%} of the best", "95 % interval", "sd between rates")
    return Table(
        "Robustness to the learning rate",
        (*heads, "subjects", "seeds"),
        rows,
        "On the tuning subjects. The interval is a bootstrap over subjects. A score that is best at the edge of the "
        "grid, such as agreement with the prompt where next to nothing has been learned, has no width worth the name. "
        "Sd between rates: that of the seeds taken out, so it takes two seeds.",
    )


def spreads(found: Results) -> Table:
    """Where differences come from."""
    rows = tuple(
        (
            SCORES[row.metric].label,
            label(row.method),
            "" if row.spread.subject is None else _number(row.spread.subject),
            "" if row.spread.seed is None else _number(row.spread.seed),
            "" if row.metric not in found.noise else _number(2**0.5 * found.noise[row.metric]),
        )
        for row in found.rows
        if row.difference is not None and row.metric in found.plan.settings.decision.primary
    )
    return Table(
        "Where the differences vary",
        ("score", "method", "sd over subjects", "sd over seeds", "sd of numerical noise"),
        rows,
        f"Of differences from {label(found.methods[0])}. With one seed, subjects and seeds cannot be told apart. "
        f"Numerical noise: the same trainings with another number of threads, sqrt(2) times that of a score.",
    )


def all_tables(found: Results) -> list[Table]:
    """In the order of the page; those without rows left out."""
    made = [*decisions(found), others(found), kinds(found), costs(found), robustness(found), spreads(found)]
    return [table for table in made if table.rows and len(table.heads) > 1]


def _number(value: float, sign: str = "") -> str:
    return f"{round(value, 3) + 0.0:{sign}.3f}"  # no -0.000


def _interval(ends: tuple[float, float] | None, sign: str) -> str:
    return "" if ends is None else f"{_number(ends[0], sign)} to {_number(ends[1], sign)}"


def _median(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{float(np.median(known)):.{digits}f}" if known else ""
