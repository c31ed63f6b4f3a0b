"""What a comparison found as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import fields

from . import tables, verdicts
from .results import Results, label, state
from .scores import SCORES
from .table import Table
from .update_size import Update

UPDATES = [one.name for one in fields(Update)]


def markdown(found: Results, title: str, commands: list[str], plots: list[str]) -> str:
    """All of it but the images.

    Args:
        plots: files beside it.
    """
    said = [verdicts.sentence(row, label, found.methods[0]) for row in found.rows if row.adjusted is not None]
    parts = [f"# {title}", state(found), *(f"- {one}" for one in said)]
    text = "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:])
    text += "\n\n" + "\n".join(f"![]({plot})" for plot in plots)
    text += "\n\n" + "\n".join(_markdown(table) for table in tables.all_tables(found))
    return text + "\n### How to repeat it\n\n```\n" + "\n".join(commands) + "\n```\n"


def _markdown(table: Table) -> str:
    """As GitHub reads it."""
    lines = [table.heads, tuple("---" for _ in table.heads), *table.rows]
    body = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in line) + " |" for line in lines
    )
    return f"### {table.title}\n\n{body}\n\n{table.note}\n"


def cells_csv(found: Results) -> str:
    """A row per training: what it was and what it scored."""
    done = [("base", one) for one in found.bases] + [("tuning", one) for one in found.tuned]
    done += [("test", one) for one in found.tested]
    metrics = [m for m in SCORES if any(one.scores.get(m) is not None for _, one in done)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    facts = ("subject", "method", "learning_rate", "seed", "parameters", "seconds_per_step", "peak_bytes")
    table.writerow(["set", *facts, *(f"update_{kind}" for kind in UPDATES), "diverged", *metrics])
    for what, one in done:
        values = [*(one.record[fact] for fact in facts), *(one.update(kind) for kind in UPDATES)]
        table.writerow([what, *values, one.record["diverged"] is not None, *(one.scores.get(m) for m in metrics)])
    return text.getvalue()
