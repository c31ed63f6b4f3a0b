"""`singlora toyworld subject`: the images of a held-out subject as a folder to train on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from tyro.conf import Positional, arg

from .. import settings as ranges
from ..terminal import escaped

MOST = 1000  # `subjects.HELD_OUT`: references from there on are for scoring


@dataclass(frozen=True)
class SubjectSettings:
    """Write images of one of toyworld's subjects, none of which its model has seen, into a folder."""

    what: Positional[Literal["subject"]]
    """What to write; there is only `subject`."""
    name: str
    """Which one: dog-1, teapot-2, ... An unknown name lists them all."""
    output_dir: Path
    """A new or empty folder for the images."""
    images: Annotated[int, Interval(ge=1, le=MOST), arg(aliases=("--pictures",))] = 5
    """How many."""
    masks: bool = False
    """Also masks/00.png, ...: white where the object is."""


def write(settings: SubjectSettings) -> None:
    """Write the images and say how to train on them.

    Raises:
        UserError: a setting out of its range, an unknown subject, or a folder that is not empty or not writable.
    """
    from .subjects import subject, write_subject

    ranges.check(settings)
    paths = write_subject(settings.name, settings.output_dir, settings.images, settings.masks)
    print(f"{len(paths)} image{'s' * (len(paths) != 1)} of {settings.name} in {escaped(settings.output_dir, 1000)}")
    prompt = f"a photo of sks {subject(settings.name).class_noun}"
    command = ["singlora", "train", "--instance_data_dir", str(settings.output_dir), "--instance_prompt", prompt]
    print(f"next: {escaped(shlex.join([*command, '--output_dir', f'runs/{settings.name}']), 10_000)}")
