"""How far a training is, read from its folder: whoever asks, whenever, and whether or not it still runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import files
from ..errors import UserError
from ..training import best, log_file, run_folder

RECENT = 50
"""Steps by whose pace the time that is left is told."""


@dataclass
class Log:
    """A run's log, of which only what is new is read each time. Equal steps of one run have equal lines."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    """Bytes."""
    file: int = 0
    """Which file it was, by the number that its file system gives it."""
    alone: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Several pages may look at once; a line that two of them read would count twice."""

    def update(self) -> list[dict[str, Any]]:
        """All rows. Where a run has gone on from an earlier step, the file is read anew."""
        with self.alone:
            return self._update()

    def _update(self) -> list[dict[str, Any]]:
        found = self.path.stat() if self.path.exists() else None
        size, number = (found.st_size, found.st_ino) if found else (0, 0)
        if size < self.read or number != self.file:
            self.rows, self.read, self.file = [], 0, number
        if size > self.read:
            with self.path.open("rb") as file:
                file.seek(self.read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            rows = [row for line in whole.splitlines(keepends=True) if (row := log_file.parsed(line)) is not None]
            if self.read and rows and self.rows and rows[0]["step"] != self.rows[-1]["step"] + 1:
                self.rows, self.read = [], 0
                return self._update()
            self.rows, self.read = [*self.rows, *rows], self.read + len(whole)
        return self.rows


@dataclass(frozen=True)
class Progress:
    """What a run's folder says.

    Attributes:
        recipe: recipe.json, empty before the first step.
        seconds: that the steps took, over all processes that did them.
        left: seconds that the other steps will take; None before there is a pace.
        previews: the images, the oldest first.
        checkpoints: their steps.
        adapter: the finished adapter's file.
        best: the step that was best so far, and the figures of its validation.
    """

    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    seconds: float
    left: float | None
    previews: tuple[Path, ...]
    checkpoints: tuple[int, ...]
    adapter: Path | None
    best: best.Kept | None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total(self) -> int:
        """Steps that are to be done; 0 where that is not known yet."""
        return int(self.recipe.get("max_train_steps", 0))


def read(run: Path, log: Log | None = None) -> Progress:
    """A run as it stands.

    Args:
        log: from the call before, so that only what is new is read.
    """
    try:
        recipe = files.read_json(run / run_folder.RECIPE)
    except UserError:
        recipe = {}
    rows = (log or Log(run / log_file.NAME)).update()
    adapter = run / run_folder.ADAPTER
    return Progress(
        recipe=recipe,
        rows=rows,
        seconds=float(rows[-1].get("seconds", 0.0)) if rows else 0.0,
        left=_left(rows, int(recipe.get("max_train_steps", 0))),
        previews=tuple(sorted((run / run_folder.PREVIEWS).glob("step-*.png"))),
        checkpoints=tuple(run_folder.step_of(path) for path in run_folder.checkpoints(run)),
        adapter=adapter if adapter.exists() else None,
        best=best.find(run) if (run / run_folder.BEST).is_dir() else None,
    )


def _left(rows: list[dict[str, Any]], total: int) -> float | None:
    if len(rows) < 2:
        return None
    seconds = [row["seconds"] for row in rows[-RECENT:]]
    took = sorted(after - before for before, after in pairwise(seconds))
    while len(took) > 2 and took[-1] > sum(took[:-1]):  # longer than all others together: a pause
        took.pop()
    return max(0.0, sum(took) / len(took) * (total - rows[-1]["step"]))
