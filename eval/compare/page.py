"""What a comparison found as one self-contained HTML page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from singlora_diffusion import files
from singlora_diffusion.data.folders import image_files
from singlora_diffusion.sampling.manifest import MANIFEST, read_manifest
from singlora_diffusion.settings import as_json

from .. import page_images, page_settings
from ..plots import on_white
from ..report import PALETTE, template
from ..score import versions
from ..score_file import read_result
from . import charts, documents, tables, verdicts
from .grid import BASE, Cell
from .records import Done
from .results import Results, label, state
from .scoring import SAMPLES, SCORES

SIDE = 84  # CSS pixels of an image
SUBJECTS, PROMPTS = 3, 4
"""So many are shown in images."""


def page(found: Results, title: str, commands: list[str]) -> str:
    """The page as HTML; needs neither scripts nor a network."""
    methods = found.methods
    colours = _colours(found)
    rest = tables.all_tables(found)
    leading = [table for table in rest if table in tables.decisions(found)]
    settings = found.plan.settings
    return template("compare/page.html.j2").render(
        title=title,
        state=state(found),
        partial=not found.is_whole,
        verdicts=[verdicts.sentence(row, label, methods[0]) for row in found.rows if row.adjusted is not None],
        decisions=leading,
        tables=[table for table in rest if table not in leading],
        names=[(label(method), colours[method]) for method in methods],
        plots=list(drawn(found).values()),
        sheets=[_sheet(found, name) for name in found.tables.subjects[:SUBJECTS]],
        settings=[
            (name, page_settings.plain(value))
            for name, value in as_json(settings).items()
            if value not in (None, [], "")
        ],
        versions=versions(),
        encoders=_encoders(found),
        commands=commands,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def drawn(found: Results) -> dict[str, str]:
    """The plots as SVG, by name."""
    colours, settings = _colours(found), found.plan.settings.decision
    shown = [metric for metric in settings.primary if metric in found.tables.scores]
    made = {}
    if len(found.methods) > 1:
        for metric in shown:
            plot = charts.differences(metric, found.tables, found.rows, label, colours, settings.bound)
            made[f"differences-{metric}"] = plot
    if len(shown) > 1:
        made["plane"] = charts.plane(shown[1], shown[0], found.tables, colours)
    for metric in dict.fromkeys(curve.metric for curve in found.curves):
        made[f"rates-{metric}"] = charts.rates(metric, "learning rate", found.curves, colours)
    for metric in dict.fromkeys(curve.metric for curve in found.over_size):
        made[f"sizes-{metric}"] = charts.rates(metric, "size of the update", found.over_size, colours)
    return made


def _colours(found: Results) -> dict[str, str]:
    return {method: PALETTE[place % len(PALETTE)] for place, method in enumerate(found.methods)}


def _sheet(found: Results, subject: str) -> dict[str, Any]:
    """A row per prompt: a real image, the base model's and each method's, of the same seed."""
    first = found.tables.seeds[0]
    columns = {one.cell.method: one for one in found.tested if (one.cell.subject, one.cell.seed) == (subject, first)}
    base = found.plan.folder(Cell(subject, BASE)) / SAMPLES
    real = image_files(found.plan.subjects[subject].references)
    rows: list[tuple[str, list[page_images.Shown | None]]] = []
    chosen: dict[int, tuple[str, str]] = {}
    for name, line in read_manifest(base / MANIFEST).items():
        chosen.setdefault(int(line.get("prompt_index", 0)), (name, str(line.get("prompt", ""))))
    places = sorted(chosen)
    for number, place in enumerate(places[:: max(1, len(places) // PROMPTS)][:PROMPTS]):
        name, prompt = chosen[place]
        paths = [real[number % len(real)], base / name, *(_image(found, columns[m], name) for m in found.methods)]
        rows.append((prompt, [page_images.shown(path, path.name, SIDE) if path else None for path in paths]))
    heads = ["real image", label(BASE), *map(label, found.methods)]
    return {"subject": subject, "names": heads, "rows": rows}


def _image(found: Results, done: Done, name: str) -> Path | None:
    """None for a training that diverged: there is none."""
    path = found.plan.folder(done.cell) / SAMPLES / name
    return path if path.is_file() else None


def _encoders(found: Results) -> list[str]:
    done = [*found.tested, *found.tuned][:1]
    return page_settings.encoders(read_result(found.plan.folder(one.cell) / SCORES) for one in done)


def write(found: Results, title: str, commands: list[str]) -> list[Path]:
    """The page, the same as Markdown with plots, and CSV, into the comparison's folder; returns all but the plots."""
    out = found.plan.settings.run.output_dir
    texts = {
        "report.html": page(found, title, commands),
        "cells.csv": documents.cells_csv(found),
    }
    plots = {f"plots/{name}.svg": on_white(svg) for name, svg in drawn(found).items()}
    texts["report.md"] = documents.markdown(found, title, commands, list(plots))
    texts.update(plots)
    for name, text in texts.items():
        files.write_bytes(out / name, text.encode(errors="replace"))
    return [out / name for name in texts if name not in plots]
