"""The images of the subject: those to train on, and held-out ones to score with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ..toyworld.subjects import Subject

IDENTIFIER = "sks"
MANIFEST = "manifest.jsonl"


def write_references(subject: Subject, folder: Path) -> None:
    """The training images, written or found as they should be.

    Raises:
        UserError: the folder holds something else.
    """
    from ..toyworld.subjects import references

    _write_images(folder, {f"{k:02d}.png": image for k, (image, _, _) in enumerate(references(subject))})


def write_heldout(subject: Subject, folder: Path, prompts_from: str) -> None:
    """An image of the subject in every place, none of which is trained on, each with the prompt that describes it.

    Raises:
        UserError: the folder holds something else.
    """
    from ..data import prompts
    from ..toyworld.captions import PLACES
    from ..toyworld.subjects import HELD_OUT, references

    supply = references(subject, len(PLACES), start=HELD_OUT)
    images = {f"{scene.background.replace(' ', '-')}.png": image for image, _, scene in supply}
    _write_images(folder, images)
    templates = prompts.load(prompts_from)
    lines = []
    for name, (_, _, scene) in zip(images, supply, strict=True):
        said = [one for one in templates if any(one.template.endswith(words) for words in PLACES[scene.background])]
        lines += [
            {
                "file": name,
                "prompt": one.text(IDENTIFIER, subject.class_noun),
                "prompt_without_token": one.without_token(subject.class_noun),
                "template": one.template,
                "prompt_index": one.index,
            }
            for one in said[:1]
        ]
    if lines:
        files.write_text(folder / MANIFEST, "".join(f"{json.dumps(line)}\n" for line in lines))
    else:
        (folder / MANIFEST).unlink(missing_ok=True)


def _write_images(folder: Path, images: Mapping[str, np.ndarray]) -> None:
    """Those that are missing; nothing is written into a folder that holds other images."""
    import numpy as np
    from PIL import Image

    from ..data.folders import image_files
    from ..data.images import open_image

    present = {path.name for path in image_files(folder)} if folder.is_dir() and any(folder.iterdir()) else set()
    if present - set(images) or any(
        not np.array_equal(np.asarray(open_image(folder / name)), images[name]) for name in present
    ):
        raise UserError(f"{folder}: holds other images than this demo's; name another folder with --output_dir")
    for name in (name for name in images if name not in present):
        with files.replacing(folder / name) as part:
            Image.fromarray(images[name]).save(part)
