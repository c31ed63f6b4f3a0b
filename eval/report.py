"""Scored folders of pictures -> one self-contained HTML page: pictures, scores, curves, settings.

    python -m eval.report --runs runs/dog/samples runs/base/samples --references my_dog --output report.html

It reads what the other programs leave behind (manifest.jsonl, scores.json, log.jsonl, recipe.json) and takes what is
there: folders of pictures alone give a sheet, with their scores they give tables and plots too. The page holds its
pictures and plots itself and needs neither scripts nor a network.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from singlora_diffusion.data.images import open_picture, pictures
from singlora_diffusion.errors import UserError

from . import plots
from .results import Column, Loaded, Picture, Run, ceiling, load, scored, warnings

METRIC_LABELS = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_token": "CLIP-T, identifier kept"}
MODE_LABELS = {"train": "training pictures", "heldout": "held-out pictures", "all": "all real pictures"}
SAMPLING_LABELS = {
    "base_model": "base model",
    "adapter": "adapter",
    "identifier": "identifier",
    "class_noun": "class noun",
    "steps": "sampling steps",
    "guidance_scale": "guidance",
    "scheduler": "sampler",
    "negative_prompt": "negative prompt",
    "scale": "strength of the adapter",
    "dtype": "computed in",
    "width": "width",
    "height": "height",
    "seed": "seeds",
}

REAL, UNTRAINED = plots.INK, "#8b919b"
PALETTE = ("#2f6fde", "#e2711d", "#2a9d63", "#a24bc4", "#c8324c", "#0f98a8", "#98792b", "#d9629b")
SIDE = 120  # CSS pixels of a picture's longer side


@dataclass(frozen=True)
class ReportSettings:
    """Write a page that shows scored folders of pictures side by side."""

    runs: tuple[Path, ...]
    """Folders of pictures, one column each; with manifest.jsonl and scores.json in them."""
    references: Path | None = None
    """Folder of real pictures of the subject."""
    names: tuple[str, ...] = ()
    """What to call the columns. Empty: by their folders."""
    title: str = "Side by side"
    """Heading of the page."""
    output: Path = Path("report.html")
    """Where the page goes."""


def page(
    title: str,
    runs: Sequence[Run],
    references: Mapping[str, Path] | None = None,
    *,
    lead: str = "",
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    per_cell: int = 4,
) -> str:
    """The page as HTML.

    Args:
        runs: the columns, in this order, names unlike; the same prompts stand in the same row.
        references: caption -> folder of real pictures.
        lead: a sentence or two below the title.
        notes: what the reader has to know about the scores.
        commands: what makes all this again.
        per_cell: pictures shown per prompt and run; the scores are of all of them.

    Raises:
        UserError: a folder, manifest, result or log that cannot be read.
    """
    import jinja2

    if not runs:
        raise UserError("nothing to show: name at least one folder of pictures with --runs")
    loaded = [load(one) for one in runs]
    generated = [one for one in loaded if not one.run.real]
    columns = scored(loaded)
    ceilings = {column: ceiling(loaded, column) for column in columns}
    colours = _colours(loaded)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        lead=lead,
        references={
            caption: [_shown(path, path.name) for path in pictures(folder)]
            for caption, folder in (references or {}).items()
        },
        colours=colours,
        generated=[one.run.name for one in generated],
        logged=[one.run.name for one in generated if one.log],
        heads=[(METRIC_LABELS[column.metric], _against(column)) for column in columns],
        table=_table(loaded, columns, ceilings, colours),
        facts=list(dict.fromkeys(name for one in loaded for name in one.run.facts)),
        notes=[*notes, *warnings(loaded)],
        sheet=_sheet(loaded, per_cell),
        scores_plot=plots.scores(generated, colours, _plotted(columns), ceilings),
        curves=plots.curves(generated, colours),
        sampling=_sampling(generated),
        recipes=_recipes(generated),
        encoders=_encoders(loaded),
        commands=commands,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def write(html: str, output: Path) -> Path:
    """Write a page, whole or not at all."""
    output = output.expanduser()
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(html, encoding="utf-8")
        part.replace(output)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another file with --output") from error
    return output


def run(settings: ReportSettings) -> None:
    """The program: folders to a page."""
    names = settings.names or _names(settings.runs)
    if len(names) != len(settings.runs) or len(set(names)) != len(names):
        raise UserError(f"--names {' '.join(names)}: give each of the {len(settings.runs)} folders a name of its own")
    columns = [Run(name, images) for name, images in zip(names, settings.runs, strict=True)]
    references = {} if settings.references is None else {"real pictures": settings.references}
    print(f"written: {write(page(settings.title, columns, references), settings.output)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Flags to settings, exit code 2 with one line for what the user can mend."""
    import tyro

    settings = tyro.cli(ReportSettings, args=argv, prog="python -m eval.report", use_underscores=True)
    try:
        run(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of their paths that tell folders apart."""
    parts = [folder.expanduser().absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = tuple("/".join(one[-length:]) for one in parts)
        if len(set(names)) == len(names):
            return names
    raise UserError("--runs names a folder twice: name each once")


def _colours(loaded: Sequence[Loaded]) -> dict[str, str]:
    """By the run's name: real pictures black, an untrained model grey beside trained ones, else from the palette."""
    mixed = any(one.trained for one in loaded)
    palette = iter(PALETTE * (1 + len(loaded) // len(PALETTE)))
    return {
        one.run.name: REAL if one.run.real else UNTRAINED if mixed and not one.trained else next(palette)
        for one in loaded
    }


# --- scores ----------------------------------------------------------------------------------------------------------


def _against(column: Column) -> str:
    return "the prompt" if column.mode is None else MODE_LABELS[column.mode]


def _plotted(columns: Sequence[Column]) -> dict[Column, str]:
    """One kind of references, and no score twice, so that the panels are few."""
    mode = next((column.mode for column in columns if column.mode is not None), None)
    return {
        column: f"{METRIC_LABELS[column.metric]}, {_against(column)}"
        for column in columns
        if column.mode in (mode, None) and column.metric != "clip_t_token"
    }


def _table(
    loaded: Sequence[Loaded],
    columns: Sequence[Column],
    ceilings: Mapping[Column, float | None],
    colours: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row per run, real pictures last. A cell is a number as text and its bar's share of the full length."""

    def row(name: str, colour: str, values: Sequence[float | None], **more: Any) -> dict[str, Any]:
        cells = [("", 0.0) if value is None else (_number(value), min(max(value, 0.0), 1.0)) for value in values]
        return {
            "name": name,
            "colour": colour,
            "cells": cells,
            "real": colour == REAL,
            "facts": {},
            "count": "",
            **more,
        }

    rows = []
    for one in sorted(loaded, key=lambda each: each.run.real):
        values = [ceilings[column] if one.run.real else one.mean(column) for column in columns]
        rows.append(row(one.run.name, colours[one.run.name], values, facts=one.run.facts, count=len(one.pictures)))
    real = list(ceilings.values())
    if any(value is not None for value in real) and not any(one.run.real for one in loaded):
        rows.append(row("real pictures", REAL, real))
    return rows


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    uri: str
    width: int  # CSS pixels
    height: int
    tip: str


def _shown(path: Path, tip: str) -> Shown:
    """A picture as a data URI with twice the pixels it is shown at, for sharp screens.

    Small ones are enlarged here: browsers would blur them or show squares.
    """
    picture = open_picture(path)
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    stream = io.BytesIO()
    picture.resize((2 * width, 2 * height), Image.Resampling.LANCZOS).save(stream, "WEBP", quality=88)
    return Shown("data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode(), width, height, tip)


def _sheet(loaded: Sequence[Loaded], per_cell: int) -> dict[str, Any]:
    """A row per prompt: its words, and for each run a list of pictures. `hidden`: not all pictures are shown."""
    columns: list[dict[Hashable, list[Picture]]] = []
    for one in loaded:
        column: dict[Hashable, list[Picture]] = {}
        for picture in sorted(one.pictures, key=lambda each: int(each.about.get("seed") or 0)):
            column.setdefault(picture.prompt, []).append(picture)
        columns.append(column)
    generated = [column for one, column in zip(loaded, columns, strict=True) if not one.run.real]
    rows = []
    for prompt in dict.fromkeys(prompt for column in generated or columns for prompt in column):
        same = [picture for column in generated or columns for picture in column.get(prompt, [])]
        words = str(same[0].about.get("prompt") or prompt)
        cells = [[_shown(one.path, _tip(one)) for one in column.get(prompt, [])[:per_cell]] for column in columns]
        rows.append((words, cells))
    hidden = any(len(same) > per_cell for column in columns for same in column.values())
    return {"names": [one.run.name for one in loaded], "rows": rows, "hidden": hidden, "per_cell": per_cell}


def _tip(picture: Picture) -> str:
    seed = [f"seed {picture.about['seed']}"] if picture.about.get("seed") is not None else []
    scores = [
        f"{METRIC_LABELS[column.metric]} {_number(value)} ({_against(column)})"
        for column, value in picture.scores.items()
    ]
    return "\n".join([picture.path.name, *seed, *scores])


# --- settings --------------------------------------------------------------------------------------------------------


def _sampling(generated: Sequence[Loaded]) -> list[tuple[str, list[str]]]:
    """How the pictures were made: (setting, one text per run)."""
    rows = [(label, [_seen(one.pictures, key) for one in generated]) for key, label in SAMPLING_LABELS.items()]
    return [(label, texts) for label, texts in rows if any(texts)]


def _seen(pictures: Sequence[Picture], key: str) -> str:
    values = {picture.about[key]: None for picture in pictures if picture.about.get(key) is not None}
    return ", ".join(map(_plain, values))


def _recipes(generated: Sequence[Loaded]) -> dict[str, Any]:
    """Training settings: those that differ, (setting, one text per run), and those that do not, (setting, text)."""
    trained = [one for one in generated if one.recipe]
    keys = dict.fromkeys(key for one in trained for key in one.recipe)
    rows = [(key, [_plain(one.recipe.get(key)) for one in trained]) for key in keys]
    return {
        "names": [one.run.name for one in trained],
        "differ": [(key, texts) for key, texts in rows if len(set(texts)) > 1],
        "same": [(key, texts[0]) for key, texts in rows if len(set(texts)) == 1],
    }


def _encoders(loaded: Sequence[Loaded]) -> list[str]:
    """A line per encoder behind the scores."""
    lines: dict[str, None] = {}
    for result in (result for one in loaded for result in one.results):
        for role, made in result["encoders"].items():
            way, name = made["preprocessing"], f"{role.upper()}, protocol {result['protocol']}: {made['architecture']}"
            sized = (
                f"shorter side to {way['resize']}, {way['interpolation']}, centre {way['crop']} x {way['crop']} pixels"
            )
            files = ", ".join(f"{file} {digest[:12]}" for file, digest in made["files"].items())
            lines[f"{name}; {sized}; sha256: {files}"] = None
    return list(lines)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
