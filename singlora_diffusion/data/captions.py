"""Captions beside images: `dog.txt` for `dog.jpg`, as kohya's trainers have it, or imagefolder's `metadata.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..files import reason
from ..terminal import escaped
from .images import IMAGE_SUFFIX

METADATA = "metadata.jsonl"
"""What Hugging Face's imagefolder calls its table: one JSON object a line, with `file_name` and `text`."""


class Captions(NamedTuple):
    """What a folder says of its images."""

    texts: dict[str, str]
    """Name of an image -> its caption, white space collapsed."""
    sources: dict[str, str]
    """Name of an image -> the file that holds its caption."""
    orphans: tuple[str, ...]
    """Captions that belong to no image: names of text files, and of images that the table lists in vain."""


def read(folder: Path, images: Sequence[str]) -> Captions:
    """The captions of these images of a folder. A text file beside an image goes before the table.

    A text file counts as a caption if an image has its name, or if other text files are captions: notes.txt in a folder
    without captions is just a file.

    Raises:
        UserError: a caption or the table cannot be read.
    """
    table = _table(folder / METADATA)
    texts = {name: text for name, text in table.items() if name in images}
    sources = dict.fromkeys(texts, METADATA)
    beside = {path.stem: path for path in sorted(folder.glob("*.txt")) if not path.name.startswith(".")}
    stems = {Path(name).stem for name in images}
    for name in images:
        if (path := beside.get(Path(name).stem)) is not None and (text := _line(path)):
            texts[name], sources[name] = text, path.name
    lonely = [path.name for stem, path in beside.items() if stem not in stems]
    captioned = any(stem in stems for stem in beside)
    return Captions(texts, sources, (*(lonely if captioned else ()), *(name for name in table if name not in images)))


def _line(path: Path) -> str:
    return " ".join(_text(path).split())


def _text(path: Path) -> str:
    shown = escaped(path, 1000)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({reason(error)}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: is not UTF-8 text ({error}); save it as that") from error


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    shown, rows = escaped(path, 1000), {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(
                f"{shown}, line {number}: is no caption; write "
                f'{{"file_name": "dog.jpg", "text": "a photo of sks dog"}}, one image a line'
            )
        rows[name.removeprefix("./")] = " ".join(text.split())
    return {name: text for name, text in rows.items() if text and IMAGE_SUFFIX.fullmatch(Path(name).suffix)}
