"""The table of families, and loading by it: a model folder says itself which family it is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from . import stable_diffusion
from .family import Family
from .hub import folder

FAMILIES: dict[str, Callable[[Path, str, str, str], Family]] = {
    "StableDiffusionPipeline": stable_diffusion.load,
}
"""Loader by the pipeline class that a folder's model_index.json names."""

DTYPES = ("float32", "bfloat16", "float16")


def load(name_or_path: str, dtype: str = "float32", device: str = "cpu") -> Family:
    """Load a base model, frozen and in eval mode.

    Args:
        name_or_path: `toyworld`, a diffusers folder, or a hub id.
        dtype: float32, bfloat16 or float16: what the frozen networks compute in.
        device: a torch device.

    Raises:
        UserError: not a model, an unsupported pipeline, or damaged files.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown precision {dtype!r}: give one of {', '.join(DTYPES)}")
    path = folder(name_or_path)
    try:
        pipeline = json.loads((path / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/model_index.json is damaged: it must be JSON that names a pipeline class") from error
    if str(pipeline) not in FAMILIES:
        raise UserError(f"{path} is a {pipeline}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline](path, name_or_path, dtype, device)
