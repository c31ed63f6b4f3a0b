"""What makes two runs the same: settings, base model, images. A checkpoint carries it, and resuming compares it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files, settings
from ..models import Family
from ..terminal import escaped
from .material import Material
from .recipe import Recipe, to_be_shared

FOLDERS = ("instance_data_dir", "class_data_dir")
"""Must be the same where a checkpoint does not know the images themselves."""


def of(recipe: Recipe, family: Family, found: Material) -> dict[str, Any]:
    """The identity of a run, as JSON knows it."""
    images = {found.report.name_of(path): path for path in found.report.images}
    return {
        "settings": {**to_be_shared(recipe), "instance_prompt": found.prompt},
        "base": _weights(family),
        "instance_images": {name: files.sha256(path) for name, path in images.items()},
        "class_images": {path.name: files.sha256(path) for path in found.classes},
        "captions": [found.said.get(name) for name in images] if found.said else [],
        "class_captions": [found.said_classes.get(path.name) for path in found.classes] if found.said_classes else [],
        "repeats": list(found.report.repeats),
        "masks": [_sha256(found.masks.get(path)) for path in images.values()] if found.masks else [],
    }


def _weights(family: Family) -> str:
    """The fingerprint of the base model, with that of an autoencoder that is not its own."""
    return family.fingerprint if family.vae_source is None else f"{family.fingerprint}+{family.vae_fingerprint}"


def _sha256(path: Path | None) -> str | None:
    return None if path is None else files.sha256(path)


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
    for key, kind in (("captions", "captions"), ("class_captions", "captions of class images")):
        if before.get(key, []) != now[key]:
            return f"with other {kind}"
    if before.get("masks", []) != now["masks"]:
        return "with other masks"
    if before.get("repeats", [1] * len(now["repeats"])) != now["repeats"]:
        return "with images that were seen more or less often"
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
