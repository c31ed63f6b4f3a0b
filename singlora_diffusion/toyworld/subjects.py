"""The fixed split of toyworld: 30 held-out subjects, and everything else for pretraining.

Pretraining identities come from seeds below `PRETRAINING_SEEDS`; a draw that agrees with a held-out subject in class,
colour, pattern, pattern colour, detail colour and accessory is drawn anew. The held-out subjects are the table `_TABLE`
below, six for tuning (settings may be chosen on them) and 24 for the test (figures are reported on them).

Reference k of a subject has its own seed, so that the supply never ends. References below `HELD_OUT` are for training
and stay in five of the twelve places; those from `HELD_OUT` on are for scoring and go through all twelve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import png
from ..errors import UserError
from ..files import check_writable
from ..terminal import escaped
from .identities import BACKGROUNDS, Identity, Scene, draw_identity, identity, scene
from .render import render

PRETRAINING_SEEDS = 1_000_000
HELD_OUT = 1_000
TRAINING_PLACES = 5

_TABLE: tuple[tuple[str, str, str, str, str, int], ...] = (
    # name, colour, pattern, pattern colour, detail colour, accessory
    ("backpack-1", "red", "star", "yellow", "blue", 0),
    ("backpack-2", "teal", "dots", "white", "purple", 1),
    ("bowl-1", "blue", "stripes", "white", "orange", 0),
    ("bowl-2", "yellow", "heart", "red", "teal", 1),
    ("can-1", "green", "star", "white", "yellow", 1),
    ("can-2", "pink", "stripes", "purple", "green", 0),
    ("candle-1", "purple", "dots", "yellow", "teal", 0),
    ("candle-2", "white", "heart", "red", "blue", 2),
    ("cat-1", "orange", "stripes", "brown", "blue", 1),
    ("cat-2", "white", "heart", "red", "purple", 0),
    ("clock-1", "blue", "star", "yellow", "red", 0),
    ("clock-2", "brown", "checks", "yellow", "teal", 2),
    ("dog-1", "brown", "star", "yellow", "teal", 0),
    ("dog-2", "white", "dots", "black", "red", 1),
    ("sneaker-1", "purple", "star", "white", "yellow", 0),
    ("sneaker-2", "green", "checks", "yellow", "blue", 1),
    ("teapot-1", "pink", "heart", "red", "teal", 0),
    ("teapot-2", "blue", "dots", "yellow", "white", 2),
    ("vase-1", "teal", "stripes", "white", "red", 0),
    ("vase-2", "orange", "checks", "white", "blue", 2),
    ("boot-1", "yellow", "dots", "blue", "red", 0),
    ("boot-2", "purple", "heart", "pink", "orange", 1),
    ("toy-1", "red", "checks", "white", "teal", 0),
    ("toy-2", "green", "heart", "white", "orange", 1),
    ("backpack-3", "green", "checks", "white", "pink", 2),
    ("can-3", "red", "dots", "white", "teal", 2),
    ("cat-3", "purple", "star", "yellow", "orange", 2),
    ("dog-3", "pink", "stripes", "blue", "yellow", 2),
    ("teapot-3", "orange", "star", "blue", "purple", 1),
    ("boot-3", "red", "stripes", "white", "blue", 2),
)

TUNING: tuple[str, ...] = tuple(row[0] for row in _TABLE if row[0].endswith("-3"))
TEST: tuple[str, ...] = tuple(row[0] for row in _TABLE if not row[0].endswith("-3"))


@dataclass(frozen=True)
class Subject:
    """A held-out subject; `set` is "tuning" or "test", `class_noun` the word for it in prompts."""

    name: str
    class_noun: str
    identity: Identity
    set: str


def _held_out() -> dict[str, Subject]:
    subjects = {}
    for number, (name, colour, pattern, pattern_colour, detail_colour, accessory) in enumerate(_TABLE):
        noun = name.split("-")[0]
        who = replace(
            identity(PRETRAINING_SEEDS + number, noun),
            colour=colour,
            pattern=pattern,
            pattern_colour=pattern_colour,
            detail_colour=detail_colour,
            accessory=accessory,
        )
        subjects[name] = Subject(name, noun, who, "tuning" if name in TUNING else "test")
    return subjects


SUBJECTS: dict[str, Subject] = _held_out()
"""Name to held-out subject, test set first."""

_HELD_OUT_KEYS = frozenset(subject.identity.key for subject in SUBJECTS.values())


def pretraining_identity(seed: int) -> Identity:
    """The identity of a pretraining seed, never one of the held-out subjects.

    Raises ValueError unless 0 <= seed < `PRETRAINING_SEEDS`.
    """
    if not 0 <= seed < PRETRAINING_SEEDS:
        raise ValueError(f"pretraining seeds lie in [0, {PRETRAINING_SEEDS}), got {seed}")
    drawn, attempt = identity(seed), 0
    while drawn.key in _HELD_OUT_KEYS:
        attempt += 1
        drawn = draw_identity(np.random.default_rng((11, seed, attempt)))
    return drawn


def subject(name: str) -> Subject:
    """The held-out subject of that name; UserError lists the names there are."""
    if name not in SUBJECTS:
        raise UserError(f"toyworld has no subject {name!r}; choose one of: {', '.join(SUBJECTS)}")
    return SUBJECTS[name]


def _places(one: Subject) -> list[str]:
    rng = np.random.default_rng((19, list(SUBJECTS).index(one.name)))
    return [BACKGROUNDS[k] for k in rng.permutation(len(BACKGROUNDS))]


def unused_backgrounds(subject: Subject) -> tuple[str, ...]:
    """The places in which no training reference (below `HELD_OUT`) of the subject stands, in `BACKGROUNDS` order."""
    unused = _places(subject)[TRAINING_PLACES:]
    return tuple(name for name in BACKGROUNDS if name in unused)


def references(
    subject: Subject, n: int = 5, start: int = 0, backgrounds: Sequence[str] | None = None
) -> list[tuple[np.ndarray, np.ndarray, Scene]]:
    """References `start` to `start + n - 1` of a subject: (image (64, 64, 3) uint8, mask (64, 64) bool, scene).

    Without `backgrounds` the places are those of the module's docstring, else the given names, taken in turn.
    """
    unknown = [name for name in backgrounds or () if name not in BACKGROUNDS]
    if unknown:
        raise UserError(f"toyworld has no background {unknown[0]!r}; choose from: {', '.join(BACKGROUNDS)}")
    order, number = _places(subject), list(SUBJECTS).index(subject.name)
    supply = []
    for k in range(start, start + n):
        choice = backgrounds or (order if k >= HELD_OUT else order[:TRAINING_PLACES])
        where = scene(PRETRAINING_SEEDS * (1 + number) + k, choice[k % len(choice)])
        supply.append((*render(subject.identity, where), where))
    return supply


def write_subject(name: str, output_dir: str | Path, n: int = 5, masks: bool = False) -> list[Path]:
    """Write the first n training references as 00.png, 01.png, ... (64 pixels) into a folder, made if need be.

    Args:
        masks: also write masks/00.png, ... (255 on the object, 0 elsewhere).

    Returns:
        The images' paths.

    Raises:
        UserError: an unknown name, n < 1, or a folder that already holds something or cannot be written to. Of the
            images nothing is left then.
    """
    chosen = subject(name)
    if n < 1:
        raise UserError(f"cannot write {n} images of {name}; ask for at least 1")
    folder = Path(output_dir)
    check_writable(folder, f"the folder for {name}")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{escaped(folder, 1000)} already holds files; name a new or empty folder for {name}")
    written: list[Path] = []
    try:
        for k, (pixels, mask, _) in enumerate(references(chosen, n)):
            files = {folder / f"{k:02d}.png": pixels}
            if masks:
                files[folder / "masks" / f"{k:02d}.png"] = mask.astype(np.uint8) * 255
            for path, content in files.items():
                png.write(Image.fromarray(content), path)
                written.append(path)
    except UserError:
        for path in written:
            path.unlink()
        if masks and (folder / "masks").is_dir():
            (folder / "masks").rmdir()
        raise
    return [path for path in written if path.parent == folder]
