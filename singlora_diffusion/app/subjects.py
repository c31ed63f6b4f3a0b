"""The images of a subject: what is dropped into the page, as the trainer will crop it, with findings and captions."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import files
from ..data import captions, crops, images, masks
from ..data.checking import Finding, check_folder
from ..data.folders import read_folder
from ..errors import UserError
from ..terminal import escaped

SIDE = 192
"""Of a thumbnail, in pixels."""
HATCH = 12
"""Pixels of a thumbnail from one line to the next, where the loss leaves something out."""
LONGEST = 2000
"""Characters of a caption."""


@dataclass(frozen=True)
class Shown:
    """An image of the folder.

    Attributes:
        name: as findings have it.
        thumbnail: as a data URI. What its mask leaves out is dark and hatched.
        masked: it has a mask that can be used.
    """

    name: str
    path: Path
    thumbnail: str
    caption: str
    findings: tuple[Finding, ...]
    masked: bool = False


@dataclass(frozen=True)
class Subject:
    """A folder as the page shows it: its images, and what is to be said of the rest."""

    folder: Path
    images: tuple[Shown, ...]
    findings: tuple[Finding, ...]


def look(folder: Path) -> Subject:
    """What `singlora check` finds, image by image, each in the trainer's crop."""
    found = check_folder(folder)
    try:
        texts = captions.of_report(read_folder(folder, decode=False)).texts
    except UserError:  # which is among the findings
        texts = {}
    beside = masks.beside(found.images.values()).of
    shown = []
    for name, path in found.images.items():
        thumbnail, masked = _thumbnail(path, beside.get(path), _changed(path, beside.get(path)))
        shown.append(Shown(name, path, thumbnail, texts.get(name, ""), found.of(name), masked))
    return Subject(folder, tuple(shown), tuple(one for one in found.findings if one.name not in found.images))


def take(folder: Path, uploads: Sequence[Path]) -> list[str]:
    """Copy what can be trained on into a folder; nothing that is there is replaced.

    Args:
        uploads: images, text files with their captions, and masks.

    Returns:
        One line for each file that is refused.
    """
    refused: list[str] = []
    kept: dict[str, Path] = {}  # name of a dropped image, without its suffix -> where it is
    named = [(upload, upload.name.lstrip(".") or "image") for upload in uploads]
    for upload, name in sorted(named, key=lambda one: _belongs(one[1])):
        stem = Path(name).stem
        try:
            if masks.is_mask(name):
                _take_mask(folder, upload, name, kept)
            elif _belongs(name):
                captions.read_text(upload)
                _take(folder, upload, f"{kept[stem].stem}.txt" if stem in kept else name)
            else:
                images.open_image(upload)
                kept.setdefault(stem, _take(folder, upload, name))
        except UserError as error:
            refused.append(f"{escaped(name)}: {str(error).removeprefix(f'{escaped(upload, 1000)}: ')}")
    return refused


def _belongs(name: str) -> bool:
    """Whether a file goes with an image: a mask or a caption."""
    return masks.is_mask(name) or name.lower().endswith(".txt")


def _take(folder: Path, upload: Path, name: str) -> Path:
    """Copy a file, under another name where its own is taken."""
    content, target, number = upload.read_bytes(), folder / name, 2
    while target.exists() and target.read_bytes() != content:
        target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    if not target.exists():
        files.write_bytes(target, content)
    return target


def _take_mask(folder: Path, upload: Path, name: str, kept: Mapping[str, Path]) -> None:
    """Copy a mask, named after its image.

    Raises:
        UserError: it has no image, another size, or the image has another mask.
    """
    owner = masks.owner(Path(name))
    try:
        there = {path.stem: path for path in read_folder(folder, decode=False).images}
    except UserError:
        there = {}
    image = {**there, **kept}.get(owner)
    if image is None:
        raise UserError("is a mask without an image; name it after its image")
    masks.open_mask(upload, images.open_image(image).size)
    target = folder / f"{image.stem}{name.removeprefix(owner)}"
    content, other = upload.read_bytes(), masks.beside([image]).of.get(image, target)
    if other.exists() and other.read_bytes() != content:
        raise UserError(f"{escaped(image.name)} has another mask; remove that one first")
    files.write_bytes(target, content)


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


def _changed(*paths: Path | None) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns for path in paths if path is not None)


@lru_cache(maxsize=200)
def _thumbnail(path: Path, mask: Path | None, changed: tuple[int, ...]) -> tuple[str, bool]:
    """The trainer's crop as a data URI, and whether a mask is seen in it.

    Args:
        changed: when; of files that have changed since, there is another thumbnail.
    """
    image = images.open_image(path)
    part = crops.box(image.size, SIDE, SIDE)
    seen = image.resize((SIDE, SIDE), box=part)
    try:
        painted = None if mask is None else masks.open_mask(mask, image.size)
    except UserError:  # which is among the findings
        painted = None
    if painted is not None:
        seen = _masked(seen, crops.mask(painted, part, SIDE, SIDE)[0])
    buffer = io.BytesIO()
    seen.save(buffer, "webp", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", painted is not None


def _masked(image: Image.Image, counts: NDArray[np.float32]) -> Image.Image:
    """An image, dark and hatched where it does not count in the loss.

    Args:
        counts: (height, width) in [0, 1].
    """
    pixels = np.asarray(image, dtype=np.float32)
    hatched = np.add.outer(np.arange(image.height), np.arange(image.width)) % HATCH < HATCH // 4
    out = 0.3 * pixels + np.where(hatched, np.float32(90), np.float32(0))[..., None]
    share = counts[..., None]
    return Image.fromarray(np.rint(share * pixels + (1 - share) * out).astype(np.uint8))
