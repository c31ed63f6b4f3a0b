"""Scores of cells as tables: by method, subject and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import prompt_kinds
from ..metrics import METRICS
from ..score_file import read_result
from . import cell as cells
from . import scoring
from .grid import Cell, Plan
from .scores import SCORES


@dataclass(frozen=True)
class Done:
    """A cell that is done, and what is known of it."""

    cell: Cell
    record: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, float | None]:
        found: Mapping[str, float | None] = self.record["scores"]
        return found

    def update(self, kind: str) -> float | None:
        """How far the weights were moved, of `Update`'s kinds; None where it is not known or nothing was learned."""
        known: Mapping[str, float] | None = self.record.get(cells.UPDATE)
        return known[kind] if known else None


def done(plan: Plan, todo: Iterable[Cell]) -> list[Done]:
    """Those of the cells that have the scores that decide, in their order."""
    read = ((cell, cells.read(plan, cell)) for cell in todo)
    return [Done(cell, record) for cell, record in read if record is not None and cells.decides(plan, record)]


def by_kind(plan: Plan, found: Iterable[Done]) -> dict[str, list[Done]]:
    """The same cells with the scores of a kind of prompts each; empty where all prompts are of one kind."""
    made: dict[str, list[Done]] = {}
    for one in found:
        rows = read_result(plan.folder(one.cell) / scoring.SCORES).images
        per_image = [name for name in METRICS if all(name in row for row in rows)]
        for name, scores in prompt_kinds.by_kind(rows, per_image).items():
            made.setdefault(name, []).append(Done(one.cell, {"scores": scores}))
    return made


@dataclass(frozen=True)
class Tables:
    """What the methods scored on the same subjects with the same seeds, so that every difference is paired."""

    subjects: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Metric -> method -> (subjects, seeds)."""


def tables(methods: Sequence[str], found: Sequence[Done]) -> Tables:
    """The largest complete table: seeds in order, as long as at least two subjects have all methods with all of them.

    A subject counts once every method is done on it. Metrics that some cell lacks are left out.
    """
    by_place = {(one.cell.method, one.cell.subject, one.cell.seed): one for one in found}
    names = tuple(dict.fromkeys(one.cell.subject for one in found))
    seeds: tuple[int, ...] = ()
    subjects: tuple[str, ...] = ()
    for seed in sorted({one.cell.seed for one in found}):
        more = (*seeds, seed)
        whole = tuple(n for n in names if all((method, n, s) in by_place for method in methods for s in more))
        if seeds and len(whole) < len(subjects):  # subjects are worth more than seeds
            break
        seeds, subjects = more, whole
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    for metric in SCORES:
        cells_ = [by_place[method, n, s].scores.get(metric) for method in methods for n in subjects for s in seeds]
        if cells_ and all(value is not None for value in cells_):
            values = np.array(cells_, dtype=np.float64).reshape(len(methods), len(subjects), len(seeds))
            scores[metric] = dict(zip(methods, values, strict=True))
    return Tables(subjects, seeds, scores)
