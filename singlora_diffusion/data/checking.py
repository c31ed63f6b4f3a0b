"""What is odd about a folder of images before anything is trained on it, image by image, each with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UserError
from ..terminal import escaped
from . import captions, masks
from .folders import EXTREME, EXTREME_IN_BUCKETS, SMALL, FolderReport, Part, read_folder, read_instance_folder
from .images import Unusable, decoded, is_one_colour, kind_of
from .prompts import split_folder_name, split_instance_prompt

HASH_SIDE = 16
"""A hash has the square of it in bits."""
NEARLY = 30
"""Bits of 256 in which hashes of one photograph saved twice differ at most; two photographs of one object in one place
differ by 37 and more on DreamBooth's data set."""
SHARP = 30.0
"""Variance of the Laplacian, 8-bit grey levels, below which an image is blurred: DreamBooth's photographs have 100 and
more at 512 pixels, and less than 4 after a Gaussian blur of 3 pixels."""
MEASURED_AT = 512
"""Short side, in pixels, at which sharpness is measured where no resolution is known."""
FEW, MANY = 3, 20
SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"},
    "PNG": {".png", ".apng"},
    "WebP": {".webp"},
    "BMP": {".bmp", ".dib"},
    "GIF": {".gif"},
    "TIFF": {".tif", ".tiff"},
    "HEIF": {".heic", ".heif", ".hif"},
    "AVIF": {".avif"},
}
"""How a file of each kind may be named."""


@dataclass(frozen=True)
class Finding:
    """Something to know of one image, of another file of the folder, or of the folder as a whole.

    Attributes:
        name: of the file; "" for the folder.
        kind: unreadable, skipped, duplicate, similar, tiny, long, blurred, one-colour, suffix, no-caption, no-image,
            mask, count, prompt, or folder.
        what: what was found, without the file's name.
        fix: what to do.
        prevents: training is impossible as long as it is so.
        other: name of the image that it resembles.
    """

    name: str
    kind: str
    what: str
    fix: str
    prevents: bool = False
    other: str | None = None


@dataclass(frozen=True)
class FolderCheck:
    """What `check_folder` found: the images that can be used, in the trainer's order, and the findings."""

    folder: Path
    images: Mapping[str, Path]
    """By name, as findings have it: `dog.jpg`, or `10_sks dog/dog.jpg`."""
    findings: tuple[Finding, ...]
    repeated: tuple[Part, ...] = ()
    """Folders in it that are named as kohya's trainers have it."""

    def of(self, name: str) -> tuple[Finding, ...]:
        """The findings on one image; "": those on the folder."""
        return tuple(finding for finding in self.findings if finding.name == name)


def check_folder(
    folder: str | Path,
    *,
    instance_prompt: str | None = None,
    resolution: int | None = None,
    buckets: bool = False,
) -> FolderCheck:
    """Look at everything in a folder as the trainer would, and closer. Only reads.

    Args:
        instance_prompt: also checked, if given.
        resolution: side of the training images in pixels, to measure size and sharpness at.
        buckets: they are cropped to buckets, not to squares.
    """
    folder = Path(folder)
    findings: list[Finding] = []
    if instance_prompt is not None:
        findings += _of_prompt(split_instance_prompt, instance_prompt)
    try:
        report = read_instance_folder(folder, partial(read_folder, decode=False))
    except UserError as error:
        what, fix = _halves(str(error).removeprefix(f"{escaped(folder, 1000)}: "))
        return FolderCheck(folder, {}, (*findings, Finding("", "folder", what, fix, prevents=True)))
    if instance_prompt is None and report.prompt is not None:
        findings += _of_prompt(split_folder_name, report.prompt)
    usable, on_images = _images(report, resolution, buckets)
    findings += [Finding(name, "unreadable", *_halves(why)) for name, why in report.trouble]
    findings += on_images
    findings += _captions(report, list(usable))
    findings += _masks(report, usable)
    findings += [
        Finding(name, "skipped", why, "nothing, if it is not meant to be trained on; else move its images up")
        for name, why in report.skipped
        if why.startswith(("a sub-folder", "a camera's", "a link"))
    ]
    if not usable:
        findings.append(Finding("", "folder", "no image can be used", "mend or replace the images", prevents=True))
    elif not FEW <= len(usable) <= MANY:
        few = len(usable) < FEW
        fix = "add different views of the subject" if few else "keep the best; more is right for a style, not a subject"
        findings.append(Finding("", "count", f"{len(usable)} images; {FEW} to {MANY} are usual", fix))
    return FolderCheck(folder, usable, tuple(findings), report.repeated)


def sharpness(image: Image.Image, side: int = MEASURED_AT) -> float:
    """Variance of the four-neighbour Laplacian of an RGB image in grey, its short side reduced to `side` pixels."""
    factor = side / min(image.size)
    if factor < 1:
        image = image.resize([max(1, round(length * factor)) for length in image.size], Image.Resampling.LANCZOS)
    grey = np.pad(
        np.asarray(image.convert("L"), dtype=np.float64), 1, mode="reflect" if min(image.size) > 1 else "edge"
    )
    inside = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inside).var())


def difference_hash(image: Image.Image) -> NDArray[np.bool_]:
    """(256,) bits: whether the image, reduced to 17x16 grey cells, grows brighter from each cell to the next."""
    cells = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    values = np.asarray(cells, dtype=np.int16)
    return (values[:, 1:] > values[:, :-1]).ravel()


def _of_prompt(split: Callable[[str], object], prompt: str) -> Iterator[Finding]:
    try:
        split(prompt)
    except UserError as error:
        yield Finding("", "prompt", *_halves(str(error)), prevents=True)


def _images(report: FolderReport, resolution: int | None, buckets: bool) -> tuple[dict[str, Path], list[Finding]]:
    """The images that can be decoded, and what is to be said of each of them."""
    usable: dict[str, Path] = {}
    findings: list[Finding] = []
    seen: dict[str, tuple[NDArray[np.bool_], int]] = {}  # name -> hash of the look, hash of the pixels
    for path in report.images:
        name = report.name_of(path)
        try:
            image = decoded(path)
        except Unusable as error:
            findings.append(Finding(name, "unreadable", *_halves(str(error))))
            continue
        usable[name] = path
        findings += _of_one(name, path, image, resolution, buckets)
        if is_one_colour(image):
            continue  # all of these look alike
        look, pixels = difference_hash(image), hash((image.size, image.tobytes()))
        for earlier, (its_look, its_pixels) in seen.items():
            if pixels == its_pixels:
                what = f"has the same pixels as {escaped(earlier)}"
                findings.append(Finding(name, "duplicate", what, "remove one", other=earlier))
                break
            if int((look != its_look).sum()) <= NEARLY:
                fix = "keep one, or the subject is learnt with this very view"
                findings.append(Finding(name, "similar", f"looks like {escaped(earlier)}", fix, other=earlier))
                break
        seen[name] = look, pixels
    return usable, findings


def _of_one(name: str, path: Path, image: Image.Image, resolution: int | None, buckets: bool) -> list[Finding]:
    short, long = sorted(image.size)
    size = f"is {image.width}x{image.height} pixels"
    found = []
    kind = kind_of(path)
    if kind is not None and path.suffix.lower() not in SUFFIXES[kind]:
        proper = min(SUFFIXES[kind], key=lambda suffix: (len(suffix), suffix != ".jpg", suffix))
        fix = f"rename it to {escaped(path.stem)}{proper}; other programs go by the name"
        found.append(Finding(name, "suffix", f"is a {kind} file by its content", fix))
    if short < (resolution or SMALL):
        what = f"{size}, which is tiny"
        if resolution:
            what = f"{size}, less than {resolution}" + (" that it is enlarged to" if not buckets else "")
        found.append(Finding(name, "tiny", what, "use the original, or a lower --resolution"))
    if long > (EXTREME_IN_BUCKETS if buckets else EXTREME) * short:
        fix = "crop it to the subject"
        found.append(Finding(name, "long", f"{size}: most of so long an image is cropped off", fix))
    if is_one_colour(image):
        found.append(Finding(name, "one-colour", "shows one colour only", "remove it"))
    elif (measured := sharpness(image, resolution or MEASURED_AT)) < SHARP:
        what = f"is blurred or has next to no detail (sharpness {measured:.1f}, usual from {SHARP:g} on)"
        found.append(Finding(name, "blurred", what, "replace it by a sharp one: blur is learnt too"))
    return found


def _captions(report: FolderReport, images: Sequence[str]) -> list[Finding]:
    try:
        there = captions.of_report(report)
    except UserError as error:
        return [Finding("", "captions", *_halves(str(error)), prevents=True)]
    found = [
        Finding(name, "no-image", "is a caption without an image", "add the image, or remove the caption")
        for name in there.orphans
    ]
    if there.texts:
        found += [
            Finding(
                name, "no-caption", "has no caption, others have", f"write {escaped(Path(name).stem)}.txt beside it"
            )
            for name in images
            if name not in there.texts
        ]
    return found


def _masks(report: FolderReport, images: Mapping[str, Path]) -> Iterator[Finding]:
    found = masks.beside(images.values())
    for image, mask in found.of.items():
        try:
            masks.open_mask(mask, decoded(image).size)
        except UserError as error:
            what, fix = _halves(str(error).removeprefix(f"{escaped(mask, 1000)}: "))
            yield Finding(report.name_of(mask), "mask", what, fix)
    for mask in found.orphans:
        yield Finding(report.name_of(mask), "no-image", "is a mask without an image", "name it after its image")


def _halves(message: str) -> tuple[str, str]:
    """What is wrong and what to do about it, which messages keep apart by a semicolon."""
    what, _, fix = message.partition("; ")
    return what, fix or "mend it"
