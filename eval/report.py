"""Scored folders of images -> one self-contained HTML page: images, scores, curves, settings. `singlora report`.

    singlora report --runs runs/dog/samples runs/base/samples --references my_dog --output report.html

It reads what the other commands leave behind (manifest.jsonl, scores.json, log.jsonl, recipe.json) and takes what is
there: folders of images alone give a sheet, with their scores they give tables and plots too. The page holds its
images and plots itself, needs neither scripts nor a network, and reads on a phone as on a large screen.

A page is about one subject, so nothing on it is tested for significance: `eval.statistics` compares over subjects.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from singlora_diffusion.errors import UserError
from singlora_diffusion.files import write_bytes
from singlora_diffusion.settings import Count
from singlora_diffusion.terminal import escaped

from . import page_images, page_settings, plots
from .metrics import METRICS
from .page_images import number
from .results import ImageSet, ScoredSet, load, real_score, scored, warnings
from .score_file import ScoreKey

REAL, UNTRAINED = plots.INK, "#8b919b"
PALETTE = ("#2f6fde", "#e2711d", "#2a9d63", "#a24bc4", "#c8324c", "#0f98a8", "#98792b", "#d9629b")


@dataclass(frozen=True)
class ReportSettings:
    """Write a page that shows scored folders of images side by side."""

    runs: tuple[Path, ...]
    """Folders of images, one column each; with manifest.jsonl and scores.json in them."""
    references: Path | None = None
    """Folder of real images of the subject."""
    names: tuple[str, ...] = ()
    """What to call the columns. Empty: by their folders."""
    title: str = "Side by side"
    """Heading of the page."""
    images_per_prompt: Count = 4
    """Images shown of each prompt and folder. The scores are of all of them."""
    output: Path = Path("report.html")
    """Where the page goes."""


def page(
    title: str,
    sets: Sequence[ImageSet],
    references: Mapping[str, Path] | None = None,
    *,
    lead: str = "",
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    images_per_prompt: int = 4,
) -> str:
    """The page as HTML.

    Args:
        sets: the columns, in this order, each with a name of its own; the same prompts stand in the same row.
        references: caption -> folder of real images.
        lead: a sentence or two below the title.
        notes: what the reader has to know about the scores.
        commands: what makes all this again.
        images_per_prompt: images shown per prompt and set; the scores are of all of them.

    Raises:
        UserError: a folder, manifest, result or log that cannot be read.
    """
    if not sets:
        raise UserError("nothing to show: name at least one folder of images with --runs")
    loaded = [load(one) for one in sets]
    generated = [one for one in loaded if not one.source.real]
    keys = scored(loaded)
    real = {key: real_score(loaded, key) for key in keys}
    colours = _colours(loaded)
    return template("report.html.j2").render(
        title=title,
        lead=lead,
        references={caption: page_images.gallery(folder) for caption, folder in (references or {}).items()},
        colours=colours,
        generated=[one.name for one in generated],
        logged=[one.name for one in generated if one.log],
        heads=[(key.label, key.against) for key in keys],
        table=_table(loaded, keys, real, colours),
        facts=list(dict.fromkeys(name for one in loaded for name in one.source.facts)),
        metrics=_metrics(keys),
        notes=[*notes, *warnings(loaded)],
        sheet=page_images.sheet(loaded, images_per_prompt),
        scores_plots=plots.scores(generated, colours, _plotted(keys), real),
        curves=plots.curves(generated, colours),
        sampling=page_settings.sampling(generated),
        recipes=page_settings.recipes(generated),
        encoders=page_settings.encoders(result for one in loaded for result in one.results),
        commands=commands,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def template(name: str) -> Any:
    """A page of this folder, to be rendered."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def write(html: str, output: Path) -> Path:
    """Write a page, whole or not at all; errors as `singlora_diffusion.files.replacing`."""
    write_bytes(output, html.encode(errors="replace"))  # file names need not be text
    return output


def run(settings: ReportSettings) -> None:
    """Folders to a page: what `singlora report` does."""
    names = settings.names or _names(settings.runs)
    if len(names) != len(settings.runs) or len(set(names)) != len(names):
        raise UserError(
            f"--names {escaped(' '.join(names))}: give each of the {len(settings.runs)} folders a name of its own"
        )
    sets = [ImageSet(name, images) for name, images in zip(names, settings.runs, strict=True)]
    references = {} if settings.references is None else {"real images": settings.references}
    html = page(settings.title, sets, references, images_per_prompt=settings.images_per_prompt)
    print(f"written: {escaped(write(html, settings.output), 4096)}")


def _names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of their paths that tell folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = tuple("/".join(one[-length:]) for one in parts)
        if len(set(names)) == len(names):
            return names
    raise UserError("--runs names a folder twice: name each once")


def _colours(loaded: Sequence[ScoredSet]) -> dict[str, str]:
    """By the set's name: real images black, an untrained model grey beside trained ones, else from the palette."""
    mixed = any(one.trained for one in loaded)
    palette = iter(PALETTE * (1 + len(loaded) // len(PALETTE)))
    return {
        one.name: REAL if one.source.real else UNTRAINED if mixed and not one.trained else next(palette)
        for one in loaded
    }


def _plotted(keys: Sequence[ScoreKey]) -> dict[ScoreKey, str]:
    """One kind of references, and no score twice, so that the panels are few."""
    mode = next((key.mode for key in keys if key.mode is not None), None)
    shown = [key for key in keys if key.mode in (mode, None) and METRICS[key.metric].per == "image"]
    metrics = {key.metric for key in shown}
    return {
        key: f"{key.label}, {key.against}" if key.against else key.label
        for key in shown
        if METRICS[key.metric].variant_of not in metrics
    }


def _metrics(keys: Sequence[ScoreKey]) -> list[tuple[str, str, str]]:
    """Label, what it measures, and how to read it."""
    rows = {key.metric: METRICS[key.metric] for key in keys}
    return [
        (row.label, row.description, f"{row.unit}, {'higher' if row.higher_is_better else 'lower'} is better")
        for row in rows.values()
    ]


def _table(
    loaded: Sequence[ScoredSet],
    keys: Sequence[ScoreKey],
    real: Mapping[ScoreKey, float | None],
    colours: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row per set, real images last. A cell is a number as text and its bar's share of the full length.

    A full bar is 1, or the column's largest number where that is more.
    """
    names, rows = [], []
    for one in sorted(loaded, key=lambda each: each.source.real):
        names.append(one.name)
        values = [real[key] if one.source.real else one.mean(key) for key in keys]
        rows.append((colours[one.name], values, one.source.facts, str(len(one.images))))
    if any(value is not None for value in real.values()) and not any(one.source.real for one in loaded):
        names.append("real images")
        rows.append((REAL, [real[key] for key in keys], {}, ""))
    full = [max([1.0, *(row[1][i] or 0.0 for row in rows)]) for i in range(len(keys))]
    return [
        {
            "name": name,
            "colour": colour,
            "cells": [
                ("", 0.0) if value is None else (number(value), max(value, 0.0) / most)
                for value, most in zip(values, full, strict=True)
            ],
            "real": colour == REAL,
            "facts": facts,
            "count": count,
        }
        for name, (colour, values, facts, count) in zip(names, rows, strict=True)
    ]


if __name__ == "__main__":
    from singlora_diffusion.cli import run as run_command

    sys.exit(run_command("report", sys.argv[1:]))
