"""A folder of generated pictures and its manifest: what is there, what is missing, what is in the way.

A picture carries its manifest line in its own PNG metadata. That is what a later run goes by: what is there under the
same settings is kept, so an interrupted run continues, and what is there under other settings is not touched.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Line = dict[str, Any]
"""What the manifest says of a picture: "file" and how it was made."""

MANIFEST, SHEET = "manifest.jsonl", "contact_sheet.png"
PNG_KEY = "singlora"  # the text chunk that holds a picture's line

OF_THE_RUN = (
    "adapter_sha256",
    "scale",
    "merged",
    "base_hash",
    "dtype",
    "steps",
    "guidance_scale",
    "scheduler",
    "negative_prompt",
    "height",
    "width",
)
"""What all pictures of a folder share."""
OF_THE_PICTURE = ("prompt", "seed", *OF_THE_RUN)
"""What determines a picture."""

REMEDY = "choose another --output_dir, or pass --overwrite"


def missing(folder: Path, plan: Sequence[Line], overwrite: bool = False) -> list[Line]:
    """The lines whose pictures are yet to be made. Makes the folder, and brings its manifest in step with its pictures.

    Args:
        plan: at least one line; all agree in `OF_THE_RUN`.
        overwrite: pictures made under other settings are to be made anew, instead of being an error.

    Raises:
        UserError: something is in the way that is not ours, or was made under other settings.
    """
    if not overwrite and (folder / SHEET).exists() and not _is_ours(folder / SHEET):
        raise UserError(f"{folder / SHEET} is in the way: {REMEDY}")
    todo = [line for line in plan if not _is_there(folder / line["file"], line, overwrite)]
    lacking = {line["file"] for line in todo}
    there = [line for line in plan if line["file"] not in lacking]
    lines = [*_others(folder, plan, overwrite), *there]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    manifest = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists() or manifest.read_bytes() != content:
            _replace(manifest, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from error
    return todo


def add(folder: Path, line: Line, picture: Image.Image) -> None:
    """Write a picture with its line in it, whole or not at all; then the line into the manifest."""
    _save(picture, folder / line["file"], json.dumps(line))
    try:
        with (folder / MANIFEST).open("a", encoding="utf-8") as manifest:
            manifest.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"{folder / MANIFEST}: cannot be written: {error.strerror}") from error


def lay_out(folder: Path, plan: Sequence[Line]) -> None:
    """Write the contact sheet: a row per prompt, a column per seed."""
    from PIL import Image

    from . import contact_sheet

    seeds = list(dict.fromkeys(line["seed"] for line in plan))
    largest = max(32, min(384, 6000 // len(seeds), int(math.sqrt(64e6 / len(plan)))))  # 64 megapixels in all
    rows: dict[int, list[Image.Image]] = {}
    captions: dict[int, str] = {}
    for line in plan:
        with Image.open(folder / line["file"]) as picture:
            picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
            rows.setdefault(line["prompt_index"], []).append(picture.convert("RGB"))
        captions[line["prompt_index"]] = line["prompt"]
    heads = [f"seed {seed}" for seed in seeds]
    _save(contact_sheet.grid(list(rows.values()), list(captions.values()), heads, largest=largest), folder / SHEET)


def _is_there(path: Path, line: Line, overwrite: bool) -> bool:
    if not os.path.lexists(path):
        return False
    old = _line_of(path)
    difference = _difference(old, line, OF_THE_PICTURE) if old else "not one of this program's"
    if difference and not overwrite:
        raise UserError(f"{path} is there already and is another picture ({difference}): {REMEDY}")
    return not difference


def _others(folder: Path, plan: Sequence[Line], overwrite: bool) -> list[Line]:
    """The lines of pictures that are in the folder and not in the plan."""
    planned = {line["file"] for line in plan}
    others: list[Line] = []
    dropped: list[str] = []
    for old in _read(folder / MANIFEST):
        name = old["file"]
        if name in planned or not (folder / name).is_file():
            continue
        difference = _difference(old, plan[0], OF_THE_RUN)
        if not difference:
            others.append(old)
        elif overwrite:
            dropped.append(name)
        else:
            raise UserError(f"{folder} holds pictures made under other settings ({difference}): {REMEDY}")
    if dropped:
        named = ", ".join(dropped[:3]) + (", ..." if len(dropped) > 3 else "")
        print(
            f"note: {len(dropped)} pictures of other settings stay in {folder} but leave its manifest: {named}",
            file=sys.stderr,
        )
    return others


def _difference(old: Line, new: Line, keys: Sequence[str]) -> str:
    """The first thing that differs, as in "guidance_scale 7.5 instead of 3.0"; empty if nothing does."""
    for key in keys:
        if old.get(key) != new[key]:
            values = [json.dumps(value) for value in (old.get(key), new[key])]
            if key.endswith(("sha256", "hash")):
                values = [" + ".join(part[:12] for part in value.strip('"').split(" + ")) for value in values]
            return f"{key} {' instead of '.join(values)}"
    return ""


def _line_of(path: Path) -> Line | None:
    """The line in a picture's metadata; None if it has none."""
    try:
        line = json.loads(_metadata(path).get(PNG_KEY, ""))
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _is_ours(path: Path) -> bool:
    return _metadata(path).get("Software", "").startswith("singlora-diffusion")


def _metadata(path: Path) -> dict[str, str]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {}


def _read(manifest: Path) -> list[Line]:
    """Its lines; an unfinished last one, which a crash may leave, does not count."""
    if not manifest.exists():
        return []
    try:
        text = manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest}: cannot be read: {error}") from error
    lines: list[Line] = []
    for number, raw in enumerate(text.split("\n")[:-1], start=1):
        try:
            line = json.loads(raw)
            if Path(line["file"]).name != line["file"]:
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{manifest}, line {number}: is no JSON object with the name of a file beside it; mend or remove it"
            ) from error
        lines.append(line)
    return lines


def _save(picture: Image.Image, path: Path, line: str = "") -> None:
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("Software", f"singlora-diffusion {__version__}")
    if line:
        about.add_text(PNG_KEY, line)
    buffer = io.BytesIO()
    picture.save(buffer, "png", pnginfo=about)
    try:
        _replace(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
