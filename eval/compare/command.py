"""What `singlora compare` does: tune, compare, report; what is done already is not done again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from singlora_diffusion import files
from singlora_diffusion.settings import command_line, replaced
from singlora_diffusion.terminal import escaped

from . import cell as cells
from . import engines, estimate, grid, page, records, results, scoring, subjects, tuning, verdicts
from .grid import Cell, Plan
from .results import Results
from .settings import CompareSettings, check
from .subjects import Subjects
from .tuning import Choice


def compare(settings: CompareSettings) -> None:
    """Run what is missing of the comparison and write its report.

    Raises:
        UserError: settings, subjects or models that do not work, or a folder of another comparison.
    """
    check(settings)
    out = settings.run.output_dir
    files.check_writable(out, "--output_dir")
    with nullcontext() if settings.run.report_only else files.locked(out, "a comparison"):
        known = subjects.read(settings.who, out / "subjects")
        plan = grid.plan(settings, known)
        width = max(14, *map(len, plan.sizes))
        for method, size in plan.sizes.items():
            print(f"{method:<{width}} rank {size.rank:<4} {size.parameters:,} parameters ({size.deviation:+.1%})")
        scoring.check(plan)
        bases = list(grid.base_cells((*known.tuning, *known.test)))
        tune = list(grid.tuning_cells(settings, known.tuning))
        if settings.run.plan:
            _plan(plan, known, bases, tune)
            return
        _run(plan, bases, "base model")  # whose images all others are held against
        _run(plan, tune, "tuning")
        choices = _choices(plan, tune)
        for method, choice in choices.items():
            edge = ", at the edge of its grid" if choice.at_the_edge else ""
            print(f"{method:<{width}} learning rate {choice.rate:g}{edge}")
        test = list(grid.test_cells(settings, known.test, choices))
        again = list(grid.noise_cells(settings, test)) if choices else []
        if choices:
            _run(plan, [*test, *again], "comparison")
        _report(results.gather(plan, bases, tune, test, again, choices))


def _choices(plan: Plan, tune: Sequence[Cell]) -> dict[str, Choice]:
    """Each method's rate; empty as long as the tuning is not done."""
    tuned = records.done(plan, tune)
    return tuning.choose(plan.settings, (one.record for one in tuned)) if len(tuned) == len(tune) else {}


def _plan(plan: Plan, known: Subjects, bases: Sequence[Cell], tune: Sequence[Cell]) -> None:
    """Say how long all of it takes, from one training at least."""
    choices = _choices(plan, tune)
    test = list(grid.test_cells(plan.settings, known.test, choices))
    everything = [*bases, *tune, *test, *grid.noise_cells(plan.settings, test)]
    todo = [cell for cell in (everything if choices else tune) if not cells.is_done(plan, cell)]
    if todo and estimate.estimate(plan, everything) is None:
        alone = replace(plan, settings=replaced(plan.settings, workers=1))
        _run(alone, [Cell(todo[0].subject, grid.BASE)], "base model")
        _run(alone, todo[:1], "one training")
    found = estimate.estimate(plan, everything)
    print(estimate.sentence(found, plan.settings.run.workers) if found else "all cells are done")


def _report(found: Results) -> None:
    for row in found.rows:
        if row.adjusted is not None:
            print(verdicts.sentence(row, results.label, found.methods[0]))
    print(results.state(found))
    settings = found.plan.settings
    model = settings.training.pretrained_model_name_or_path
    title = f"{len(found.methods)} adapters at one budget, on {model}"
    for path in page.write(found, title, [command_line("compare", replaced(settings, report_only=False))]):
        print(f"written: {escaped(path, 4096)}")


def _run(plan: Plan, todo: Sequence[Cell], what: str) -> None:
    """Run those that are not done."""
    missing = [cell for cell in todo if not cells.is_done(plan, cell)]
    scored = len(records.done(plan, missing))
    more = f", {scored} more lack a score or a size that is new" if scored else ""
    print(f"{what}: {len(todo)} cells, {len(todo) - len(missing)} of them there already{more}", flush=True)
    if plan.settings.run.report_only:
        return
    began = time.monotonic()
    for number, cell in enumerate(engines.engine(plan)(plan, missing), start=1):
        left = (time.monotonic() - began) / number * (len(missing) - number)
        print(f"{number}/{len(missing)} {_told(plan, cell)}, {_clock(left)} left", flush=True)


def _told(plan: Plan, cell: Cell) -> str:
    record = cells.known(plan, cell)
    scores = " ".join(f"{name} {record['scores'][name]:.3f}" for name in plan.settings.decision.primary)
    diverged = " (diverged)" if record["diverged"] else ""
    return escaped(f"{cell.subject} {cell.method} {cell.name}{diverged}: {scores}", 400)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
