"""What a comparison found as tables."""

from __future__ import annotations

from collections.abc import Sequence

from singlora_diffusion.adapters.budget import TOLERANCE

from ..prompt_kinds import KINDS
from . import rate_tables
from .grid import BASE
from .records import Done
from .results import Results, base_mean, label
from .scores import SCORES
from .table import Table, interval, median, number
from .verdicts import Row


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
    return (label(BASE), "" if mean is None else number(mean), *[""] * 9)


def _decision(row: Row) -> tuple[str, ...]:
    shown = (label(row.method), number(row.mean), interval(row.interval, ""))
    if row.difference is None:
        return (*shown, *[""] * 8)
    d = row.difference
    return (
        *shown,
        number(d.mean, "+"),
        interval(d.t_interval, "+"),
        interval(d.bootstrap_interval, "+"),
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
        rows.append((SCORES[metric].label, "" if base is None else number(base), *cells))
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
        return number(row.mean)
    sign = 1.0 if SCORES[row.metric].higher_is_better else -1.0
    text = f"{number(row.mean)}\n{number(sign * row.difference.mean, '+')}"
    if row.difference.t_interval is None:
        return text
    low, high = sorted(sign * end for end in row.difference.t_interval)
    return f"{text} ({number(low, '+')} to {number(high, '+')})"


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
                _sizes([one for one in found.tested if one.cell.method == method]),
                median([run["seconds_per_step"] for run in runs], 3),
                median([run["processor_seconds_per_step"] for run in runs], 3),
                median([run["peak_bytes"] and run["peak_bytes"] / 1e6 for run in runs], 0),
                f"{sum(run['diverged'] is not None for run in runs)} of {len(runs)}",
            )
        )
    heads = (
        "method",
        "rank",
        "trained parameters",
        "learning rate",
        "update",
        "seconds a step",
        "processor seconds a step",
        "peak memory, MB",
        "diverged",
    )
    return Table(
        "Size and cost",
        heads,
        tuple(rows),
        "Rank: block size for OFT; a layer that it does not divide has the nearest that does. Update: "
        "||W' - W0|| / ||W0|| on the test subjects, medians over layers and trainings, and the part of it that was "
        "learned, where that is another. Seconds and memory: "
        "medians over trainings; memory is of the whole process, base model and encoders included. A training that "
        "diverged scores what the base model scores.",
    )


def _sizes(runs: Sequence[Done]) -> str:
    size, learned = (median([one.update(kind) for one in runs], 3) for kind in ("size", "learned"))
    return size if size == learned else f"{size} ({learned} learned)"


def spreads(found: Results) -> Table:
    """Where differences come from."""
    rows = tuple(
        (
            SCORES[row.metric].label,
            label(row.method),
            "" if row.spread.subject is None else number(row.spread.subject),
            "" if row.spread.seed is None else number(row.spread.seed),
            "" if row.metric not in found.noise else number(2**0.5 * found.noise[row.metric]),
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
    made = [
        *decisions(found),
        others(found),
        kinds(found),
        costs(found),
        *rate_tables.all_tables(found),
        spreads(found),
    ]
    return [table for table in made if table.rows and len(table.heads) > 1]
