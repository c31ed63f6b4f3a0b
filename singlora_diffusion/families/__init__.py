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

TOYWORLD = Path(__file__).parent.parent / "toyworld" / "weights" / "pipeline"


def folder(name_or_path: str) -> Path:
    """The diffusers folder behind `toyworld`, a local path or a hub id (downloaded into diffusers' own cache).

    Raises:
        UserError: no such folder, not a diffusers folder, or a hub id that cannot be had.
    """
    if name_or_path == "toyworld":
        return TOYWORLD
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{path} is no diffusers model: it has no model_index.json; give the folder that holds one")
        return path
    if path.is_file():
        raise UserError(f"{path} is a file; give a diffusers folder (convert a single checkpoint with diffusers first)")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(f"no model at {name_or_path}: give `toyworld`, a diffusers folder or a hub id like owner/name")
    return _download(name_or_path)


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
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
    path = folder(name_or_path)
    try:
        pipeline = json.loads((path / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/model_index.json is damaged: it must be JSON that names a pipeline class") from error
    if pipeline not in FAMILIES:
        raise UserError(f"{path} is a {pipeline}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline](path, name_or_path, dtype, device)
