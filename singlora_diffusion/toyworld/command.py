"""`singlora toyworld subject`: the pictures of a held-out subject as a folder to train on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class SubjectSettings:
    """Write pictures of one of toyworld's subjects, none of which its model has seen, into a folder."""

    what: Positional[Literal["subject"]]
    """What to write; there is only `subject`."""
    name: str
    """Which one: dog-1, teapot-2, ... An unknown name lists them all."""
    output_dir: Path
    """A new or empty folder for the pictures."""
    pictures: int = 5
    """How many, of an endless supply."""
    masks: bool = False
    """Also masks/00.png, ...: white where the object is."""


def write(settings: SubjectSettings) -> None:
    """Write the pictures and say how to train on them."""
    from .subjects import subject, write_subject

    paths = write_subject(settings.name, settings.output_dir, settings.pictures, settings.masks)
    print(f"{len(paths)} picture{'s' * (len(paths) != 1)} of {settings.name} in {settings.output_dir}")
    folder, run = shlex.quote(str(settings.output_dir)), shlex.quote(f"runs/{settings.name}")
    prompt = f'"a photo of sks {subject(settings.name).class_noun}"'
    print(f"next: singlora train --instance_data_dir {folder} --instance_prompt {prompt} --output_dir {run}")
