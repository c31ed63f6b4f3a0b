"""A progress bar with the time that is left, for anything that takes longer than a few seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def bar(console: Console, *, transient: bool = False, disable: bool = False) -> Progress:
    """The bar itself, for work that does not advance by one item at a time."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=disable,
    )


def track(sequence: Sequence[T], what: str, console: Console, total: int | None = None) -> Iterator[T]:
    """Yield the items of `sequence` and show how far it is.

    Args:
        total: of a job of which `sequence` is the rest. None: `sequence` is all of it.
    """
    total = len(sequence) if total is None else total
    with bar(console) as shown:
        task = shown.add_task(what, total=total, completed=total - len(sequence))
        for item in sequence:
            yield item
            shown.advance(task)
