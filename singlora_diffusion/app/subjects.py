"""The images of a subject: what is dropped into the page, as the trainer will crop it, with findings and captions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import files
from ..data import captions, crops, images
from ..data.checking import Finding, check_folder
from ..data.folders import read_folder
from ..errors import UserError
from ..terminal import escaped

SIDE = 192
"""Of a thumbnail, in pixels."""
LONGEST = 2000
"""Characters of a caption."""


@dataclass(frozen=True)
class Shown:
    """An image of the folder.

    Attributes:
        name: as findings have it.
        thumbnail: as a data URI.
    """

    name: str
    path: Path
    thumbnail: str
    caption: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Subject:
    """A folder as the page shows it: its images, and what is to be said of the rest."""

    folder: Path
    images: tuple[Shown, ...]
    findings: tuple[Finding, ...]


def look(folder: Path, prompt: str | None = None) -> Subject:
    """What `singlora check` finds, image by image, each in the trainer's crop."""
    found = check_folder(folder, instance_prompt=prompt)
    try:
        texts = captions.of_report(read_folder(folder, decode=False)).texts
    except UserError:  # which is among the findings
        texts = {}
    shown = tuple(
        Shown(name, path, _thumbnail(path, path.stat().st_mtime_ns), texts.get(name, ""), found.of(name))
        for name, path in found.images.items()
    )
    return Subject(folder, shown, tuple(one for one in found.findings if one.name not in found.images))


def take(folder: Path, uploads: Sequence[Path]) -> list[str]:
    """Copy what can be trained on into a folder; nothing that is there is replaced.

    Args:
        uploads: images, and text files with their captions.

    Returns:
        One line for each file that is refused.
    """
    refused: list[str] = []
    for upload in uploads:
        name = upload.name.lstrip(".") or "image"
        try:
            if upload.suffix.lower() == ".txt":
                upload.read_text(encoding="utf-8-sig")
            else:
                images.decoded(upload)
        except (images.Unusable, UnicodeDecodeError) as error:
            why = str(error) if isinstance(error, images.Unusable) else "is not UTF-8 text; save it as that"
            refused.append(f"{escaped(name)}: {why}")
            continue
        content, target, number = upload.read_bytes(), folder / name, 2
        while target.exists() and target.read_bytes() != content:
            target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
            number += 1
        if not target.exists():
            files.write_bytes(target, content)
    return refused


def write_caption(image: Path, text: str) -> None:
    """Keep a caption beside its image, as kohya's trainers have it; an empty one is kept as an empty file.

    Raises:
        UserError: it is too long, or cannot be written.
    """
    text = " ".join((text or "").split())
    path = image.with_suffix(".txt")
    if len(text) > LONGEST:
        raise UserError(f"{escaped(path.name)}: a caption has up to {LONGEST} characters")
    if text or path.exists():
        files.write_text(path, text + "\n")


@lru_cache(maxsize=200)
def _thumbnail(path: Path, changed: int) -> str:
    image = images.open_image(path)
    seen = image.resize((SIDE, SIDE), box=crops.box(image.size, SIDE, SIDE))
    buffer = io.BytesIO()
    seen.save(buffer, "webp", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
