"""The output folder of a run: what is in it, whose it is, and what may happen to it.

Nothing that this program did not write is overwritten, moved or deleted. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..data import png
from ..errors import UserError
from ..terminal import escaped
from . import log_file
from .recipe import OutputSettings

ADAPTER, RECIPE, PREVIEWS, CURVES = "adapter.safetensors", "recipe.json", "previews", "logs"
LORA = "pytorch_lora_weights.safetensors"
"""The adapter as an ordinary LoRA, under the name that diffusers' scripts give it."""
BEST, VALIDATION, PROGRESS = "best", "validation.json", "progress.png"
"""The adapter of the best step, in a folder with what was best about it; the losses, drawn."""
CARD, CARD_MARK = "README.md", "<!-- Written by singlora train, which replaces this file. -->"
CLASS_IMAGES = ("class_images", "class_pictures")
"""Where generated class images go; the second is the first's former name."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
CHECKPOINT_FILES = frozenset({"adapter.safetensors", "optimizer.safetensors", "state.json"})
LEFT_BY_SYSTEMS = re.compile(r"\..*|Thumbs\.db|desktop\.ini", re.IGNORECASE)
"""What file managers put into folders that somebody looks at."""
UNFINISHED = re.compile(r"\.checkpoint-\d+\.(part|old)|\.adapter\.safetensors\.\d+\.part\.safetensors")
"""What killed writers leave, beside what `files.remove_leftovers` knows."""
RECIPE_KEYS = {"instance_prompt", "max_train_steps", "rank"}


def check(output: OutputSettings) -> None:
    """Whether a run may begin, or go on, in its output folder.

    Raises:
        UserError: the folder cannot be written to, holds files of another program under names that a run uses, or a run
            that has not been asked for.
    """
    out = output.output_dir
    files.check_writable(out, "--output_dir")
    strangers = foreign(out)
    if strangers:
        listed = ", ".join(escaped(path.relative_to(out)) for path in strangers[:3])
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise UserError(
            f"{escaped(out, 1000)}: {listed}{more} would be overwritten and was not written by this program: "
            f"move it away, or choose another --output_dir"
        )
    if output.overwrite or output.resume_from_checkpoint:
        _check_replaceable(out / ADAPTER)
        return
    if (out / ADAPTER).exists():
        raise UserError(
            f"{escaped(out / ADAPTER, 1000)} exists: choose another --output_dir, or put it away and begin anew with "
            f"--overwrite"
        )
    if found := checkpoints(out):
        raise UserError(
            f"{escaped(out, 1000)}: holds an unfinished run with {found[-1].name}: go on with "
            f"--resume_from_checkpoint latest, or put it away and begin anew with --overwrite"
        )


def _check_replaceable(adapter: Path) -> None:
    """Raise a UserError for an adapter's file that a run would replace or move, and that is none of ours."""
    if not adapter.exists():
        return
    from ..formats import read_header

    try:
        read_header(adapter)
    except UserError as error:
        raise UserError(f"{error}; a run would write another file of this name: move it away") from error


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of this program in a folder, oldest first; whether they are sound is not looked at."""
    return sorted((path for path in _numbered(out) if _is_checkpoint(path)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def ours(out: Path) -> list[Path]:
    """What runs of this program left in a folder, class images aside."""
    return [path for path in _used(out) if _is_ours(out, path)]


def foreign(out: Path) -> list[Path]:
    """What stands where a run would write, and no run wrote."""
    return [path for path in _used(out) if not _is_ours(out, path)]


def best(out: Path) -> list[Path]:
    """The adapter of the best step, and what is said of it."""
    return [path for name in (ADAPTER, VALIDATION) if (path := out / BEST / name).exists()]


def class_images(out: Path) -> Path:
    """The folder of generated class images."""
    return next((out / name for name in CLASS_IMAGES if (out / name).is_dir()), out / CLASS_IMAGES[0])


def generated(out: Path) -> list[Path]:
    """The class images of this program in a run's own folder; what the user put beside them is not among them."""
    return [path for path in _entries(class_images(out)) if png.is_ours(path)]


def put_away(out: Path, entries: Iterable[Path]) -> Path | None:
    """Move entries of a folder into a new `.old-N` in it; None where there are none.

    Raises:
        UserError: they cannot be moved.
    """
    entries = list(entries)
    if not entries:
        return None
    number = 1
    while (out / f".old-{number}").exists():
        number += 1
    away = out / f".old-{number}"
    try:
        for entry in entries:
            target = away / entry.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            entry.rename(target)
    except OSError as error:
        raise UserError(f"{escaped(out, 1000)}: its files cannot be moved: {files.reason(error)}") from error
    return away


def clean(out: Path) -> None:
    """Delete what killed runs left half-written, in a folder that is locked."""
    for folder in (out, out / PREVIEWS, class_images(out)):
        files.remove_leftovers(folder, lambda name: UNFINISHED.fullmatch(name) is not None)


def _used(out: Path) -> list[Path]:
    """Everything in a folder that stands where a run writes."""
    found = [path for name in (ADAPTER, RECIPE, log_file.NAME, LORA, CARD, PROGRESS) if (path := out / name).exists()]
    previews = [path for path in _entries(out / PREVIEWS) if re.fullmatch(r"step-\d{6,}\.png", path.name)]
    curves = [path for path in _entries(out / CURVES) if path.name.startswith("events.out.tfevents.")]
    return [*found, *best(out), *_numbered(out), *previews, *curves]


def _is_ours(out: Path, path: Path) -> bool:
    if path.parent == out / CURVES:  # every file of TensorBoard's has a name of its own: none is ever overwritten
        return True
    if CHECKPOINT.fullmatch(path.name):
        return _is_checkpoint(path)
    if not path.is_file():
        return False
    if path.name == VALIDATION:
        return _is_validation(path)
    if path == out / BEST / ADAPTER:
        return _is_validation(path.with_name(VALIDATION))
    if path.name == ADAPTER:  # guarded for itself
        return True
    if path.name in (RECIPE, LORA, CARD):
        return {RECIPE: _is_recipe, LORA: _is_export, CARD: _is_card}[path.name](path)
    if path.name == log_file.NAME:
        return _is_recipe(out / RECIPE) or _is_log(path)
    return _is_recipe(out / RECIPE) or png.is_ours(path)


def _is_recipe(path: Path) -> bool:
    try:
        return set(files.read_json(path)) >= RECIPE_KEYS
    except UserError:
        return False


def _is_validation(path: Path) -> bool:
    try:
        return {"step", "rule"} <= set(files.read_json(path))
    except (UserError, TypeError):
        return False


def _is_export(path: Path) -> bool:
    from ..formats import safetensors_io

    try:
        metadata = safetensors_io.read_index(path).metadata
    except UserError:
        return False
    return metadata.get("modelspec.implementation_version", "").startswith("singlora-diffusion/")


def _is_card(path: Path) -> bool:
    return CARD_MARK.encode() in path.read_bytes()[:10_000]


def _is_log(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    return not first or log_file.parsed(first) is not None


def _is_checkpoint(path: Path) -> bool:
    names = {entry.name for entry in _entries(path) if not LEFT_BY_SYSTEMS.fullmatch(entry.name)}
    return "state.json" in names and names <= CHECKPOINT_FILES


def _numbered(out: Path) -> list[Path]:
    return [path for path in _entries(out) if CHECKPOINT.fullmatch(path.name)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
