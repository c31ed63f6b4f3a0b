"""`singlora check FOLDER`: the findings as lines, and a sheet of the images with the trainer's crops on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tyro.conf import Positional

from ..errors import UserError
from ..settings import Side, check
from ..terminal import escaped
from . import buckets, png
from .checking import FolderCheck, check_folder
from .crops import Cropping, box
from .images import open_image

CELL, GAP, LINE = 224, 8, 18  # pixels
MULTIPLE = 8  # of which sides are multiples, whatever the model
DRAWN, MARKED = (40, 190, 90), (220, 60, 50)


@dataclass(frozen=True)
class CheckSettings:
    """Look at a folder of images before training on it: what is odd, and what to do. No file of yours is changed."""

    folder: Positional[Path]
    """Folder with images of the subject, or with folders named as 10_sks dog."""
    instance_prompt: str | None = None
    """Also check that the prompt has an identifier and a class noun."""
    resolution: Side | None = None
    """Side of the training images in pixels, to judge size and sharpness by. None: what is tiny anywhere."""
    enable_bucket: bool = False
    """The images will be cropped to buckets, not to squares; with --resolution."""
    sheet: Path | None = None
    """Where the contact sheet goes, `.png`, crops drawn on the images. None: no sheet."""


def run(settings: CheckSettings) -> None:
    """Print the findings.

    Raises:
        UserError: training on the folder is impossible, or the sheet cannot be written.
    """
    check(settings)
    sheet = settings.sheet
    if sheet is not None and (sheet.suffix.lower() != ".png" or (sheet.exists() and not png.is_ours(sheet))):
        raise UserError(f"--sheet {escaped(sheet, 1000)}: must end in .png, and be new or a sheet of this program")
    cropping = Cropping(1, 1)  # a square; its scale does not matter to what it shows
    if settings.enable_bucket:
        if settings.resolution is None or settings.resolution % MULTIPLE:
            raise UserError(f"--enable_bucket: needs --resolution, a multiple of {MULTIPLE}: as the training has it")
        cropping = Cropping(1, 1, buckets=buckets.for_model(settings.resolution, MULTIPLE))
    found = check_folder(
        settings.folder,
        instance_prompt=settings.instance_prompt,
        resolution=settings.resolution,
        buckets=settings.enable_bucket,
    )
    print(f"{len(found.images)} image{'s' * (len(found.images) != 1)} in {escaped(found.folder, 1000)}")
    for part in found.repeated:
        print(f"  {part}")
    for finding in found.findings:
        about = f"{escaped(finding.name)}: " if finding.name else ""
        print(f"  {finding.kind:<11}{about}{finding.what}; {finding.fix}")
    if not found.findings:
        print("  nothing odd")
    if sheet is not None and found.images:
        png.write(contact_sheet(found, cropping), sheet)
        print(f"wrote {escaped(sheet, 1000)}: the trainer sees what is inside the frames")
    if obstacles := [finding for finding in found.findings if finding.prevents]:
        raise UserError(f"{escaped(found.folder, 1000)}: {obstacles[0].what}; {obstacles[0].fix}")


def contact_sheet(found: FolderCheck, cropping: Cropping) -> Image.Image:
    """All images, with the crop framed that the trainer takes; red where there is a finding, named below."""
    columns = min(6, max(1, math.ceil(math.sqrt(len(found.images)))))
    rows = math.ceil(len(found.images) / columns)
    height = CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), GAP + rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (name, path) in enumerate(found.images.items()):
        row, column = divmod(number, columns)
        left, top = GAP + column * (CELL + GAP), GAP + row * height
        image = open_image(path)
        seen = cropping.size_of(image.size)
        image.thumbnail((CELL, CELL))
        x, y = left + (CELL - image.width) // 2, top + (CELL - image.height) // 2
        sheet.paste(image, (x, y))
        kinds = [finding.kind for finding in found.of(name)]
        left_of, above, right_of, below = (int(edge) for edge in box(image.size, *seen))
        frame = x + left_of, y + above, x + max(right_of - 1, left_of), y + max(below - 1, above)
        pen.rectangle(frame, outline=MARKED if kinds else DRAWN, width=3)
        for line, text in enumerate((escaped(name, 32), ", ".join(kinds))):
            plain = text.encode("ascii", "replace").decode()
            pen.text((left, top + CELL + line * LINE), plain, fill=MARKED if line else "black", font=font)
    return sheet
