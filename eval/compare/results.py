"""Everything that a comparison has found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import methods as method_names
from . import records, robustness, verdicts
from .grid import BASE, Cell, Plan
from .records import Done, Tables
from .robustness import Curve
from .settings import learning_rates
from .tuning import Choice
from .verdicts import Row


@dataclass(frozen=True)
class Results:
    """What is known so far."""

    plan: Plan
    choices: dict[str, Choice]
    """Empty as long as the tuning is not done."""
    tuned: list[Done]
    tested: list[Done]
    bases: list[Done]
    tables: Tables
    rows: list[Row]
    kinds: dict[str, list[Row]]
    """Rows by kind of prompts; empty where all are of one kind."""
    curves: list[Curve]
    """Over the learning rate."""
    over_size: list[Curve]
    """Over the size of the update."""
    at_equal_sizes: list[Curve]
    """The same at sizes that all methods reach."""
    noise: dict[str, float]
    planned: int
    """Cells of a method, all in all."""

    @property
    def methods(self) -> tuple[str, ...]:
        return self.plan.settings.what.methods

    @property
    def is_whole(self) -> bool:
        return len(self.tuned) + len(self.tested) == self.planned


def label(method: str) -> str:
    """As in "SingLoRA offset"."""
    return "base model" if method == BASE else method_names.label(method)


def state(found: Results) -> str:
    """How much of the comparison there is."""
    done, n, seeds = len(found.tuned) + len(found.tested), len(found.tables.subjects), len(found.tables.seeds)
    partial = "" if found.is_whole else "Partial: "
    over = f"n = {n} subjects, {seeds} training seed{'s' * (seeds != 1)}"
    tuned = len({one.cell.subject for one in found.tuned})
    return f"{partial}{done} of {found.planned} trainings are done. {over}; learning rates tuned on {tuned} others."


def base_mean(found: Results, metric: str) -> float | None:
    """Of the base model on the subjects that the methods are compared on; None where it is not known."""
    values = [one.scores.get(metric) for one in found.bases if one.cell.subject in found.tables.subjects]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def gather(
    plan: Plan,
    bases: Sequence[Cell],
    tune: Sequence[Cell],
    test: Sequence[Cell],
    again: Sequence[Cell],
    choices: dict[str, Choice],
) -> Results:
    """Read the cells that are done.

    Args:
        again: cells of the test with another number of threads.
        choices: empty as long as the tuning is not done.
    """
    settings, methods = plan.settings, plan.settings.what.methods
    tuned, tested = records.done(plan, tune), records.done(plan, test) if choices else []
    tables = records.tables(methods, tested)
    decision = settings.decision
    kinds = {
        name: verdicts.rows(records.tables(methods, own), decision.bound, ())
        for name, own in records.by_kind(plan, tested).items()
    }
    grids = learning_rates(settings.what)
    over_size = robustness.over_size(grids, decision.primary, tuned)
    return Results(
        plan=plan,
        choices=choices,
        tuned=tuned,
        tested=tested,
        bases=records.done(plan, bases),
        tables=tables,
        rows=verdicts.rows(tables, decision.bound, decision.primary),
        kinds=kinds,
        curves=robustness.curves(grids, decision.primary, tuned),
        over_size=over_size,
        at_equal_sizes=robustness.at_equal_sizes(over_size, methods, settings.what.rates),
        noise=verdicts.noise(tested, records.done(plan, again)),
        planned=len(tune) + len(test),
    )
