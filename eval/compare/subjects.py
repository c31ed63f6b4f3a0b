"""The subjects of a comparison: toyworld's, or folders of real images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlora_diffusion.data import png
from singlora_diffusion.data.folders import image_files
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import read_json
from singlora_diffusion.terminal import escaped

from .settings import SubjectSettings

HELD_OUT = "heldout"
"""The folder, in a subject's own, of images to score with."""
TUNED_ON = 3
"""So many subjects, where none is named."""
IN_GALLERY = 4
"""Images of each of toyworld's subjects."""


@dataclass(frozen=True)
class Subject:
    """A subject, and where its images are."""

    name: str
    class_noun: str
    images: Path
    """To train on."""
    references: Path
    """To score with: held-out images where there are any, else the training images."""

    @property
    def held_out(self) -> bool:
        return self.references != self.images


@dataclass(frozen=True)
class Subjects:
    """Those that rates are tuned on, and those that methods are compared on; no subject is both."""

    tuning: tuple[Subject, ...]
    test: tuple[Subject, ...]
    gallery: Path
    """A folder with a folder of real images for each subject, in which generated images look for theirs."""

    @property
    def by_name(self) -> dict[str, Subject]:
        return {one.name: one for one in (*self.tuning, *self.test)}


def read(who: SubjectSettings, written_to: Path) -> Subjects:
    """Find the subjects.

    Args:
        written_to: folder that toyworld's images are written to, as far as they are not there.

    Raises:
        UserError: a subject that is not there, or is named twice; no subject to tune or to test on.
    """
    known, tuned_on = _toyworld() if who.subjects_dir is None else _folders(who.subjects_dir)
    tuning = who.tuning_subjects or tuned_on
    test = who.subjects or tuple(name for name in known if name not in tuning)
    for name in (*tuning, *test):
        if name not in known:
            raise UserError(f"no subject {escaped(name)}; there are {', '.join(map(escaped, known))}")
    if twice := set(tuning) & set(test):
        raise UserError(f"--subjects {escaped(min(twice))}: learning rates are tuned on it; name it once")
    if not tuning or not test:
        raise UserError("at least one subject to tune learning rates on and one to compare on are needed")
    if who.subjects_dir is None:
        gallery = _gallery(known, written_to / "gallery")
        found = {name: _written(name, written_to) for name in (*tuning, *test)}
    else:
        gallery, nouns = who.subjects_dir, _nouns(who.class_nouns)
        found = {name: _in_folder(gallery / name, nouns) for name in (*tuning, *test)}
    return Subjects(tuple(found[name] for name in tuning), tuple(found[name] for name in test), gallery)


def _toyworld() -> tuple[Sequence[str], Sequence[str]]:
    from singlora_diffusion.toyworld.subjects import TEST, TUNING

    return (*TEST, *TUNING), TUNING[:TUNED_ON]


def _written(name: str, root: Path) -> Subject:
    """Five images to train on, and twelve others, one in each of toyworld's places."""
    from singlora_diffusion.toyworld.identities import BACKGROUNDS
    from singlora_diffusion.toyworld.subjects import HELD_OUT as FIRST
    from singlora_diffusion.toyworld.subjects import references, subject

    known = subject(name)
    folders = {"train": references(known), HELD_OUT: references(known, len(BACKGROUNDS), start=FIRST)}
    for folder, supply in folders.items():
        _write(root / folder / name, supply)
    return Subject(name, known.class_noun, root / "train" / name, root / HELD_OUT / name)


def _gallery(names: Sequence[str], root: Path) -> Path:
    """Some images of every subject there is, other ones than are scored with, whichever subjects are compared on."""
    from singlora_diffusion.toyworld.subjects import HELD_OUT as FIRST
    from singlora_diffusion.toyworld.subjects import references, subject

    for name in names:
        if not (root / name).is_dir():
            _write(root / name, references(subject(name), IN_GALLERY, start=FIRST + 100))
    return root


def _write(folder: Path, supply: Sequence[tuple[Any, Any, Any]]) -> None:
    from PIL import Image

    for number, (pixels, _, _) in enumerate(supply):
        path = folder / f"{number:02d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            png.write(Image.fromarray(pixels), path)


def _folders(root: Path) -> tuple[Sequence[str], Sequence[str]]:
    if not os.path.isdir(root):
        raise UserError(f"--subjects_dir {escaped(root, 1000)}: no such folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return names, names[:TUNED_ON]


def _in_folder(folder: Path, nouns: dict[str, str]) -> Subject:
    image_files(folder)  # or say what is wrong with them, now
    apart = folder / HELD_OUT
    if apart.is_dir():
        image_files(apart)
    noun = nouns.get(folder.name) or re.sub(r"[_\-\s]*\d*$", "", folder.name).replace("_", " ")
    if not noun:
        raise UserError(f"{escaped(folder, 1000)}: what is it? Name its class noun in --class_nouns")
    return Subject(folder.name, noun, folder, apart if apart.is_dir() else folder)


def _nouns(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    content = read_json(path)
    if not all(isinstance(noun, str) and noun.strip() for noun in content.values()):
        raise UserError(f'{escaped(path, 1000)}: is no mapping of subjects to class nouns, as in {{"dog6": "dog"}}')
    return content
