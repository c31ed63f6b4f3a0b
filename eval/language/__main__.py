"""Fine-tunes language models with every method and prints the article's tables: `python -m eval.language`.

    python -m eval.language --models FacebookAI/roberta-base --task mnli --mixed_precision fp16

Several --rates give a grid of them, with statistics and a plot of how much each method depends on the rate.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from singlora_diffusion import files
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import parse

from .settings import Cell, LanguageSettings


def main(words: Sequence[str]) -> None:
    """Run what is not done yet, then print, and write what is printed into the output folder.

    Raises:
        UserError: a model or a task that cannot be had, or a folder of other settings.
    """
    settings = parse(LanguageSettings, words, "python -m eval.language", __doc__ or "")
    from accelerate import PartialState

    from . import runs, tasks

    files.check_writable(settings.output_dir, "--output_dir")
    cells = runs.cells(settings)
    todo = [cell for cell in cells if runs.result(settings, cell) is None]
    task = tasks.load(settings.task, settings.max_train_examples) if todo else None
    for place, cell in enumerate(todo, 1):
        assert task is not None
        about = f"{place} of {len(todo)}: {runs.label(cell.model)} {cell.name}"
        runs.run(settings, cell, task, lambda row, about=about: _tell(about, row))  # type: ignore[misc]
    if PartialState().is_main_process:
        _report(settings, {cell: runs.result(settings, cell) or {} for cell in cells})


def _tell(about: str, row: Mapping[str, Any]) -> None:
    loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.3f}"
    print(f"{about}: epoch {row['epoch']}, {loss}, accuracy {row['accuracy']:.4f}", flush=True)


def _report(settings: LanguageSettings, found: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Tables on the terminal and as CSV; with several rates, plots."""
    from ..plots import on_white
    from . import runs, stability, tables

    out = settings.output_dir
    files.write_text(out / "runs.csv", _csv(tables.runs(found)))
    _print(f"accuracy on {settings.task}, in percent: mean ± standard deviation over seeds", tables.accuracies(found))
    if len(settings.rates) < 2:
        return
    curves = tables.curves(found)
    files.write_text(out / "stability.csv", _csv(stability.table(curves)))
    _print("accuracy over the learning rates, in percent; windows in decades", stability.table(curves))
    words = [verdict.words for verdict in stability.verdicts(curves)]
    files.write_text(out / "verdict.txt", "".join(f"SingLoRA's {line}\n" for line in words))
    print(*(f"SingLoRA's {line}" for line in words), sep="\n")
    for model in settings.models:
        name = runs.label(model)
        files.write_text(out / f"{name}.svg", on_white(stability.plot(name, curves)))


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _print(title: str, rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads, *rest = rows
    table = Table(title=title)
    for head in heads:
        table.add_column(head, no_wrap=True)
    for row in rest:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"language: {error}", file=sys.stderr)
        sys.exit(2)
