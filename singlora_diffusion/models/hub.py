"""Where a base model's files are: in the package, in a folder, or on the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError

WEIGHTS = Path(__file__).parent.parent / "toyworld" / "weights"
"""Of the packaged models: `pipeline`, and the encoders `clip`, `dino`."""
TOYWORLD = WEIGHTS / "pipeline"


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
