"""A table of text, which the page and the Markdown show alike, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Table:
    """Text in rows."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.heads) for row in self.rows), self.title


def number(value: float, sign: str = "") -> str:
    return f"{round(value, 3) + 0.0:{sign}.3f}"  # no -0.000


def interval(ends: tuple[float, float] | None, sign: str) -> str:
    return "" if ends is None else f"{number(ends[0], sign)} to {number(ends[1], sign)}"


def median(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{float(np.median(known)):.{digits}f}" if known else ""


def decades(value: float | tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else "{:.2f} to {:.2f}".format(*value)
