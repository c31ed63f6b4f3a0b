"""The adapter file: one safetensors file with the trained tensors under outside names, and a header that rebuilds them.

Metadata: {"format": "pt", "singlora": JSON of `Header`}. `u`, the ramp's value at saving time, is part of the adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import adapters
from ..adapters.config import AdapterConfig, from_json
from ..errors import UserError
from ..models.network import Networks
from . import container
from .container import Index, shown

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

KEY = "singlora"
VERSION = 1
FILE_NAME = "adapter.safetensors"  # inside a run folder


@dataclass(frozen=True)
class Header:
    """What an adapter file says about itself."""

    config: AdapterConfig
    u: float = 1.0
    """The ramp's value when it was saved."""
    step: int = 0
    """Optimizer steps it was trained for."""
    family: str = ""
    base_model: str = ""
    """The base model as the user named it."""
    base_hash: str = ""
    """The family's fingerprint of the base model."""
    instance_prompt: str = ""
    identifier: str = ""
    """The rare token, `sks`."""
    class_noun: str = ""
    resolution: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's settings."""
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(out, in) of each adapted weight, so that the file can be read without its base model."""
    sha256: str = ""
    """`container.digest` of the tensors."""
    version: int = VERSION
    """Of this layout."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """What each network does, denoiser or text; without an entry the network's name says it."""

    def for_network(self, name: str) -> tuple[int, float, tuple[str, ...]]:
        """Rank, alpha and targets in one network."""
        return self.config.for_role(self.role(name))

    def role(self, name: str) -> str:
        """What a network does: denoiser or text."""
        return self.roles.get(name) or ("text" if name.startswith("text_encoder") else "denoiser")

    def trigger(self) -> str:
        """The words that call the subject, `sks dog`; empty if unknown."""
        return " ".join(word for word in (self.identifier, self.class_noun) if word)


ABOUT = frozenset(f.name for f in fields(Header)) - {"config", "u", "layers", "roles", "sha256", "version"}


def find(path: str | Path) -> Path:
    """The adapter file that `path`, a file or a run folder, means."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise UserError(f"{path}: this folder holds no {FILE_NAME}; name the adapter file itself")
        return path / FILE_NAME
    return path


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = torch.float32,
    overwrite: bool = True,
) -> Header:
    """Write an adapter's file atomically; it is read back and compared before it takes its name.

    Args:
        about: values for `Header`'s fields step, family, base_model, base_hash, instance_prompt, identifier,
            class_noun, resolution, recipe; None stands for unknown.
        dtype: of the stored numbers. With `init="offset"` they stay float32: the update is a difference of two nearly
            equal products, which rounding would swamp.

    Raises:
        UserError: a number is not finite at `dtype`, or the file cannot be written or does not read back the same.
    """
    unknown = set(about or {}) - ABOUT
    if unknown:
        raise TypeError(f"about: unknown {sorted(unknown)}, known {sorted(ABOUT)}")
    layers = {name: (base.out_features, base.in_features) for name, base in adapter.layers().items()}
    known = {key: _plain(value) for key, value in (about or {}).items() if value is not None}
    roles = {name: network.role for name, network in adapter.networks.items()}
    header = Header(config=adapter.config, u=adapter.u, layers=layers, roles=roles, **known)
    return write(path, adapter.state_dict(), header, dtype=dtype, overwrite=overwrite, live=adapter)


def write(
    path: str | Path,
    state: Mapping[str, Tensor],
    header: Header,
    *,
    dtype: str | torch.dtype = torch.float32,
    overwrite: bool = True,
    live: Adapter | None = None,
) -> Header:
    """Write tensors and header as they are; `save` for adapters. Returns the header with its `sha256`."""
    kind = torch.float32 if header.config.init == "offset" else container.precision(dtype)
    tensors = {name: tensor.detach().to("cpu", kind).contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{path}: not written: {name} is not finite as {kind}: the training diverged, or use float32"
            )
    header = replace(header, sha256=container.digest(tensors))
    metadata = {"format": "pt", KEY: json.dumps(asdict(header), sort_keys=True)}

    def check(part: Path) -> None:
        found, loaded = read(part)
        if found != header or container.digest(loaded) != header.sha256:
            raise UserError(f"{path}: not written: what was read back is not what was saved")
        if live is not None:
            verify(part, live)

    container.write(path, tensors, metadata, check=check, overwrite=overwrite)
    return header


def verify(path: str | Path, adapter: Adapter) -> None:
    """Compare a file with the adapter it was saved from: every tensor, exactly, at the stored precision.

    Raises:
        UserError: the first difference.
    """
    path = find(path)
    header, stored = read(path)
    live = adapter.state_dict()
    if set(stored) != set(live):
        raise UserError(f"{path}: holds other tensors than the adapter: {shown(min(set(stored) ^ set(live)))}")
    for name, tensor in stored.items():
        if not torch.equal(tensor, live[name].detach().cpu().to(tensor.dtype)):
            raise UserError(f"{path}: {name} differs from the adapter it was saved from")
    if header.config != adapter.config or header.u != adapter.u:
        raise UserError(f"{path}: its configuration differs from that of the adapter it was saved from")


def read_header(path: str | Path) -> Header:
    """The header of an adapter file or run folder, checked; the tensors are not read.

    Raises:
        UserError: not one of our files, or damaged.
    """
    return parse(container.read_index(find(path)))


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors (CPU, as stored) of an adapter file, checked against each other."""
    index = container.read_index(find(path))
    header = parse(index)
    state = container.read_tensors(index)
    if container.digest(state) != header.sha256:
        raise UserError(f"{index.path}: its tensors are not those its header was written for: damaged or edited")
    return header, state


def load(path: str | Path, networks: Networks) -> Adapter:
    """Attach the adapter of a file to its networks, as it was when saved, u included.

    Args:
        networks: by name, `unet` and `text_encoder`; those the adapter has no targets in stay as they are.

    Raises:
        UserError: unreadable, damaged or made for another model; the networks are untouched then.
    """
    path = find(path)
    header, state = read(path)
    return attach(path, networks, header, state)


def attach(path: Path, networks: Networks, header: Header, state: Mapping[str, Tensor]) -> Adapter:
    """`load` for tensors that are already read."""
    missing = {name.partition(".")[0] for name in header.layers} - set(networks)
    if missing:
        raise UserError(f"{path}: adapts {shown(', '.join(sorted(missing)))}, which this model does not have")
    made_for = f" (it was made for {shown(header.base_model)})" if header.base_model else ""
    adapter: Adapter | None = None
    try:
        adapter = adapters.attach(dict(networks), header.config)
        shapes = {name: (base.out_features, base.in_features) for name, base in adapter.layers().items()}
        for name in sorted(set(shapes) | set(header.layers)):
            here, there = shapes.get(name), header.layers.get(name)
            if here != there:
                raise UserError(
                    f"{shown(name)} is {there or 'absent'} in the file and {here or 'absent'} in this model"
                )
        adapter.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        adapter.set_ramp(header.u)  # as saved, whatever the clock would say
    except Exception as error:  # whatever a wrong header provokes: nothing stays attached, and it is one line
        if adapter is not None:
            adapter.detach()
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {shown(error)}"
        raise UserError(f"{path}: cannot be loaded{made_for}: {reason}") from error
    return adapter


def parse(index: Index) -> Header:
    """The checked header of a checked file."""
    path = index.path
    if KEY not in index.metadata:
        raise UserError(f"{path}: is not an adapter of singlora-diffusion; `singlora inspect` says what it is")
    try:
        raw = container.parse_json(index.metadata[KEY])
        if not isinstance(raw, dict):
            raise ValueError("is not a table")
        if raw.get("version", VERSION) != VERSION:
            raise ValueError(f"has layout {shown(raw['version'], 20)}, this version reads {VERSION}: upgrade")
        header = _build(Header, {**raw, "config": from_json(raw.get("config"))})
        _check(header, index)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: its header {shown(error)}") from error
    return header


def _plain(value: Any) -> Any:
    """What JSON can hold of a value: a recipe may carry paths, tuples and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _build(kind: type[Any], raw: object) -> Any:
    """A frozen dataclass from JSON, every value of the declared type. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError("lacks its configuration")
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in known:
            raise ValueError(f"has the unknown entry {shown(name)}: written by a newer version?")
        values[name] = _typed(name, str(known[name].type), value)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"lacks {name}")
    return kind(**values)


def _typed(name: str, declared: str, value: Any) -> Any:
    if value is None and "None" in declared:
        return None
    kind = declared.partition("|")[0].strip()
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind == "int" and type(value) is int and abs(value) < 1 << 48:
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "tuple[str, ...]" and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if kind == "AdapterConfig" and isinstance(value, AdapterConfig):
        return value
    if name == "layers" and isinstance(value, dict):
        return {key: _shape(shape) for key, shape in value.items()}
    if name == "recipe" and isinstance(value, dict):
        return value
    if name == "roles" and isinstance(value, dict) and set(value.values()) <= {"denoiser", "text"}:
        return value
    raise ValueError(f"has the impossible value {shown(value, 40)} for {name}")


def _shape(value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(n) is int and 0 < n < 1 << 24 for n in value)
    ):
        raise ValueError(f"has the impossible layer shape {shown(value, 40)}")
    return value[0], value[1]


def _check(header: Header, index: Index) -> None:
    for role in ("denoiser", "text"):
        targets = header.config.for_role(role)[2]
        if len(targets) > 256 or not all(targets):
            raise ValueError(f"has impossible targets for the {role}")
    if not 0.0 <= header.u <= 1.0 or header.step < 0:
        raise ValueError(f"has an impossible clock: step {header.step}, u {header.u}")
    names = set(header.layers)
    for name in index.tensors:
        if name.rpartition(".")[0] not in names:
            raise ValueError(f"does not list the layer of tensor {shown(name)}")
    method = adapters.METHODS[header.config.method]
    for name, (out, in_) in header.layers.items():
        rank = header.for_network(name.partition(".")[0])[0]
        for key, shape in method.tensors(header.config, rank, out, in_).items():
            entry = index.tensors.get(f"{name}.{key}")
            if entry is None or entry.shape != shape:
                raise ValueError(f"promises {shown(name)}.{key} of shape {shape}, the file has {entry and entry.shape}")
