"""Folders of images: which files are images, which of them can be used, and what is odd about them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import UserError
from ..files import reason
from ..terminal import escaped
from . import masks, png
from .images import IMAGE_SUFFIX, RAW_SUFFIX, Unusable, decoded, kind_of, why_no_image

CONTACT_SHEET = "contact_sheet.png"
"""What this program calls the sheets that it puts beside its images."""
EXTREME = 3
"""Long side to short side, above which most of an image is cropped off."""
EXTREME_IN_BUCKETS = 12
"""The same where images are cropped to buckets, which have up to 4."""
SMALL = 16  # pixels, where no resolution is known
LISTED = 20  # names in one message
REPEATED = re.compile(r"(\d{1,4})_(.+)", re.DOTALL)
"""kohya's names of folders: an epoch has each image of `10_sks dog` 10 times, with the prompt sks dog."""


class Remark(NamedTuple):
    """Something to say of one file of a folder."""

    name: str
    reason: str


class Part(NamedTuple):
    """Images of one folder, all seen equally often."""

    folder: Path
    images: tuple[Path, ...]
    repeats: int = 1
    """How often an epoch has each of them."""
    prompt: str | None = None
    """What the folder's name says of them."""

    def __str__(self) -> str:
        """In words: "10_sks dog: 5 images, 10 times each"."""
        count = len(self.images)
        said = f"{escaped(self.folder.name)}: {count} image{'s' * (count != 1)}"
        return f"{said}, {self.repeats} times each" if self.repeats > 1 else f"{said}, once each"


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds, each list in natural order.

    Attributes:
        parts: what can be used, folder by folder: the folder itself, or those of `REPEATED` in it.
        skipped: what is not an image.
        trouble: images that cannot be used.
        notes: images that are used and may surprise.
    """

    folder: Path
    parts: tuple[Part, ...]
    skipped: tuple[Remark, ...] = ()
    trouble: tuple[Remark, ...] = ()
    notes: tuple[Remark, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """What can be used."""
        return tuple(path for part in self.parts for path in part.images)

    @property
    def repeats(self) -> tuple[int, ...]:
        """How often an epoch has each image."""
        return tuple(part.repeats for part in self.parts for _ in part.images)

    @property
    def repeated(self) -> tuple[Part, ...]:
        """The parts, where their folders' names say something; else nothing."""
        return tuple(part for part in self.parts if part.prompt is not None)

    @property
    def prompt(self) -> str | None:
        """The name of the folder that an epoch has the most images of; None: the names say nothing."""
        return max(self.parts, key=lambda part: part.repeats * len(part.images)).prompt

    def name_of(self, path: Path) -> str:
        """Of a file below the folder, as remarks have it: `dog.jpg`, or `10_sks dog/dog.jpg`."""
        return path.relative_to(self.folder).as_posix()

    def __str__(self) -> str:
        """A line for the folder, one for each of kohya's folders in it, and one for each remark."""
        lines = [f"{len(self.images)} image{'s' * (len(self.images) != 1)} in {escaped(self.folder, 1000)}"]
        lines += [f"  {part}" for part in self.repeated]
        for title, remarks in (("left out", self.trouble), ("skipped", self.skipped), ("note on", self.notes)):
            lines += [f"  {title} {escaped(name)}: {reason}" for name, reason in remarks]
        return "\n".join(lines)


def read_folder(
    folder: str | Path,
    *,
    strict: bool = False,
    decode: bool = True,
    resolution: int | None = None,
    buckets: bool = False,
) -> FolderReport:
    """Look through a folder: its images, and everything else with the reason why it is left out.

    Args:
        folder: searched flat, sub-folders are not entered. Images are known by content, not by name, and sorted
            naturally (2.png before 10.png).
        strict: an image that cannot be used is an error, instead of being left out.
        decode: also decode every image, so that a damaged one is found now, and odd ones are noted.
        resolution: pixels that the images are used at; those much smaller are noted.
        buckets: images are cropped to buckets, not to squares.

    Raises:
        UserError: no such folder, or no image that can be used; with `strict` all images that cannot be used.
    """
    folder = Path(folder)
    entries = _entries(folder)
    found, skipped, trouble = _looked_through(entries)
    notes: list[Remark] = []
    if decode:
        found, damaged, notes = _sift(found, resolution, buckets)
        trouble = sorted([*trouble, *damaged], key=lambda one: _natural_key(one.name))
    if trouble and (strict or not found):
        raise UserError(_all_trouble(folder, trouble))
    if not found:
        raise UserError(_no_images(folder, entries, skipped))
    return FolderReport(folder, (Part(folder, tuple(found)),), tuple(skipped), tuple(trouble), tuple(notes))


def read_instance_folder(folder: str | Path, read: Callable[[Path], FolderReport] = read_folder) -> FolderReport:
    """`read_folder`; or, where there are no images but folders as kohya's trainers have them, these together.

    Args:
        read: `read_folder`, with the options to use.

    Raises:
        UserError: as `read_folder`, of the folder or of one of these.
    """
    folder = Path(folder)
    entries = _entries(folder)
    named = {entry: match for entry in entries if (match := REPEATED.fullmatch(entry.name)) and os.path.isdir(entry)}
    found, skipped, trouble = _looked_through(entries)
    if not named or found or trouble:
        return read(folder)
    parts: list[Part] = []
    remarks: dict[str, list[Remark]] = {"skipped": [one for one in skipped if folder / one.name not in named]}
    for entry, match in named.items():
        repeats = int(match[1])
        if not repeats:
            remarks["skipped"].append(Remark(entry.name, "its name says 0 times"))
            continue
        report = read(entry)
        parts.append(Part(entry, report.images, repeats, " ".join(match[2].split())))
        for kind in ("skipped", "trouble", "notes"):
            of_part = (Remark(f"{entry.name}/{name}", why) for name, why in getattr(report, kind))
            remarks.setdefault(kind, []).extend(of_part)
    if not parts:
        raise UserError(f"{escaped(folder, 1000)}: all its folders are named 0_...; name one 1_... or more")
    return FolderReport(folder, tuple(parts), **{kind: tuple(found) for kind, found in remarks.items()})


def has_images(folder: str | Path) -> bool:
    """Whether `read_instance_folder` finds an image in a folder. None is decoded, and the first one suffices."""
    try:
        entries = _entries(Path(folder))
        named = [entry for entry in entries if REPEATED.fullmatch(entry.name) and os.path.isdir(entry)]
        return any(map(_is_image, entries)) or any(any(map(_is_image, _entries(entry))) for entry in named)
    except UserError:
        return False


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, none of them decoded.

    Raises:
        UserError: as `read_folder`, and for files that are named as images and are none.
    """
    return list(read_folder(folder, strict=True, decode=False).images)


def _entries(folder: Path) -> list[Path]:
    shown = escaped(folder, 1000)
    if os.path.isfile(folder):
        raise UserError(f"{shown}: is a file; name the folder that holds the images")
    if not os.path.isdir(folder):
        raise UserError(f"{shown}: no such folder; name one that holds images")
    try:
        return sorted(folder.iterdir(), key=lambda entry: _natural_key(entry.name))
    except OSError as error:
        raise UserError(f"{shown}: cannot be listed ({reason(error)}); check its permissions") from error


def _looked_through(entries: Iterable[Path]) -> tuple[list[Path], list[Remark], list[Remark]]:
    """Files that are images by their first bytes, what is none, and what should be one and cannot be."""
    found: list[Path] = []
    skipped: list[Remark] = []
    trouble: list[Remark] = []
    for entry in entries:
        try:
            if why := _reason_to_skip(entry):
                skipped.append(Remark(entry.name, why))
            else:
                found.append(entry)
        except Unusable as error:
            trouble.append(Remark(entry.name, str(error)))
    return found, skipped, trouble


def _sift(
    files: Iterable[Path], resolution: int | None, buckets: bool
) -> tuple[list[Path], list[Remark], list[Remark]]:
    """The files that can be decoded, trouble with the others, and what is odd about the images."""
    good: list[Path] = []
    trouble: list[Remark] = []
    notes: list[Remark] = []
    first: dict[bytes, str] = {}  # pixels -> name
    for path in files:
        try:
            image = decoded(path)
        except Unusable as error:
            trouble.append(Remark(path.name, str(error)))
            continue
        good.append(path)
        notes += [Remark(path.name, what) for what in _oddities(image, resolution, buckets)]
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if (same := first.setdefault(pixels, path.name)) != path.name:
            notes.append(Remark(path.name, f"has the same pixels as {escaped(same)}"))
    return good, trouble, notes


def _oddities(image: Image.Image, resolution: int | None, buckets: bool) -> list[str]:
    short, long = sorted(image.size)
    size = f"is {image.width}x{image.height} pixels"
    odd = []
    if short * 2 < (resolution or SMALL):
        odd.append(f"{size}, which is less than half of {resolution}" if resolution else f"{size}, which is tiny")
    if long > (EXTREME_IN_BUCKETS if buckets else EXTREME) * short:
        odd.append(f"{size}: most of so long an image is cropped off")
    return odd


def _reason_to_skip(entry: Path) -> str | None:
    """Why an entry of a folder is not an image to use, None when it is one.

    Raises:
        Unusable: it is named as an image and its content is none, or it cannot be opened.
    """
    if os.path.isdir(entry):
        return "a sub-folder, not searched"
    if entry.name.startswith("."):  # .DS_Store, and ._photo.jpg: notes of macOS that are named as images
        return "a hidden file"
    if RAW_SUFFIX.fullmatch(entry.suffix):
        return "a camera's raw file; convert it to JPEG or PNG to use it"
    if not os.path.isfile(entry):
        return "a link to nothing, or no ordinary file"
    if entry.name == CONTACT_SHEET and png.is_ours(entry):
        return "a contact sheet of this program"
    if masks.is_mask(entry.name):
        return "a mask"
    if kind_of(entry) is not None:
        return None
    if IMAGE_SUFFIX.fullmatch(entry.suffix):
        raise Unusable(why_no_image(entry))
    return "not an image"


def _is_image(entry: Path) -> bool:
    try:
        return _reason_to_skip(entry) is None
    except Unusable:
        return False


def _all_trouble(folder: Path, trouble: Sequence[Remark]) -> str:
    listed = "; ".join(f"{escaped(name)}: {why}" for name, why in trouble[:LISTED])
    more = f"; and {len(trouble) - LISTED} more" if len(trouble) > LISTED else ""
    if len(trouble) == 1:
        return f"{escaped(folder, 1000)}{os.sep}{listed}"
    return f"{escaped(folder, 1000)}: {len(trouble)} files cannot be used: {listed}{more}"


def _no_images(folder: Path, entries: Sequence[Path], skipped: Sequence[Remark]) -> str:
    shown = escaped(folder, 1000)
    if not entries:
        return f"{shown}: is empty; put the images into it"
    below = {entry.name: count for entry in entries if os.path.isdir(entry) and (count := _count_images(entry))}
    if below:
        listed = ", ".join(f"{escaped(name)} ({count})" for name, count in list(below.items())[:5])
        more = f" and {len(below) - 5} more" if len(below) > 5 else ""
        first = escaped(folder / next(iter(below)), 1000)
        return f"{shown}: its images are one level down, in {listed}{more}; name one of these, such as {first}"
    listed = ", ".join(f"{escaped(name)} ({why})" for name, why in skipped[:3])
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"{shown}: has no images, only {listed}{more}; put JPEG, PNG or WebP files into it"


def _count_images(folder: Path) -> int:
    try:
        names = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        return sum(IMAGE_SUFFIX.fullmatch(entry.suffix) is not None for entry in names)
    except OSError:
        return 0


def _natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name
