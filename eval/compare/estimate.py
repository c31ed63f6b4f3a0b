"""How long a comparison takes, from what its cells have taken so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import cell as cells
from .grid import BASE, Cell, Plan


@dataclass(frozen=True)
class Estimate:
    """The time of one worker for all cells that are not done."""

    hours: float
    cells: int
    """Not done."""
    measured: int
    """Trainings whose time is known."""
    training: float
    """Seconds of a cell's training, images and scores, medians over those."""
    images: float
    scores: float
    machine: str
    """On which the last of them ran."""


def estimate(plan: Plan, todo: Sequence[Cell]) -> Estimate | None:
    """Each cell that is not done takes what the median cell of its method took, or of all methods if it has none.

    Args:
        todo: all cells of the comparison, done or not.

    Returns:
        None as long as no training has been measured from its beginning to its scores.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    missing, machine = [], ""
    for cell in todo:
        record = cells.read(plan, cell)
        if record is None or cells.lacking(plan, cell, record):
            missing.append(cell)
        elif "seconds" in record and cell.method != BASE:
            found.setdefault(cell.method, []).append(record["seconds"])
            machine = record["machine"]
    measured = [one for of_method in found.values() for one in of_method]
    if not measured:
        return None
    training, images, scores = (float(np.median([one[name] for one in measured])) for name in cells.PHASES)
    known = {method: float(np.median([sum(one.values()) for one in of_method])) for method, of_method in found.items()}
    known[BASE] = images + scores
    seconds = sum(known.get(cell.method, training + images + scores) for cell in missing)
    return Estimate(seconds / 3600, len(missing), len(measured), training, images, scores, machine)


def sentence(found: Estimate, workers: int) -> str:
    """As in "344 cells to do: about 21.3 hours of an NVIDIA A100 (...)"."""
    shared = f", {found.hours / workers:.1f} for each of {workers} workers" if workers > 1 else ""
    return (
        f"{found.cells} cells to do: about {found.hours:.1f} hours on {found.machine}{shared}. A cell: "
        f"{found.training:.0f} s of training, {found.images:.0f} s of images, {found.scores:.0f} s of scores, medians "
        f"of {found.measured}."
    )
