"""manifest.jsonl: one JSON object per generated picture, with its file name, prompts and seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> its line. Of two lines for one picture the later one holds.

    Raises:
        UserError: the file is missing, empty, or has a line that names no picture.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it is the manifest that generating writes") from error
    lines: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            lines[row["file"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: is no JSON object with a file name; remove or mend it") from error
    if not lines:
        raise UserError(f"{path}: lists no pictures; generate some, or remove it to score all pictures of the folder")
    return lines
