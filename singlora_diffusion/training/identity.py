"""What makes two runs the same: settings, base model, images. A checkpoint carries it, and resuming compares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, settings
from ..terminal import escaped
from .recipe import Recipe, to_be_shared

FOLDERS = ("instance_data_dir", "class_data_dir")
"""Must be the same where a checkpoint does not know the images themselves."""


def of(
    recipe: Recipe,
    base: str,
    instance: Sequence[Path],
    class_images: Sequence[Path],
    captions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The identity of a run, as JSON knows it.

    Args:
        base: fingerprint of the base model.
        instance, class_images: in the order that training takes them.
        captions: of instance images, by name.
    """
    return {
        "settings": to_be_shared(recipe),
        "base": base,
        "instance_images": {path.name: files.sha256(path) for path in instance},
        "class_images": {path.name: files.sha256(path) for path in class_images},
        "captions": [(captions or {}).get(path.name) for path in instance] if captions else [],
    }


def is_one(found: object) -> bool:
    """Whether something out of a file is an identity."""
    kinds = {"settings": dict, "base": str, "instance_images": dict, "class_images": dict}
    return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two identities, in words; None: nothing."""
    if words := _of_settings(before["settings"], now["settings"]):
        return words
    if before["base"] != now["base"]:
        return "with another base model of that name"
    for key, kind in (("instance_images", "instance"), ("class_images", "class")):
        if words := _of_images(before[key], now[key]):
            return f"with other {kind} images ({words})"
    if before.get("captions", []) != now["captions"]:
        return "with other captions"
    return None


def difference_of_old(before: Mapping[str, Any], recipe: Recipe) -> str | None:
    """`difference` for the recipe of a checkpoint that was written before there were identities."""
    now = {**to_be_shared(recipe), **{key: settings.as_json(recipe)[key] for key in FOLDERS}}
    return _of_settings(before, {key: value for key, value in now.items() if key in before})


def _of_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    before = {**_defaults(), **before}  # what a run did not know yet was as it is by default
    differing = [key for key in now if before.get(key) != now[key]]
    said = ", ".join(f"--{key} {escaped(before.get(key))} (now {escaped(now[key])})" for key in differing)
    return f"with {said}" if said else None


def _defaults() -> dict[str, Any]:
    return settings.as_json(settings.build(Recipe, instance_data_dir=Path(), instance_prompt=""))


def _of_images(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Names do not matter, contents and their order do."""
    if list(before.values()) == list(now.values()):
        return None
    changed = [name for name in before if name in now and before[name] != now[name]]
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    parts = {"changed": changed, "missing": gone, "new": new}
    said = [f"{what}: {', '.join(map(escaped, names[:3]))}" for what, names in parts.items() if names]
    return "; ".join(said) or "in another order"
