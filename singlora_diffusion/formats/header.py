"""The header of an adapter file: JSON of `Header` under the key `singlora` of the file's metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from torch import Tensor

from ..adapters.config import AdapterConfig, from_json
from ..adapters.methods import METHODS
from ..errors import UserError
from ..models import hub
from ..models.network import Role, network_of
from ..terminal import escaped
from . import safetensors_io
from .safetensors_io import Index

KEY = "singlora"
VERSION = 2
"""Of the layout. In 1 the digest covered the tensors alone."""
READ = (1, 2)

Whole = Annotated[int, Interval(ge=0, lt=1 << 48)]
Side = Annotated[int, Interval(ge=1, lt=1 << 24)]


@dataclass(frozen=True)
class Header:
    """What an adapter file says of its adapter."""

    config: AdapterConfig
    u: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """The ramp's value when it was saved."""
    step: Whole = 0
    """Optimizer steps it was trained for."""
    family: str = ""
    base_model: str = ""
    """The base model as the user named it."""
    base_hash: str = ""
    """The family's fingerprint of the base model."""
    prediction_type: str = ""
    """What the base model's denoiser predicts, as its scheduler says: epsilon, v_prediction."""
    instance_prompt: str = ""
    identifier: str = ""
    """The rare token, `sks`."""
    class_noun: str = ""
    resolution: Whole = 0
    images: Whole = 0
    """Instance images it was trained on; 0: unknown."""
    started_at: Annotated[float, Interval(ge=0, le=1e11)] = 0.0
    """When the training began, in seconds since 1970; 0: unknown."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's settings, without this machine's folders."""
    layers: Mapping[str, tuple[Side, Side]] = field(default_factory=dict)
    """(out, in) of each adapted weight, so that the file can be read without its base model."""
    sha256: str = ""
    """`digest` of the tensors and of the rest of the header."""
    version: Whole = VERSION

    roles: Mapping[str, Role] = field(default_factory=dict)
    """What each network does; without an entry the network's name says it."""

    def for_network(self, name: str) -> tuple[int, float, tuple[str, ...]]:
        """Rank, alpha and targets in one network."""
        return self.config.for_role(self.role(name))

    def role(self, name: str) -> Role:
        """What a network does: denoiser or text."""
        return self.roles.get(name) or ("text" if name.startswith("text_encoder") else "denoiser")

    @property
    def vae(self) -> str | None:
        """The autoencoder that it was trained with, where that is not the base model's own."""
        named = self.recipe.get("pretrained_vae_model_name_or_path")
        return named if isinstance(named, str) else None

    def trigger(self) -> str:
        """The words that call the subject, `sks dog`; empty if unknown."""
        return " ".join(word for word in (self.identifier, self.class_noun) if word)


ABOUT = frozenset(f.name for f in fields(Header)) - {"config", "u", "layers", "roles", "sha256", "version"}
"""The fields that the caller of `native.save` may set."""


NAMED = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path")
"""What a recipe says of the base model."""


def to_publish(header: Header) -> Header:
    """The header for others to see: a base model in a folder of this machine is called by the folder's name alone."""
    recipe = {key: _public(value) if key in NAMED else value for key, value in header.recipe.items()}
    return replace(header, base_model=_public(header.base_model), recipe=recipe)


def _public(name: Any) -> Any:
    return name if not isinstance(name, str) or hub.is_hub_id(name) else Path(name).name or name


def signed(header: Header, tensors: Mapping[str, Tensor]) -> Header:
    """The header with the digest that goes with these tensors, in today's layout."""
    header = replace(header, version=VERSION, sha256="")
    return replace(header, sha256=digest(json.loads(written(header)), tensors))


def written(header: Header) -> str:
    """The header as stored in a file."""
    return json.dumps(asdict(header), sort_keys=True)


def digest(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors and of all that a header says beside it, as the header's layout wants it."""
    numbers = safetensors_io.digest(tensors)
    if raw.get("version", 1) == 1:
        return numbers
    rest = json.dumps({key: value for key, value in raw.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(f"{numbers}\n{rest}".encode()).hexdigest()


def parse(index: Index) -> Header:
    """The checked header of a file of ours.

    Raises:
        UserError: not one of our files, or a header that cannot be, or one that does not go with the file's tensors.
    """
    try:
        values = raw(index)
        if values.get("version", 1) not in READ:
            raise ValueError(f"has layout {escaped(values['version'], 20)}, this version reads {READ}: upgrade")
        header = _typed(values)
        _check(header, index)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{index.path}: its header {escaped(error, 300)}") from error
    return header


def raw(index: Index) -> dict[str, Any]:
    """The header as it stands in the file. Raises ValueError or RecursionError where it is no JSON object."""
    if KEY not in index.metadata:
        raise UserError(f"{index.path}: is not an adapter of singlora-diffusion; `singlora inspect` says what it is")
    values = safetensors_io.parse_json(index.metadata[KEY])
    if not isinstance(values, dict):
        raise ValueError("is not a table")
    return values


def _typed(raw: Mapping[str, Any]) -> Header:
    from pydantic import ValidationError

    for name in raw:
        if name not in {one.name for one in fields(Header)}:
            raise ValueError(f"has the unknown entry {escaped(name, 80)}: written by a newer version?")
    config = from_json(raw.get("config"))
    try:
        header: Header = _validator().validate_json(json.dumps({"version": 1, **raw, "config": {}}), strict=True)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"has the impossible value {escaped(first['input'], 40)} for {escaped(where)}: {first['msg'].lower()}"
        ) from None
    return replace(header, config=config)


@cache
def _validator() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Header)


def _check(header: Header, index: Index) -> None:
    for role in ("denoiser", "text"):
        targets = header.config.for_role(role)[2]
        if len(targets) > 256 or not all(targets):
            raise ValueError(f"has impossible targets for the {role}")
    for name in index.tensors:
        if name.rpartition(".")[0] not in header.layers:
            raise ValueError(f"does not list the layer of tensor {escaped(name)}")
    method = METHODS[header.config.method]
    for name, (out, in_) in header.layers.items():
        rank = header.for_network(network_of(name))[0]
        for key, shape in method.tensors(header.config, rank, out, in_).items():
            entry = index.tensors.get(f"{name}.{key}")
            if entry is None or entry.shape != shape:
                found = entry and entry.shape
                raise ValueError(f"promises {escaped(name)}.{key} of shape {shape}, the file has {found}")
