"""The adapter file: one safetensors file with the trained tensors, and a header from which the adapter is rebuilt.

Metadata: {"format": "pt", "singlora": JSON of `Header`}. `u`, the ramp's value at saving time, is part of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import adapters
from ..errors import UserError
from ..models.network import Networks, network_of
from ..terminal import escaped
from . import header as headers
from . import safetensors_io
from .header import ABOUT, KEY, Header

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

FILE_NAME = "adapter.safetensors"  # inside a run folder


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
        about: values for `Header`'s fields (`header.ABOUT`): step, family, base_model, base_hash, prediction_type,
            instance_prompt, identifier, class_noun, resolution, images, started_at, recipe; None stands for unknown.
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
    """Write tensors and header as they are; `save` for adapters. Returns the header with its digest."""
    kind = torch.float32 if header.config.init == "offset" else safetensors_io.precision(dtype)
    tensors = {name: tensor.detach().to("cpu", kind).contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{path}: not written: {name} is not finite as {kind}: the training diverged, or use float32"
            )
    header = headers.signed(header, tensors)

    def check(part: Path) -> None:
        if read(part)[0] != header:
            raise UserError(f"{path}: not written: what was read back is not what was saved")
        if live is not None:
            verify(part, live)

    metadata = {"format": "pt", KEY: headers.written(header)}
    safetensors_io.write(path, tensors, metadata, check=check, overwrite=overwrite)
    return header


def publish(path: str | Path, target: Path) -> None:
    """A run's adapter once more, with a header for others to see: `header.to_publish`.

    Raises:
        UserError: damaged, or it cannot be written.
    """
    header, state = read(path)
    write(target, state, headers.to_publish(header))


def verify(path: str | Path, adapter: Adapter) -> None:
    """Compare a file with the adapter it was saved from: every tensor, exactly, at the stored precision.

    Raises:
        UserError: the first difference.
    """
    path = find(path)
    header, stored = read(path)
    live = adapter.state_dict()
    if set(stored) != set(live):
        raise UserError(f"{path}: holds other tensors than the adapter: {escaped(min(set(stored) ^ set(live)))}")
    for name, tensor in stored.items():
        if not torch.equal(tensor, live[name].detach().cpu().to(tensor.dtype)):
            raise UserError(f"{path}: {name} differs from the adapter it was saved from")
    if header.config != adapter.config or header.u != adapter.u:
        raise UserError(f"{path}: its configuration differs from that of the adapter it was saved from")


def read_header(path: str | Path) -> Header:
    """The header of an adapter file or run folder, checked; the tensors are not read, so its digest is not either.

    Raises:
        UserError: not one of our files, or damaged.
    """
    return headers.parse(safetensors_io.read_index(find(path)))


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors (CPU, as stored) of an adapter file, checked against each other.

    Raises:
        UserError: not one of our files, damaged, or edited.
    """
    index = safetensors_io.read_index(find(path))
    header = headers.parse(index)
    state = safetensors_io.read_tensors(index)
    if headers.digest(headers.raw(index), state) != header.sha256:
        raise UserError(f"{index.path}: its digest is not that of its tensors and header: damaged or edited")
    return header, state


def load(path: str | Path, networks: Networks) -> Adapter:
    """Attach the adapter of a file to its networks, as it was when saved, u included.

    Args:
        networks: by name, as a family has them; those the adapter has no targets in stay as they are.

    Raises:
        UserError: unreadable, damaged or made for another model; the networks are untouched then.
    """
    path = find(path)
    header, state = read(path)
    return attach(path, networks, header, state)


def attach(path: Path, networks: Networks, header: Header, state: Mapping[str, Tensor]) -> Adapter:
    """`load` for tensors that are already read."""
    missing = {network_of(name) for name in header.layers} - set(networks)
    if missing:
        family = f" ({escaped(header.family)})" if header.family else ""
        raise UserError(
            f"{path}: adapts {escaped(', '.join(sorted(missing)))}, which this model does not have: it was made for "
            f"{escaped(header.base_model or 'another model')}{family}, and this model has {', '.join(networks)}"
        )
    made_for = f" (it was made for {escaped(header.base_model)})" if header.base_model else ""
    adapter: Adapter | None = None
    try:
        adapter = adapters.attach(dict(networks), header.config)
        shapes = {name: (base.out_features, base.in_features) for name, base in adapter.layers().items()}
        for name in sorted(set(shapes) | set(header.layers)):
            here, there = shapes.get(name), header.layers.get(name)
            if here != there:
                raise UserError(
                    f"{escaped(name)} is {there or 'absent'} in the file and {here or 'absent'} in this model"
                )
        adapter.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        adapter.set_ramp(header.u)  # as saved, whatever the clock would say
    except Exception as error:  # whatever a wrong header provokes: nothing stays attached, and it is one line
        if adapter is not None:
            adapter.detach()
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {escaped(error)}"
        raise UserError(f"{path}: cannot be loaded{made_for}: {escaped(reason, 400)}") from error
    return adapter


def _plain(value: Any) -> Any:
    """What JSON can hold of a value: a recipe may carry paths, tuples and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
