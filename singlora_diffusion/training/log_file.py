"""log.jsonl: one line per step, each step once, whatever happens to the program in between."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from .. import files
from ..errors import UserError
from .events import Event, Started, Step

NAME = "log.jsonl"


class LogFile:
    """A listener that appends every step to a file and flushes it, so that a killed run loses none.

    Where a run goes on, the lines of later steps are cut off first, and with them torn and foreign ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None
        self.before = 0.0  # seconds that earlier processes took

    def __call__(self, event: Event) -> None:
        try:
            if isinstance(event, Started):
                self.open(event.step)
            elif isinstance(event, Step):
                self.write(event)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {files.reason(error)}") from error

    def open(self, step: int) -> None:
        """Begin after the line of this step."""
        self.close()
        kept = cut(self.path, step)
        self.before = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, step: Step) -> None:
        assert self.file is not None, "steps come after Started"
        row = {**vars(step), "seconds": self.before + step.seconds}
        self.file.write(json.dumps({key: _plain(value) for key, value in row.items() if value is not None}) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the first line of each step up to this one, in order, and nothing else; returns what the lines say."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    kept = b""
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        row = parsed(line)
        if row is not None and (rows[-1]["step"] if rows else 0) < row["step"] <= step:
            rows.append(row)
            kept += line
    if content.startswith(kept):
        with path.open("r+b") as file:
            file.truncate(len(kept))
    else:
        files.write_bytes(path, kept)
    return rows


def rows(path: Path) -> list[dict[str, Any]]:
    """What the file says, a line a step."""
    return [row for line in path.read_bytes().splitlines(keepends=True) if (row := parsed(line)) is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is torn, or none of ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and "loss" in row else None


def _plain(value: float) -> float | None:
    """Eight significant digits, one more than float32 has, so that small learning rates stay; JSON has no infinity."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None
