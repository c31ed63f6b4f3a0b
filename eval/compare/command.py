"""What `singlora compare` does: tune, compare, report; what is done already is not done again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice

from singlora_diffusion import files
from singlora_diffusion.terminal import escaped

from . import cell as cells
from . import engines, grid, subjects, tuning
from .grid import Cell, Plan
from .settings import CompareSettings, check


def compare(settings: CompareSettings) -> None:
    """Run what is missing of the comparison and write its report.

    Raises:
        UserError: settings, subjects or models that do not work, or a folder of another comparison.
    """
    check(settings)
    out = settings.run.output_dir
    files.check_writable(out, "--output_dir")
    with files.locked(out, "a comparison"):
        known = subjects.read(settings.who, out / "subjects")
        plan = grid.plan(settings, known)
        for method, size in plan.sizes.items():
            print(f"{method:<14} rank {size.rank:<4} {size.parameters:,} parameters ({size.deviation:+.1%})")
        tune = list(grid.tuning_cells(settings, known.tuning))
        left = settings.run.cells or None
        first = [*grid.base_cells((*known.tuning, *known.test)), *tune]
        done = _run(plan, first, left, "tuning")
        if left is not None:
            left -= done
        if _missing(plan, first):
            print(f"{len(_missing(plan, first))} cells of the tuning are left: the same command goes on")
            return
        chosen = tuning.choose(settings.what, (cells.known(plan, cell) for cell in tune))
        for method, choice in chosen.items():
            edge = ", at the edge of its grid" if choice.at_the_edge else ""
            print(f"{method:<14} learning rate {choice.rate:g}{edge}")
        test = list(grid.test_cells(settings, known.test, {name: choice.rate for name, choice in chosen.items()}))
        _run(plan, [*test, *grid.noise_cells(settings, test)], left, "comparison")


def _missing(plan: Plan, todo: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in todo if not cells.is_done(plan, cell)]


def _run(plan: Plan, todo: Sequence[Cell], most: int | None, what: str) -> int:
    """Run those that are not done, at most so many; returns how many were run."""
    missing = list(islice(_missing(plan, todo), most))
    print(f"{what}: {len(todo)} cells, {len(todo) - len(missing)} of them there already", flush=True)
    began = time.monotonic()
    for number, cell in enumerate(engines.engine(plan)(plan, missing), start=1):
        left = (time.monotonic() - began) / number * (len(missing) - number)
        print(f"{number}/{len(missing)} {_told(plan, cell)}, {_clock(left)} left", flush=True)
    return len(missing)


def _told(plan: Plan, cell: Cell) -> str:
    record = cells.known(plan, cell)
    scores = " ".join(f"{name} {value:.3f}" for name, value in record["scores"].items() if value is not None)
    diverged = " (diverged)" if record["diverged"] else ""
    return escaped(f"{cell.subject} {cell.method} {cell.name}{diverged}: {scores}", 400)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
