"""What lies where: the folders that the page may use, and what is found in them. Nothing outside of them is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.folders import has_images
from ..errors import UserError
from ..models.hub import PACKAGED
from ..sampling.manifest import MANIFEST
from ..terminal import escaped
from ..training import run_folder

NAME = re.compile(r"[^\W_][\w .-]{0,60}")
"""What a run or a subject may be called."""
REPORT = "report.html"
SUBJECTS, GALLERIES, ADAPTERS, QUEUE = "subjects", "images", "adapters", ".queue"


@dataclass(frozen=True)
class Places:
    """The folders that the page was started with.

    Attributes:
        root: absolute; what is made goes there.
        others: absolute; what is written there are captions, scores, and a run that goes on.
    """

    root: Path
    others: tuple[Path, ...] = ()

    @property
    def queue(self) -> Path:
        return self.root / QUEUE

    @property
    def subjects(self) -> Path:
        return self.root / SUBJECTS

    @property
    def galleries(self) -> Path:
        return self.root / GALLERIES

    @property
    def adapters(self) -> Path:
        return self.root / ADAPTERS

    def inside(self, named: str | Path | None, what: str = "the folder") -> Path:
        """A file or folder that the page may use; links are followed before it is decided.

        Raises:
            UserError: nothing is named, or it lies elsewhere.
        """
        if not named or not str(named).strip():
            raise UserError(f"{what}: name one")
        try:
            path = Path(named).expanduser().absolute()
            real = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{what} {escaped(named)}: is no path ({error})") from error
        if not any(real.is_relative_to(folder.resolve()) for folder in (self.root, *self.others)):
            raise UserError(
                f"{what} {escaped(named, 1000)}: lies outside of the folders that the page was started with; start it "
                f"with --folders {escaped(path.parent, 1000)}"
            )
        return path

    def base(self, named: str | None, what: str = "the base model") -> str:
        """A model: a name is left as it is, a folder must be one that the page may use.

        Raises:
            UserError: nothing is named, or a folder elsewhere.
        """
        named = (named or "").strip()
        if not named:
            raise UserError(f"{what}: name one, such as toyworld")
        if named in PACKAGED:  # also where a folder of that name lies, as for the commands
            return named
        is_path = named.startswith(("/", ".", "~")) or Path(named).exists()
        return str(self.inside(named, what)) if is_path else named

    def new(self, parent: Path, name: str | None, what: str) -> Path:
        """The path of a file or folder that is to be made.

        Raises:
            UserError: the name has more in it than letters, digits, spaces, dots and dashes, or is the page's own.
        """
        name = (name or "").strip()
        if parent == self.root and name.lower() in (SUBJECTS, GALLERIES, ADAPTERS):
            raise UserError(f"{what} {name}: the page keeps other files in a folder of this name; take another name")
        if NAME.fullmatch(name) is None:
            raise UserError(
                f'{what} "{escaped(name)}": take a name of letters, digits, spaces, dots and dashes, which begins with '
                f"a letter or a digit"
            )
        return parent / name

    def shown(self, path: Path) -> str:
        """A path as lists on the page have it: below OUTPUT_DIR without that."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def image_folders(self) -> list[Path]:
        """Folders of images to train on, or to compare with."""
        found = [*_folders(self.subjects)]
        for other in self.others:
            found += [one for one in (other, *_folders(other)) if has_images(one)]
        return found

    def models(self) -> list[str]:
        """Base models: those of the package, and the diffusers folders that are there."""
        folders = [one for other in (self.root, *self.others) for one in (other, *_folders(other))]
        return [*PACKAGED, *(str(one) for one in folders if (one / "model_index.json").exists())]

    def runs(self) -> list[Path]:
        """Run folders, the youngest first."""
        found = [path for folder in (self.root, *self.others) for path in _folders(folder)]
        return _young_first(path for path in found if (path / run_folder.RECIPE).exists())

    def adapter_files(self) -> list[Path]:
        """Everything to generate with: finished runs, best steps, checkpoints, and files."""
        found: list[Path] = []
        for run in self.runs():
            found += [run] if (run / run_folder.ADAPTER).exists() else []
            found += [run / run_folder.BEST] if (run / run_folder.BEST / run_folder.ADAPTER).exists() else []
            found += reversed(run_folder.checkpoints(run))
        for folder in (self.adapters, *self.others):
            found += sorted(folder.glob("*.safetensors"))
        return found

    def generated(self) -> list[Path]:
        """Folders of generated images, the youngest first."""
        folders = [*_folders(self.galleries), *(one for run in self.runs() for one in _folders(run))]
        return _young_first(one for one in folders if (one / MANIFEST).exists())

    def reports(self) -> list[Path]:
        """Pages that `singlora report` and `singlora compare` left."""
        folders = [self.root, *_folders(self.root), *_folders(self.galleries)]
        return _young_first(one / REPORT for one in folders if (one / REPORT).exists())


def _folders(path: Path) -> list[Path]:
    """The folders in a folder that can be looked into: not lost+found, which is the superuser's alone."""
    try:
        there = [one for one in path.iterdir() if not one.name.startswith(".")]
    except OSError:
        return []
    return sorted(one for one in there if os.path.isdir(one) and os.access(one, os.R_OK | os.X_OK))


def _young_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
