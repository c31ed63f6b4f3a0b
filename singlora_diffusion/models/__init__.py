"""Base-model families: one file each behind one contract, found by what a model folder says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from . import stable_diffusion
from .stable_diffusion import StableDiffusion

Family = StableDiffusion

FAMILIES: dict[str, Callable[[Path, str, str, str], Family]] = {
    "StableDiffusionPipeline": stable_diffusion.load,
}
"""Loader by the pipeline class that a folder's model_index.json names."""

DTYPES = ("float32", "bfloat16", "float16")

TOYWORLD = Path(__file__).parent.parent / "toyworld" / "weights" / "pipeline"


def folder(name_or_path: str) -> Path:
    """The diffusers folder behind `toyworld`, a local path or a hub id (downloaded into diffusers' own cache).

    Raises:
        UserError: no such folder, not a diffusers folder, or a hub id that cannot be had.
    """
    path = TOYWORLD if name_or_path == "toyworld" else Path(name_or_path).expanduser()
    if name_or_path == "toyworld" and not path.is_dir():
        raise UserError(f"the packaged model toyworld is not at {path}: install the package again")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{path} is no diffusers model: it has no model_index.json; give the folder that holds one")
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; give a diffusers folder (convert a single checkpoint with diffusers first)")
    local = name_or_path.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())
    if name_or_path.count("/") != 1 or local:
        raise UserError(f"no model at {name_or_path}: give `toyworld`, a diffusers folder or a hub id like owner/name")
    return _download(name_or_path)


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        # Parts that are given need no download: these two are not used.
        parts = {"safety_checker": None, "feature_extractor": None}
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, **parts))
    except Exception as error:  # the hub's, the network's and diffusers' own are of many kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"cannot get {hub_id} from the hub ({reason}): check the id and the network, or give a local folder"
        ) from error


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
