"""What images are made with: adapter files, and the base model that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import read_json, reason, sha256
from ..terminal import escaped, note
from .settings import AdapterSettings, ModelSettings, scales

if TYPE_CHECKING:
    from ..formats import Header
    from ..formats.importing import Attached
    from ..models import Family


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that the user named: of this program, or a LoRA of another."""

    named: Path
    """As the user named it: a run folder or a file."""
    path: Path
    """The file."""
    header: Header | None
    """What a file of this program says of itself."""
    sha256: str
    """Of the whole file."""


def read_adapter(named: Path) -> AdapterSource:
    """Recognise an adapter and read its header.

    Raises:
        UserError: no such file, or nothing that is read as an adapter.
    """
    from .. import formats
    from ..formats import file_kinds

    try:
        found = formats.recognise(named)
    except (OSError, ValueError) as error:  # such as a name that is too long
        why = reason(error) if isinstance(error, OSError) else error
        raise UserError(f"--adapter {escaped(named, 1000)}: cannot be read: {why}") from error
    if found.kind == file_kinds.UNKNOWN:
        raise file_kinds.refuse(found)
    header = formats.read_header(named) if found.kind == file_kinds.NATIVE else None
    return AdapterSource(named, found.index.path, header, sha256(found.index.path))


def base_model(named: str | None, adapters: Sequence[AdapterSource]) -> str:
    """The base model to load: the one that the user names, else the one that the first adapter was trained on.

    Raises:
        UserError: neither says.
    """
    if named is not None:
        return named
    header = adapters[0].header
    if header is None or not header.base_model:
        raise UserError(
            f"{_shown(adapters[0])} does not say what model it is for: name it with --pretrained_model_name_or_path"
        )
    return header.base_model


def autoencoder(wanted: ModelSettings, adapters: Sequence[AdapterSource]) -> str | None:
    """The autoencoder in place of the base model's own: the one that the user names, else the one that the first
    adapter was trained with, where its base model is used."""
    header = adapters[0].header if adapters else None
    named = wanted.pretrained_model_name_or_path
    if wanted.pretrained_vae_model_name_or_path is not None or header is None:
        return wanted.pretrained_vae_model_name_or_path
    return header.vae if named in (None, header.base_model) else None


def check_base(adapters: Sequence[AdapterSource], family: Family, *, asked_for: bool) -> None:
    """Refuse adapters of another model than the loaded one.

    Args:
        asked_for: the user named the model. Other weights of the same family are then no error, but noted.

    Raises:
        UserError: it is another family, or has other weights that nobody asked for.
    """
    for one in adapters:
        header = one.header
        if header is None:
            continue
        if header.family and header.family != family.name:
            other = f"{escaped(family.source)} is of {family.name}"
            raise UserError(f"{_shown(one)} is for the family {escaped(header.family)}, {other}")
        if not header.base_hash or header.base_hash == family.fingerprint:
            continue
        known = f"{escaped(header.base_model)} (weights {escaped(header.base_hash[:12])})"
        found = f"{escaped(family.source)} (weights {family.fingerprint[:12]})"
        if asked_for:
            note(f"{_shown(one)} was trained on {known}; it is used on {found}, as asked for")
        elif header.base_model == family.source:
            raise UserError(
                f"{_shown(one)} needs {known}, but {found} is another model by now: bring that one back, or say which "
                f"to use with --pretrained_model_name_or_path"
            )
        else:
            raise UserError(
                f"{_shown(one)} was trained on {known}, {_shown(adapters[0])} on {found}: say which to use with "
                f"--pretrained_model_name_or_path"
            )


def references(adapter: AdapterSource) -> str | None:
    """The folder of images that it was trained on, as the recipe beside it says, or else its header; None: neither."""
    recipe = adapter.header.recipe if adapter.header else {}
    with suppress(UserError):
        recipe = read_json(adapter.path.with_name("recipe.json"))
    found = recipe.get("instance_data_dir")
    return found if isinstance(found, str) else None


def attach(adapters: Sequence[AdapterSource], family: Family, wanted: AdapterSettings) -> Attached:
    """Put the adapters into the family's networks."""
    from .. import formats

    attached = formats.attach_files([one.path for one in adapters], family.networks, scales(wanted))
    if wanted.merge:
        attached.merge()
    return attached


def _shown(adapter: AdapterSource) -> str:
    return escaped(adapter.named, 1000)
