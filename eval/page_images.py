"""Images on a page: as data URIs, in strips and in sheets of prompts by sets."""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from singlora_diffusion.data.folders import image_files
from singlora_diffusion.data.images import open_image

from .metrics import by_prompt
from .results import ScoredImage, ScoredSet

SIDE = 120  # CSS pixels of an image's longer side


@dataclass(frozen=True)
class Shown:
    """An image on the page."""

    uri: str
    width: int  # CSS pixels
    height: int
    tip: str


def shown(path: Path, tip: str, side: int = SIDE) -> Shown:
    """An image as a data URI with twice the pixels it is shown at, for sharp screens.

    Small ones are enlarged here: browsers would blur them or show squares.
    """
    image = open_image(path)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    stream = io.BytesIO()
    image.resize((2 * width, 2 * height), Image.Resampling.LANCZOS).save(stream, "WEBP", quality=88)
    return Shown("data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode(), width, height, tip)


def gallery(folder: Path) -> list[Shown]:
    """Every image of a folder."""
    return [shown(path, path.name) for path in image_files(folder)]


def sheet(loaded: Sequence[ScoredSet], per_prompt: int) -> dict[str, Any]:
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
        cells = [[shown(one.path, _tip(one)) for one in column.get(prompt, [])[:per_prompt]] for column in columns]
        rows.append((words, cells))
    hidden = any(len(same) > per_prompt for column in columns for same in column.values())
    return {"names": [one.name for one in loaded], "rows": rows, "hidden": hidden, "per_prompt": per_prompt}


def _tip(image: ScoredImage) -> str:
    seed = [f"seed {image.about['seed']}"] if image.about.get("seed") is not None else []
    scores = [
        f"{key.label} {number(value)}" + (f" ({key.against})" if key.against else "")
        for key, value in image.scores.items()
    ]
    return "\n".join([image.path.name, *seed, *scores])


def number(value: float) -> str:
    """As it stands on a page, with three decimals and a true minus sign."""
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
