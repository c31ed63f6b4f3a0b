"""What fine-tunings came to, as tables of text and as curves over the rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import runs as folders
from . import stability
from .settings import Cell
from .stability import Curve

Results = Mapping[Cell, Mapping[str, Any]]


def runs(found: Results) -> list[list[str]]:
    """A row per run."""
    rows = [["model", "method", "rate", "seed", "accuracy", "best epoch's", "diverged", "parameters", "seconds"]]
    for cell, one in found.items():
        about = [folders.label(cell.model), cell.method, f"{cell.rate:g}", str(cell.seed)]
        accuracies = [f"{one['accuracy']:.4f}", f"{one['best_accuracy']:.4f}", "yes" if one["diverged"] else ""]
        rows.append([*about, *accuracies, str(one["parameters"]["adapter"]), f"{one['processor_seconds']:.1f}"])
    return rows


def accuracies(found: Results) -> list[list[str]]:
    """A row per model and method: at the rate with the highest mean, where there are several."""
    rows = [["model", "method", "rate", "accuracy", "adapter's parameters"]]
    for one in curves(found):
        numbers = next(
            result["parameters"]["adapter"]
            for cell, result in found.items()
            if (folders.label(cell.model), cell.method) == (one.model, one.method)
        )
        rows.append([one.model, one.label, f"{one.rates[one.best]:g}", one.accuracy_there, f"{numbers:,}"])
    return rows


def curves(found: Results) -> list[Curve]:
    """Accuracy over the rates by model and method."""
    by: dict[tuple[str, str, float], list[float]] = {}
    for cell, one in found.items():
        by.setdefault((folders.label(cell.model), cell.method, cell.rate), []).append(float(one["accuracy"]))
    ordered: dict[tuple[str, str, float], Sequence[float]] = {
        key: by[key] for key in sorted(by, key=lambda key: (_place(found, 0, key[0]), _place(found, 1, key[1]), key[2]))
    }
    return stability.curves(ordered)


def _place(found: Results, part: int, name: str) -> int:
    """Models and methods in the order in which they were named."""
    return [folders.label(cell[0]) if part == 0 else cell[1] for cell in found].index(name)  # type: ignore[misc]
