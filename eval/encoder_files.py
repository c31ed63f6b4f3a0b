"""Where an encoder's files are: a folder or file that the user named, the hub's local cache, or the hub.

Files are safetensors, JSON and text: nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from singlora_diffusion.errors import UserError
from singlora_diffusion.files import read_json
from singlora_diffusion.models import hub

from . import preprocessing
from .preprocessing import Preprocessing


@dataclass(frozen=True)
class Found:
    """An encoder's files, looked at and not loaded."""

    path: Path  # what is loaded: a file or a folder
    architecture: str
    hashed: dict[str, Path]
    preprocessing: Preprocessing


class Files(Protocol):
    """Where an encoder's files come from."""

    def find(self, source: str | None, role: str) -> Found:
        """`source`: a path or a hub name; None: the encoder's own place. Raises UserError for what is not there."""
        ...


@dataclass(frozen=True)
class Published:
    """The weights of one known model: a safetensors file."""

    repository: str  # on the Hugging Face hub
    name: str
    architecture: str
    preprocessing: Preprocessing

    def find(self, source: str | None, role: str) -> Found:
        path = _weights_file(source, role, self.repository, self.name)
        return Found(path, self.architecture, {"weights": path}, self.preprocessing)


@dataclass(frozen=True)
class OpenClipFolder:
    """Any open_clip model: a folder or hub repository with open_clip_config.json, safetensors and its tokenizer."""

    config = "open_clip_config.json"
    weights = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")

    def find(self, source: str | None, role: str) -> Found:
        folder = _encoder_folder(_named(source, role), role, [self.config, *self.weights, *self.tokenizer])
        described = read_json(folder / self.config)
        weights = _weights_in(folder, role, self.weights)
        way = preprocessing.of_open_clip(described, folder / self.config)
        try:
            width = int(described["model_cfg"]["embed_dim"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / self.config}: describes no open_clip model (embed_dim is missing)") from error
        hashed = {name: folder / name for name in (self.config, *self.tokenizer) if (folder / name).is_file()}
        return Found(folder, f"CLIP of {width} dimensions", {"weights": weights, **hashed}, way)


@dataclass(frozen=True)
class TimmFolder:
    """Any timm model: a folder or hub repository with config.json and model.safetensors."""

    config, weights = "config.json", "model.safetensors"

    def find(self, source: str | None, role: str) -> Found:
        folder = _encoder_folder(_named(source, role), role, [self.config, self.weights])
        described = read_json(folder / self.config)
        weights = _weights_in(folder, role, [self.weights])
        architecture = described.get("architecture")
        if not isinstance(architecture, str):
            raise UserError(f"{folder / self.config}: describes no timm model (architecture is missing)")
        way = preprocessing.of_timm(described, folder / self.config)
        files = {"weights": weights, self.config: folder / self.config}
        return Found(folder, architecture, files, way)


def _named(source: str | None, role: str) -> str:
    if source is None:
        raise UserError(f"the protocol has no {role} encoder of its own; name one with --{role}")
    return source


def _weights_file(source: str | None, role: str, repository: str, name: str) -> Path:
    """One safetensors file: of the hub repository, of a folder, or the file itself.

    Raises:
        UserError: there is none; it says what to get, from where, and the flag to name it with.
    """
    if source is None:
        return _from_hub(repository, [name], f"--{role}") / name
    get = f"get {name} from https://huggingface.co/{repository} for --{role}"
    path = Path(source).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        path = path / name
    elif hub.is_hub_id(source):
        return _from_hub(source, [name], f"--{role}") / name
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {get}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: is not a safetensors file, and pickled weights are not read; {get}")
    return path


def _encoder_folder(source: str, role: str, names: list[str]) -> Path:
    """A folder that holds the first of these names; a hub name is fetched, these files only.

    Raises:
        UserError: as `_weights_file`.
    """
    path = Path(source).expanduser()
    if hub.is_hub_id(source):
        return _from_hub(source, names, f"--{role}")
    if os.path.isfile(path):
        raise UserError(f"{path}: is a file; name the folder that holds {names[0]} and the weights")
    if not os.path.isfile(path / names[0]):
        raise UserError(f"{path}: no {names[0]} there; name the folder of an encoder with --{role}")
    return path


def _weights_in(folder: Path, role: str, names: Sequence[str]) -> Path:
    """The first of these safetensors files that a folder has.

    Raises:
        UserError: it has none.
    """
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    raise UserError(f"{folder}: has no {names[0]}, the weights of the --{role} encoder; pickled ones are not read")


def _from_hub(repository: str, names: list[str], instead: str) -> Path:
    """The folder with those of the named files that a hub repository has."""
    get = f"get {names[0]} from {hub.url(repository)} and name it with {instead}"
    return hub.files(repository, names, lambda folder: _is_complete(folder, names), instead=get)


def _is_complete(folder: Path, names: list[str]) -> bool:
    weights = [name for name in names if name.endswith(".safetensors")]
    return (folder / names[0]).is_file() and any((folder / name).is_file() for name in weights)
