"""A folder of generated images and its manifest: what is there, what is missing, what is in the way.

An image carries its record in its own PNG metadata. That is what a later run goes by: what is there under the same
settings is kept, so an interrupted run continues, and what is there under other settings is not touched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .. import files
from ..data import images, png
from ..data.folders import CONTACT_SHEET
from ..errors import UserError
from ..terminal import escaped, note
from . import contact_sheet
from .manifest import MANIFEST, Record, read_manifest
from .records import OF_THE_IMAGE, OF_THE_RUN

PNG_KEY = "singlora"  # the text chunk that holds an image's record

REMEDY = "choose another --output_dir, or pass --overwrite"


def missing(folder: Path, plan: Sequence[Record], overwrite: bool = False) -> list[Record]:
    """The records whose images are yet to be made. Brings the folder's manifest in step with its images.

    Args:
        folder: there, and locked.
        plan: at least one record; all agree in `OF_THE_RUN`.
        overwrite: images made under other settings are to be made anew, instead of being an error.

    Raises:
        UserError: something is in the way that is not ours, or was made under other settings.
    """
    sheet = folder / CONTACT_SHEET
    if not overwrite and os.path.lexists(sheet) and not png.is_ours(sheet):
        raise UserError(f"{_shown(sheet)} is in the way: {REMEDY}")
    todo = [record for record in plan if not _is_there(folder / record["file"], record, overwrite)]
    lacking = {record["file"] for record in todo}
    there = [record for record in plan if record["file"] not in lacking]
    content = "".join(map(_line, [*_others(folder, plan, overwrite), *there])).encode()
    manifest = folder / MANIFEST
    if not manifest.exists() or manifest.read_bytes() != content:
        files.write_bytes(manifest, content)
    return todo


def add(folder: Path, record: Record, image: Image.Image) -> None:
    """Write an image with its record in it, whole or not at all; then the record into the manifest."""
    png.write(image, folder / record["file"], **{PNG_KEY: json.dumps(record)})
    manifest = folder / MANIFEST
    length = manifest.stat().st_size
    try:
        with manifest.open("ab") as stream:
            stream.write(_line(record).encode())
    except OSError as error:
        os.truncate(manifest, length)  # a full disk may have taken a part of the line
        raise UserError(f"{_shown(manifest)}: cannot be written: {files.reason(error)}") from error


def write_contact_sheet(folder: Path, plan: Sequence[Record]) -> None:
    """Write the contact sheet: a row per prompt, a column per seed."""
    seeds = list(dict.fromkeys(record["seed"] for record in plan))
    largest = max(32, min(384, 6000 // len(seeds), int(math.sqrt(64e6 / len(plan)))))  # 64 megapixels in all
    rows: dict[int, list[Image.Image]] = {}
    captions: dict[int, str] = {}
    for record in plan:
        with Image.open(folder / record["file"]) as image:
            image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
            rows.setdefault(record["prompt_index"], []).append(image.convert("RGB"))
        captions[record["prompt_index"]] = record["prompt"]
    heads = [f"seed {seed}" for seed in seeds]
    sheet = contact_sheet.grid(list(rows.values()), list(captions.values()), heads, largest=largest)
    png.write(sheet, folder / CONTACT_SHEET)


def one_colour(folder: Path, plan: Sequence[Record]) -> list[str]:
    """The names of images that show nothing."""
    return [record["file"] for record in plan if images.is_one_colour(images.open_image(folder / record["file"]))]


def _is_there(path: Path, record: Record, overwrite: bool) -> bool:
    if not os.path.lexists(path):
        return False
    old = _record_of(path)
    difference = _difference(old, record, OF_THE_IMAGE) if old else "not one of this program's"
    if difference and not overwrite:
        raise UserError(f"{_shown(path)} is there already and is another image ({difference}): {REMEDY}")
    return not difference


def _others(folder: Path, plan: Sequence[Record], overwrite: bool) -> list[Record]:
    """The records of images that are in the folder and not in the plan."""
    planned = {record["file"] for record in plan}
    others: list[Record] = []
    dropped: list[str] = []
    for name, old in read_manifest(folder / MANIFEST, interrupted=True).items():
        if name in planned or not (folder / name).is_file():
            continue
        difference = _difference(old, plan[0], OF_THE_RUN)
        if not difference:
            others.append(old)
        elif overwrite:
            dropped.append(name)
        else:
            raise UserError(f"{_shown(folder)} holds images made under other settings ({difference}): {REMEDY}")
    if dropped:
        named = ", ".join(escaped(name) for name in dropped[:3]) + (", ..." if len(dropped) > 3 else "")
        note(f"{len(dropped)} images of other settings stay in {_shown(folder)} but leave its manifest: {named}")
    return others


def _difference(old: Record, new: Record, keys: Sequence[str]) -> str:
    """The first thing that differs, as in "guidance_scale 7.5 instead of 3.0"; empty if nothing does."""
    for key in keys:
        if old.get(key) != new[key]:
            values = [json.dumps(value) for value in (old.get(key), new[key])]
            if key.endswith(("sha256", "hash")):
                values = [" + ".join(part[:12] for part in value.strip('"').split(" + ")) for value in values]
            return f"{key} {' instead of '.join(escaped(value) for value in values)}"
    return ""


def _record_of(path: Path) -> Record | None:
    """The record in an image's metadata; None if it has none."""
    try:
        record = json.loads(png.texts(path).get(PNG_KEY, ""))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _shown(path: Path) -> str:
    return escaped(path, 1000)
