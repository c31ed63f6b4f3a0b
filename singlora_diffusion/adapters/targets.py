"""Which layers an adapter changes: names on the command line -> linear layers of the networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ..models.network import NetworkSpec
    from .config import AdapterConfig

LAST_NAME = re.compile(r"[^.]+(\.\d+)?$")  # `to_q`, but `to_out.0`: a bare number would say nothing


def resolved(config: AdapterConfig, networks: Mapping[str, NetworkSpec]) -> AdapterConfig:
    """The configuration with each role's targets spelled out: defaults and presets by what the networks say."""
    return replace(
        config,
        targets=_of_role("denoiser", config.targets, networks.values()),
        text_targets=_of_role("text", config.text_targets, networks.values()),
    )


def _of_role(role: str, names: Sequence[str] | None, networks: Iterable[NetworkSpec]) -> tuple[str, ...]:
    """
    Raises:
        UserError: a target is named twice.
    """
    those = [network for network in networks if network.role == role]
    if names is None:
        return _union(network.targets for network in those)
    found: list[str] = []
    for name in names:
        found += _union(network.presets.get(name, ()) for network in those) or (name,)
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"target {name!r} is named twice, by itself or in a preset: name it once")
    return tuple(found)


def _union(lists: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in lists for name in names))


def chosen(networks: Mapping[str, NetworkSpec], config: AdapterConfig) -> dict[str, dict[str, nn.Linear]]:
    """The layers that a resolved configuration adapts: by network, then by path inside it, in module order.

    Of several text encoders, those that have none of the targets stay as they are.

    Raises:
        UserError: a target that no network of its role has, nothing at all, or an adapter attached already.
    """
    found: dict[str, dict[str, nn.Linear]] = {}
    for role in ("denoiser", "text"):
        names = config.for_role(role)[2]
        linears = {one.name: linear_layers(one.module) for one in networks.values() if one.role == role and names}
        for name in names:
            if not any(ends(path, name) for layers in linears.values() for path in layers):
                raise UserError(_unknown(name, role, networks, linears))
        for network, layers in linears.items():
            here = {path: layer for path, layer in layers.items() if any(ends(path, name) for name in names)}
            if here:
                found[network] = here
    if not found:
        raise UserError("nothing to adapt: no targets are named for any of the networks")
    return {name: found[name] for name in networks if name in found}


def _unknown(name: str, role: str, networks: Mapping[str, NetworkSpec], linears: Mapping[str, Iterable[str]]) -> str:
    if not linears:
        return f"no layer {name!r}: this model has no network that is a {role}"
    kinds = " and ".join(dict.fromkeys(type(networks[network].module).__name__ for network in linears))
    for network in linears:
        if whole := networks[network].fused.get(name):
            return f"no layer {name!r} in {kinds}: queries, keys and values are one layer there; adapt {whole}"
    known = {LAST_NAME.search(path)[0] for paths in linears.values() for path in paths}  # type: ignore[index]
    presets = {preset for network in linears for preset in networks[network].presets}
    return f"no layer {name!r} in {kinds}; it has {', '.join([*sorted(presets), *sorted(known)])}"


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by path, in module order; GPT-2's through a view.

    Raises:
        UserError: an adapter is attached already.
    """
    from ..models.linear_view import as_linear
    from .inject import is_adapted

    layers: dict[str, nn.Linear] = {}
    for path, module in network.named_modules():
        if is_adapted(path, module):
            raise UserError(f"{type(network).__name__} has an adapter attached already at {path}: detach it first")
        if (layer := as_linear(module)) is not None:
            layers[path] = layer
    return layers


def ends(path: str, target: str) -> bool:
    """Whether a layer's path ends in a target, in whole names."""
    return f".{path}".endswith(f".{target}")
