"""Adapters for other programs, as ordinary LoRA files.

A LoRA file holds dW = up @ down per layer. A SingLoRA is such a pair exactly (rank r; 2 r with `init="offset"`), stored
in about twice the numbers. The diffusers and PEFT forms keep a magnitude (DoRA); from kohya's form diffusers drops it.
OFT and LoKr have no pair. An export that would lose something is refused, and the message names another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.methods import METHODS
from ..errors import UserError
from ..models.network import Networks, NetworkSpec, network_of
from . import diffusers_loader, forms, keys, lora_pairs, metadata, native, safetensors_io, verify_export
from .header import Header
from .lora_pairs import Pair
from .verify_export import Difference

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

Tensors = dict[str, Tensor]


def export(
    source: Adapter | str | Path,
    form: str | None,
    path: str | Path,
    *,
    networks: Networks | None = None,
    dtype: str | torch.dtype = torch.float32,
    about: Header | None = None,
    whole: bool = True,
    overwrite: bool = False,
) -> Difference:
    """Write an adapter in a form that other programs load, and verify it by loading it through diffusers.

    Args:
        source: a live adapter, or an adapter file or run folder; that needs `networks` to be tried on, which are left
            as they were.
        form: kohya, diffusers or peft; None: the default of the base model (`forms`).
        about: where the metadata comes from; of a file, its own header unless another is given.
        whole: compare the networks' outputs too; False for networks without their weights (`hollow`).

    Returns:
        How far the file, loaded by diffusers into copies of the networks, is from the adapter.

    Raises:
        UserError: the form would lose something; the path exists; the loaded file differs by more than the stored
            precision and rounding explain. Nothing is written then.
    """
    if isinstance(source, str | Path):
        if networks is None:
            raise TypeError("an adapter file is exported with the networks it belongs to")
        form = forms.chosen(form, networks)
        adapter = native.load(source, networks)
        try:
            header = about or native.read_header(source)
            return export(adapter, form, path, dtype=dtype, about=header, whole=whole, overwrite=overwrite)
        finally:
            adapter.detach()
    form = forms.chosen(form, source.networks)
    kind = safetensors_io.precision(dtype)
    header = replace(about or Header(config=source.config), config=source.config)
    pairs = dict(lora_pairs.of_adapter(source))
    if form == "kohya" and has_magnitude(pairs):
        raise UserError(
            "kohya files cannot carry the learned magnitude safely (diffusers drops it): use --format peft for "
            "diffusers, or --merge_into DIR for a full model that every program loads"
        )
    if kind != torch.float32:
        pairs = {name: pair.balanced() for name, pair in pairs.items()}
    tensors = {name: _stored(name, tensor, kind) for name, tensor in FORMS[form](pairs, header, source).items()}
    facts = metadata.of(Path(path), header, source, pairs, form)
    if form != "kohya":
        facts |= _ranks(pairs, header)
    verified: list[Difference] = []
    safetensors_io.write(
        path,
        tensors,
        {"format": "pt", **facts, **metadata.hashes(tensors, facts)},
        check=lambda part: verified.append(verify_export.verify(part, source, kind, whole)),
        overwrite=overwrite,
    )
    return verified[0]


def has_magnitude(pairs: Mapping[str, Pair]) -> bool:
    return any(pair.magnitude is not None for pair in pairs.values())


def _stored(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    # alpha is a number to be read exactly, not a weight to be rounded
    stored = tensor.detach().to("cpu", torch.float32 if name.endswith(".alpha") else kind).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise UserError(f"{name} is too large for {kind}, or not finite: use --dtype float32, or look at the training")
    return stored


# --- the three forms: pairs -> tensors


def _kohya(pairs: Mapping[str, Pair], header: Header, adapter: Adapter) -> Tensors:
    """Layers that are one layer in this form become one pair, block by block; alpha / rank stays what it is."""
    tensors: Tensors = {}
    for network, names in keys.by_network(pairs).items():
        spec = adapter.networks[network]
        rank, alpha, _ = header.config.for_role(spec.role)
        scale = alpha / rank * adapter.u or 1.0
        places = keys.kohya(spec)
        fused: dict[str, list[str]] = {}
        for name in names:
            fused.setdefault(places[name].layer, []).append(name)
        for layer, parts in fused.items():
            pair, outputs = pairs[parts[0]], places[parts[0]].outputs
            if outputs:
                pair = lora_pairs.fused([(places[name].rows, pairs[name]) for name in parts], outputs)
            tensors |= _kohya_layer(layer, pair.up / scale, pair.down, scale * pair.rank)
        first = pairs[names[0]]
        for name, linear in _companions(spec, set(names)).items():
            up, down = torch.zeros(linear.out_features, first.rank), torch.zeros(first.rank, linear.in_features)
            tensors |= _kohya_layer(places[name].layer, up, down, scale * first.rank)
    return tensors


def _kohya_layer(key: str, up: Tensor, down: Tensor, alpha: float) -> Tensors:
    return {f"{key}{keys.KOHYA.up}": up, f"{key}{keys.KOHYA.down}": down, f"{key}.alpha": torch.tensor(alpha)}


def _companions(spec: NetworkSpec, names: set[str]) -> dict[str, nn.Linear]:
    """Layers of a text encoder that are not adapted and get pairs of zeros, by name.

    A1111 applies nothing to an attention of Stable Diffusion 2 whose four projections are not all there, and diffusers
    refuses a file of this form without an out_proj.
    """
    if spec.role != "text":
        return {}
    others: dict[str, dict[str, nn.Linear]] = {}  # by the attention they are in
    for path, layer in spec.module.named_modules():
        name = spec.layer(path)
        head, _, last = name.rpartition(".")
        if last in spec.targets and name not in names and isinstance(layer, nn.Linear):
            others.setdefault(head, {})[name] = layer
    heads = {head for head, _, last in (name.rpartition(".") for name in names) if last in spec.targets}
    return {name: layer for head in heads or list(others)[:1] for name, layer in others.get(head, {}).items()}


def _peft(pairs: Mapping[str, Pair], header: Header, adapter: Adapter) -> Tensors:
    return _dotted(pairs, adapter, dict.fromkeys(keys.DIFFUSERS, keys.PEFT))


def _diffusers(pairs: Mapping[str, Pair], header: Header, adapter: Adapter) -> Tensors:
    return _dotted(pairs, adapter, keys.DIFFUSERS)


def _dotted(pairs: Mapping[str, Pair], adapter: Adapter, endings: Mapping[str, keys.Endings]) -> Tensors:
    tensors: Tensors = {}
    for name, pair in pairs.items():
        role = adapter.networks[network_of(name)].role
        tensors |= {f"{name}{endings[role].up}": pair.up, f"{name}{endings[role].down}": pair.down}
        if pair.magnitude is not None:
            tensors[f"{name}{keys.MAGNITUDE[role]}"] = pair.magnitude
    return tensors


FORMS: dict[str, Callable[[Mapping[str, Pair], Header, Any], Tensors]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "peft": _peft,
}


def _ranks(pairs: Mapping[str, Pair], header: Header) -> dict[str, str]:
    """What diffusers must be told where the ranks of networks differ."""
    ranks = {network: pairs[names[0]].rank for network, names in keys.by_network(pairs).items()}
    if len(set(ranks.values())) < 2:
        return {}
    lora: dict[str, Any] = {}
    for network, rank in ranks.items():
        lora |= {f"{network}.r": rank, f"{network}.lora_alpha": rank}
        lora[f"{network}.target_modules"] = list(header.for_network(network)[2])
        lora[f"{network}.use_dora"] = has_magnitude(pairs)
    return {lora_pairs.METADATA: json.dumps(lora, sort_keys=True)}


# --- what other programs make of a file


def remarks(form: str, header: Header, networks: Mapping[str, NetworkSpec]) -> list[str]:
    """What is worth knowing of an adapter in a form: which programs leave out what."""
    names = list(header.layers)
    row = forms.of(networks)[form]
    found = []
    if form != "kohya" and METHODS[header.config.method].has_magnitude(header.config):
        found.append(
            "its magnitudes load in diffusers only; ComfyUI, Forge and A1111 leave out them or their layers: "
            "--merge_into DIR is for these"
        )
    elif row.warning:
        text = sum(header.role(network_of(name)) == "text" for name in names)
        found.append(row.warning.format(text=text, all=len(names)))
    denoiser = [name for name in names if networks[network_of(name)].role == "denoiser"]
    for program, needed in row.needs.items():
        lacking = [end.rpartition(".")[2] for end in needed if not any(name.endswith(end) for name in denoiser)]
        if denoiser and lacking:
            found.append(
                f"{program} does not recognise a file without {' and '.join(end.strip('.') for end in needed)}: "
                f"here is no {' and no '.join(lacking)}"
            )
    ignored = {network_of(name) for name in names} - diffusers_loader.loadable(networks)
    if ignored:
        found.append(f"diffusers loads no LoRA into {', '.join(sorted(ignored))}: it leaves these layers out")
    return found
