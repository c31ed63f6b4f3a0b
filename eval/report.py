"""Scored folders of images -> one self-contained HTML page: images, scores, curves, settings. `singlora report`.

    singlora report --runs runs/dog/samples runs/base/samples --references my_dog --output report.html

It reads what the other commands leave behind (manifest.jsonl, scores.json, log.jsonl, recipe.json) and takes what is
there: folders of images alone give a sheet, with their scores they give tables and plots too. The page holds its
images and plots itself, needs neither scripts nor a network, and reads on a phone as on a large screen.

A page is about one subject, so nothing on it is tested for significance: `eval.statistics` compares over subjects.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from singlora_diffusion.data.folders import image_files
from singlora_diffusion.data.images import open_image
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import write_bytes
from singlora_diffusion.settings import Count
from singlora_diffusion.terminal import escaped

from . import plots
from .encoders import ROLES
from .metrics import METRICS, by_prompt
from .results import ImageSet, ScoredImage, ScoredSet, ScoreKey, load, real_score, scored, warnings

SAMPLING_LABELS = {
    "base_model": "base model",
    "adapter": "adapter",
    "identifier": "identifier",
    "class_noun": "class noun",
    "steps": "sampling steps",
    "guidance_scale": "guidance scale",
    "scheduler": "scheduler",
    "negative_prompt": "negative prompt",
    "scale": "adapter scale",
    "dtype": "dtype",
    "width": "width",
    "height": "height",
    "seed": "seeds",
}

REAL, UNTRAINED = plots.INK, "#8b919b"
PALETTE = ("#2f6fde", "#e2711d", "#2a9d63", "#a24bc4", "#c8324c", "#0f98a8", "#98792b", "#d9629b")
SIDE = 120  # CSS pixels of an image's longer side


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
    return _template().render(
        title=title,
        lead=lead,
        references={caption: _gallery(folder) for caption, folder in (references or {}).items()},
        colours=colours,
        generated=[one.name for one in generated],
        logged=[one.name for one in generated if one.log],
        heads=[(key.label, key.against) for key in keys],
        table=_table(loaded, keys, real, colours),
        facts=list(dict.fromkeys(name for one in loaded for name in one.source.facts)),
        metrics=_metrics(keys),
        notes=[*notes, *warnings(loaded)],
        sheet=_sheet(loaded, images_per_prompt),
        scores_plots=plots.scores(generated, colours, _plotted(keys), real),
        curves=plots.curves(generated, colours),
        sampling=_sampling(generated),
        recipes=_recipes(generated),
        encoders=_encoders(loaded),
        commands=commands,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2")


def write(html: str, output: Path) -> Path:
    """Write a page, whole or not at all; errors as `singlora_diffusion.files.replacing`."""
    output = output.expanduser()
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
    parts = [folder.expanduser().absolute().parts for folder in folders]
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


# --- scores ----------------------------------------------------------------------------------------------------------


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
                ("", 0.0) if value is None else (_number(value), max(value, 0.0) / most)
                for value, most in zip(values, full, strict=True)
            ],
            "real": colour == REAL,
            "facts": facts,
            "count": count,
        }
        for name, (colour, values, facts, count) in zip(names, rows, strict=True)
    ]


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """An image on the page."""

    uri: str
    width: int  # CSS pixels
    height: int
    tip: str


def _shown(path: Path, tip: str) -> Shown:
    """An image as a data URI with twice the pixels it is shown at, for sharp screens.

    Small ones are enlarged here: browsers would blur them or show squares.
    """
    image = open_image(path)
    scale = SIDE / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    stream = io.BytesIO()
    image.resize((2 * width, 2 * height), Image.Resampling.LANCZOS).save(stream, "WEBP", quality=88)
    return Shown("data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode(), width, height, tip)


def _gallery(folder: Path) -> list[Shown]:
    """Every image of a folder."""
    return [_shown(path, path.name) for path in image_files(folder)]


def _sheet(loaded: Sequence[ScoredSet], per_prompt: int) -> dict[str, Any]:
    """A row per prompt: its words, and for each set a list of images. `hidden`: not all images are shown."""
    columns: list[dict[Hashable, list[ScoredImage]]] = []
    for one in loaded:
        images = sorted(one.images, key=lambda image: image.about.get("seed") or 0)
        columns.append(by_prompt(images, [image.prompt for image in images]))
    leading = [column for one, column in zip(loaded, columns, strict=True) if not one.source.real] or columns
    rows = []
    for prompt in dict.fromkeys(prompt for column in leading for prompt in column):
        first = next(column[prompt][0] for column in leading if prompt in column)
        words = str(first.about.get("prompt") or prompt)
        cells = [[_shown(one.path, _tip(one)) for one in column.get(prompt, [])[:per_prompt]] for column in columns]
        rows.append((words, cells))
    hidden = any(len(same) > per_prompt for column in columns for same in column.values())
    return {"names": [one.name for one in loaded], "rows": rows, "hidden": hidden, "per_prompt": per_prompt}


def _tip(image: ScoredImage) -> str:
    seed = [f"seed {image.about['seed']}"] if image.about.get("seed") is not None else []
    scores = [
        f"{key.label} {_number(value)}" + (f" ({key.against})" if key.against else "")
        for key, value in image.scores.items()
    ]
    return "\n".join([image.path.name, *seed, *scores])


# --- settings --------------------------------------------------------------------------------------------------------


def _sampling(generated: Sequence[ScoredSet]) -> list[tuple[str, list[str]]]:
    """How the images were made: (setting, one text per set)."""
    rows = [(label, [_seen(one.images, key) for one in generated]) for key, label in SAMPLING_LABELS.items()]
    return [(label, texts) for label, texts in rows if any(texts)]


def _seen(images: Sequence[ScoredImage], key: str) -> str:
    values = [image.about[key] for image in images if image.about.get(key) is not None]
    return ", ".join(dict.fromkeys(map(_plain, values)))


def _recipes(generated: Sequence[ScoredSet]) -> dict[str, Any]:
    """Training settings: those that differ, (setting, one text per set), and those that do not, (setting, text)."""
    trained = [one for one in generated if one.recipe]
    keys = dict.fromkeys(key for one in trained for key in one.recipe)
    rows = [(key, [_plain(one.recipe.get(key)) for one in trained]) for key in keys]
    return {
        "names": [one.name for one in trained],
        "differ": [(key, texts) for key, texts in rows if len(set(texts)) > 1],
        "same": [(key, texts[0]) for key, texts in rows if len(set(texts)) == 1],
    }


def _encoders(loaded: Sequence[ScoredSet]) -> list[str]:
    """A line per encoder behind the scores."""
    lines: dict[str, None] = {}
    for result in (result for one in loaded for result in one.results):
        for role, made in result.encoders.items():
            way = {key: made.preprocessing.get(key, "?") for key in ("resize", "interpolation", "crop")}
            sized = (
                f"shorter side to {way['resize']}, {way['interpolation']}, centre {way['crop']} x {way['crop']} pixels"
            )
            files = ", ".join(f"{file} {digest[:12]}" for file, digest in made.files.items())
            name = f"{ROLES.get(role, role)}, protocol {result.protocol}: {made.architecture}"
            lines[f"{name}; {sized}; sha256: {files}"] = None
    return list(lines)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from singlora_diffusion.cli import run as run_command

    sys.exit(run_command("report", sys.argv[1:]))
