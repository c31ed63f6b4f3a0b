"""Where a model's files are: in the package, in a folder, in the hub's local cache, or on the hub, asked in this order.

A name is one of `PACKAGED`, a path, or a hub id of the form owner/name. Files are safetensors, JSON and text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from ..terminal import escaped

WEIGHTS = Path(__file__).parent.parent / "toyworld" / "weights"
"""Of the packaged models, and of the encoders `clip`, `dino`."""
PACKAGED = {"toyworld": WEIGHTS / "pipeline", "toyworld-flow": WEIGHTS / "pipeline-flow"}
"""The models that come with the package, by name: a Stable Diffusion and a Stable Diffusion 3."""

INDEX = "model_index.json"
INSTEAD = "check the id and the network, or give a local folder"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of published pipelines that are not downloaded."""


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean a model on the hub: owner/name, and nothing of that name here."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    owner, slash, _ = name.partition("/")
    if not slash or os.path.lexists(name) or os.path.isdir(owner):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def file(name_or_path: str) -> Path | None:
    """The file that a name means: a whole model in one; None: it means no file."""
    path = Path(name_or_path).expanduser()
    return path if os.path.isfile(path) else None  # unlike Path.is_file, False for a name that is too long


def folder(name_or_path: str) -> Path:
    """The diffusers folder behind a name, with all its weights; a hub id is downloaded once, into the hub's own cache.

    Raises:
        UserError: no such folder, not a diffusers folder, or a hub id that cannot be downloaded.
    """
    path = _here(name_or_path)
    if path is None:
        return _pipeline(name_or_path)
    return _checked(path)


def configs(name_or_path: str) -> Path:
    """`folder`, but of a hub id the config files alone are downloaded."""
    path = _here(name_or_path)
    if path is None:
        return files(name_or_path, [INDEX, "*/config.json"], _is_described)
    return _checked(path)


def autoencoder(name_or_path: str) -> Path:
    """The folder with an autoencoder's config.json and weights: the one that is named, or the `vae` inside it.

    Raises:
        UserError: it holds neither, or a hub id that cannot be downloaded.
    """
    path = _here(name_or_path) or files(name_or_path, [f"{inside}{one}" for inside in _VAE for one in _KEPT], _own_vae)
    found = _own_vae(path)
    if found is None:
        raise UserError(f"{escaped(path, 1000)} holds no autoencoder: neither config.json with weights, nor vae/")
    return found


_VAE, _KEPT = ("", "vae/"), ("config.json", "diffusion_pytorch_model*.safetensors")


def _own_vae(path: Path) -> Path | None:
    folders = [path / inside for inside in _VAE]
    return next((one for one in folders if (one / "config.json").is_file() and any(one.glob("*.safetensors"))), None)


def files(
    repository: str,
    names: Sequence[str],
    complete: Callable[[Path], object] | None = None,
    instead: str = INSTEAD,
) -> Path:
    """The folder with some files of a hub repository, from the local cache or the hub.

    Args:
        repository: a hub id.
        names: of the files, or patterns such as `*/config.json`. Those that the repository lacks are not an error.
        complete: whether a folder holds what is needed. None: all of `names`.
        instead: what the user can do where they cannot be downloaded.

    Raises:
        UserError: they are not in the cache, and the hub cannot be reached or lacks them.
    """
    from huggingface_hub import snapshot_download

    wanted = list(names)
    complete = complete or (lambda found: all((found / name).is_file() for name in wanted))
    with suppress(Exception):  # whatever is wrong with the cache, the hub can mend
        cached = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=True))
        if complete(cached):
            return cached
    _reach(repository, instead)
    try:
        found = Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the hub's and the network's own are of many kinds
        raise _not_downloaded(repository, error, instead) from error
    if not complete(found):
        raise UserError(f"{repository}: the hub repository lacks some of {', '.join(wanted)}; see {url(repository)}")
    return found


def url(repository: str) -> str:
    """The page of a hub repository."""
    return f"https://huggingface.co/{repository}"


def _here(name_or_path: str) -> Path | None:
    """The folder on this machine that a name means; None: it is a hub id.

    Raises:
        UserError: a path to nothing.
    """
    if name_or_path in PACKAGED:
        packaged = PACKAGED[name_or_path]
        if not packaged.is_dir():
            raise UserError(f"the packaged model {name_or_path} is not at {packaged}: install the package again")
        return packaged
    path = Path(name_or_path).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        return path
    if not is_hub_id(name_or_path):
        names = ", ".join(f"`{name}`" for name in PACKAGED)
        raise UserError(
            f"no model at {escaped(name_or_path, 1000)}: give {names}, a diffusers folder, a single .safetensors file "
            f"or a hub id like owner/name"
        )
    return None


def _checked(path: Path) -> Path:
    if not (path / INDEX).is_file():
        raise UserError(
            f"{escaped(path, 1000)} is no diffusers model: it has no {INDEX}; give the folder that holds one"
        )
    return path


def _pipeline(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    options = {"use_safetensors": True, **dict.fromkeys(UNUSED)}  # parts that are given need no download
    with suppress(Exception):
        cached = Path(DiffusionPipeline.download(hub_id, local_files_only=True, **options))
        if _is_complete(cached):
            return cached
    _reach(hub_id)
    try:
        return Path(DiffusionPipeline.download(hub_id, **options))
    except Exception as error:
        raise _not_downloaded(hub_id, error) from error


def _reach(repository: str, instead: str = INSTEAD) -> None:
    """The hub's own client tries an unreachable hub for half a minute; this asks once."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:
        raise UserError(
            f"cannot get {repository} from the hub: it is not on this machine, and {constants.ENDPOINT} cannot be "
            f"reached; {instead}"
        ) from error


def _not_downloaded(repository: str, error: Exception, instead: str = INSTEAD) -> UserError:
    reason = escaped(" ".join(str(error).split()) or type(error).__name__, 160)
    return UserError(f"cannot get {repository} from the hub ({reason}): {instead}")


def _parts(path: Path) -> list[Path]:
    """The folders of a pipeline's parts by its index."""
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[-1] is not None}
    return [path / name for name in listed if name not in UNUSED]


def _networks(path: Path) -> list[Path]:
    """Those parts that have a config.json, and weights in a whole model."""
    return [part for part in _parts(path) if not part.name.startswith(("scheduler", "tokenizer"))]


def _is_described(path: Path) -> bool:
    return (path / INDEX).is_file() and all((part / "config.json").is_file() for part in _networks(path))


def _is_complete(path: Path) -> bool:
    """Whether every part is there, with all its shards where it has weights: a download may have been interrupted."""
    for part in _networks(path):
        if not any(part.glob("*.safetensors")):
            return False
        for listing in part.glob("*.safetensors.index.json"):
            shards = json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()
            if not all((part / shard).is_file() for shard in shards):
                return False
    return _is_described(path) and all(part.is_dir() for part in _parts(path))
