"""manifest.jsonl: one JSON object per generated image, with its file name, prompts and seed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import reason
from ..terminal import escaped

MANIFEST = "manifest.jsonl"

Record = dict[str, Any]
"""A line of the manifest: "file", the name of an image, and how it was made."""

TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "prompt_without_token": (str,),
    "template": (str,),
    "prompt_index": (int,),
    "seed": (int,),
    "identifier": (str,),
    "class_noun": (str,),
    "negative_prompt": (str,),
    "adapter": (str,),
    "adapter_sha256": (str,),
    "base_model": (str,),
    "base_hash": (str,),
    "vae": (str,),
    "vae_hash": (str,),
    "scheduler": (str,),
    "dtype": (str,),
    "steps": (int,),
    "height": (int,),
    "width": (int,),
    "guidance_scale": (int, float),
    "scale": (int, float, str),  # of several adapters: "1.0 + 0.7"
    "merged": (bool,),
}
"""The fields that are known, each of these types or null. Other fields may hold anything."""


def read_manifest(path: Path, *, interrupted: bool = False) -> dict[str, Record]:
    """File name -> its line. Of two lines for one image the later one holds.

    Args:
        interrupted: the run that wrote it may have been stopped at any point. A last line that is cut off does not
            count then, and neither a missing nor an empty manifest is an error.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line is not what `check_line` takes; with its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        if interrupted:
            return {}
        raise UserError(f"{path}: no such file; it is the manifest that generating writes") from error
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {why}") from error
    rows = text.split("\n")  # str.splitlines would also split at a U+2028 inside a prompt
    cut_off = len(rows) if interrupted and rows[-1] else None  # the number of the line that has no end
    lines: dict[str, Record] = {}
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = check_line(json.loads(row))
        except (ValueError, RecursionError) as error:
            if number == cut_off:
                continue
            why = "nested too deep" if isinstance(error, RecursionError) else escaped(error)
            raise UserError(
                f"{path}, line {number}: is not a JSON object with the name of an image in that folder ({why}); "
                f"correct or remove it"
            ) from error
        lines[line["file"]] = line
    if not lines and not interrupted:
        raise UserError(f"{path}: lists no images; generate some, or remove it to score all images of the folder")
    return lines


def prompt_of(line: Record) -> str | None:
    """What an image shares with the other images of its prompt, whatever the identifier; None where nothing is known.

    It is the prompt without its identifier, the template first, so that two runs have their prompts in common. An
    image whose prompt is not known stands for itself.
    """
    for field in ("template", "prompt_without_token", "prompt"):
        if line.get(field):
            return str(line[field])
    return Path(line["file"]).stem if line.get("file") else None


def check_line(line: object) -> Record:
    """A line of a manifest, returned as it is.

    Raises:
        ValueError: not an object, "file" is not a plain file name, or a field of `TYPES` has another type.
        RecursionError: nested beyond reason.
    """
    if not isinstance(line, dict):
        raise ValueError(f"it has type {type(line).__name__}")
    name = line.get("file")
    if not isinstance(name, str):
        raise ValueError("it has no file name" if name is None else f"its file name has type {type(name).__name__}")
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0") or len(os.fsencode(name)) > 255:
        raise ValueError(f"{escaped(name, 40)!r} is not a file name")
    for field, kinds in TYPES.items():
        value = line.get(field)
        if value is not None and type(value) not in kinds:  # by identity: a bool is no number here
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{field} has type {type(value).__name__}, not {wanted}")
        if isinstance(value, str):
            value.encode()  # half a surrogate pair is a ValueError
    json.dumps(line, allow_nan=False)  # and so is NaN
    return line
