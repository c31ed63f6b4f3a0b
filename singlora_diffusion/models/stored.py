"""Where the parts of a base model are: a diffusers folder, or a description of a single file and the file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from . import hub, single_file


class Stored(NamedTuple):
    """A base model on this machine."""

    source: str
    """What the user named: a packaged model, a folder, a file, a hub id."""
    path: Path
    """Folder of model_index.json, configs, tokenizers and scheduler."""
    file: Path | None
    """The file with all weights; None: they are in `path`, part by part."""
    vae_source: str | None = None
    """What the user named as another autoencoder; None: the model's own."""
    vae: Path | None = None
    """The folder or file of that."""

    @property
    def shown(self) -> Path:
        """What messages name."""
        return self.file or self.path


def find(name_or_path: str, vae: str | None = None) -> Stored:
    """A base model with all its weights; a hub id is downloaded once, into the hub's own cache.

    Args:
        vae: another autoencoder: a folder of its own or of a whole model, a hub id, or a .safetensors file.

    Raises:
        UserError: no such folder or file, not a model, or a hub id that cannot be downloaded.
    """
    file = hub.file(name_or_path)
    path = hub.folder(name_or_path) if file is None else single_file.described(file)
    return Stored(name_or_path, path, file, vae, None if vae is None else _autoencoder(vae))


def _autoencoder(name_or_path: str) -> Path:
    try:
        file = hub.file(name_or_path)
        if file is not None:
            single_file.read(file)
        return file or hub.autoencoder(name_or_path)
    except UserError as error:
        raise UserError(f"--pretrained_vae_model_name_or_path: {error}") from error


def described(name_or_path: str) -> Path:
    """The folder of a base model's configs; of a hub id they alone are downloaded.

    Raises:
        UserError: as `find`.
    """
    file = hub.file(name_or_path)
    return hub.configs(name_or_path) if file is None else single_file.described(file)
