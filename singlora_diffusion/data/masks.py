"""Masks beside images: grey images that say how much each part of an image counts in the loss, white for all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import UserError
from ..terminal import escaped
from .images import IMAGE_SUFFIX, open_image

ENDINGS = (".mask", "-masklabel")
"""What a mask is named after its image's name: `dog.mask.png`, or as OneTrainer has it, `dog-masklabel.png`."""


class Masks(NamedTuple):
    """What lies beside images."""

    of: dict[Path, Path]
    """Image -> mask, for those that have one."""
    orphans: tuple[Path, ...]
    """Masks that belong to no image."""


def is_mask(name: str) -> bool:
    """Whether a file is a mask, which its name says."""
    path = Path(name)
    if name.startswith("."):  # macOS writes ._dog.mask.png beside dog.mask.png
        return False
    return IMAGE_SUFFIX.fullmatch(path.suffix) is not None and path.stem.lower().endswith(ENDINGS)


def owner(mask: Path) -> str:
    """The name of a mask's image, without its suffix."""
    ending = next(ending for ending in ENDINGS if mask.stem.lower().endswith(ending))
    return mask.stem[: -len(ending)]


def beside(images: Iterable[Path]) -> Masks:
    """The masks in the folders of these images."""
    named: dict[tuple[Path, str], list[Path]] = {}  # folder and name without suffix -> images
    for image in images:
        named.setdefault((image.parent, image.stem), []).append(image)
    found, orphans = dict[Path, Path](), list[Path]()
    for folder in dict.fromkeys(folder for folder, _ in named):
        for mask in sorted(entry for entry in folder.iterdir() if is_mask(entry.name)):
            owners = named.get((folder, owner(mask)), [])
            found |= dict.fromkeys(owners, mask)
            orphans += [] if owners else [mask]
    return Masks(found, tuple(orphans))


def open_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """One mask, mode "L", upright; what is transparent is black.

    Args:
        size: width and height of its image.

    Raises:
        UserError: it cannot be read, has another size, or is black all over.
    """
    mask = open_image(path, background="black").convert("L")
    if mask.size != size:
        is_of, its = ("x".join(map(str, one)) for one in (mask.size, size))
        raise UserError(f"{escaped(path, 1000)}: is {is_of} pixels, its image {its}; save the mask at that size")
    if mask.getextrema() == (0, 0):
        raise UserError(f"{escaped(path, 1000)}: is black all over; paint white what is to be learned")
    return mask
