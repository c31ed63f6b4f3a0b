"""A progress bar with the time that is left, for anything that takes longer than a few seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def track(sequence: Sequence[T], what: str, console: Console, total: int | None = None) -> Iterator[T]:
    """Yield the items of `sequence` and show how far it is.

    Args:
        total: of a job of which `sequence` is the rest. None: `sequence` is all of it.
    """
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    total = len(sequence) if total is None else total
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=total - len(sequence))
        for item in sequence:
            yield item
            bar.advance(task)
