"""Where an encoder's files are: named by the user, packaged, in the hub's local cache, or on the hub.

Files are safetensors, JSON and text: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Literal

from singlora_diffusion.errors import UserError

Role = Literal["clip", "dino"]


def weights_file(source: str | None, role: Role, repository: str, name: str) -> Path:
    """One safetensors file: of the hub repository, of a folder, or the file itself."""
    if source is None:
        return _from_hub(repository, [name], f"--{role}") / name
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / name
    elif not path.exists() and _is_hub_name(source):
        return _from_hub(source, [name], f"--{role}") / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; get {name} from https://huggingface.co/{repository} for --{role}")
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: is no safetensors file, and pickled weights are not read; "
            f"get {name} from https://huggingface.co/{repository} for --{role}"
        )
    return path


def encoder_folder(source: str, role: Role, names: list[str]) -> Path:
    """A folder that holds the first of these names; a hub name is fetched, these files only."""
    path = Path(source).expanduser()
    if not path.exists() and _is_hub_name(source):
        return _from_hub(source, names, f"--{role}")
    if path.is_file():
        raise UserError(f"{path}: is a file; name the folder that holds {names[0]} and the weights")
    if not (path / names[0]).is_file():
        raise UserError(
            f"{path}: no {names[0]} there; name the folder of an encoder with --{role}, or reinstall if it is ours"
        )
    return path


def packaged(role: Role) -> str:
    """Where the package keeps toyworld's encoders; found without importing it."""
    spec = importlib.util.find_spec("singlora_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"toyworld's encoders come with singlora-diffusion, which is not installed; name one with --{role}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "toyworld" / "weights" / role)


def _is_hub_name(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.startswith(".")


def _from_hub(repository: str, names: list[str], instead: str) -> Path:
    """The folder with those of the named files that a hub repository has. The local cache goes before the network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import get_session

    where = f"https://huggingface.co/{repository}"
    with contextlib.suppress(Exception):  # whatever is wrong with the cache, the network can mend
        cached = Path(snapshot_download(repository, allow_patterns=names, local_files_only=True))
        if _is_complete(cached, names):
            return cached
    try:
        get_session().head(constants.ENDPOINT, timeout=10)  # the hub's own client retries for half a minute
    except Exception as error:
        raise UserError(
            f"{repository}: not on this machine, and the Hugging Face hub cannot be reached; "
            f"get {names[0]} from {where} and name it with {instead}"
        ) from error
    try:
        folder = Path(snapshot_download(repository, allow_patterns=names))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{repository}: cannot be fetched from the Hugging Face hub ({reason}); see {where}") from error
    if not _is_complete(folder, names):
        raise UserError(f"{repository}: the hub repository lacks {names[0]} or weights as safetensors; see {where}")
    return folder


def _is_complete(folder: Path, names: list[str]) -> bool:
    weights = [name for name in names if name.endswith(".safetensors")]
    return (folder / names[0]).is_file() and any((folder / name).is_file() for name in weights)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object")
    return content


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
