"""Adapters for other programs: ordinary LoRA files, and whole pipelines for what has no such form.

A LoRA file holds dW = up @ down per layer, so SingLoRA leaves without loss (rank r; 2 r with `init="offset"`) at the
price of storing both factors. A magnitude (DoRA) is kept by the diffusers and PEFT forms; from the kohya form diffusers
drops it. OFT and LoKr have no pair at all. What would lose something without a word is refused, with the way out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks
from . import container, names, native, pairs, proof
from .native import Header
from .pairs import Pair
from .proof import Proof

if TYPE_CHECKING:
    from ..adapters.registry import Adapter


def export(
    source: Adapter | str | Path,
    form: str,
    path: str | Path,
    *,
    networks: Networks | None = None,
    dtype: str | torch.dtype = torch.float32,
    about: Header | None = None,
    overwrite: bool = False,
) -> Proof:
    """Write an adapter in a form that other programs load, and prove it by loading it through diffusers.

    Args:
        source: a live adapter, or an adapter file or run folder; that needs `networks` to be tried on, which are left
            as they were.
        form: kohya, diffusers or peft.
        about: for a live adapter: where the trigger words and the resolution in the metadata come from.

    Returns:
        How far the file, loaded by diffusers into copies of the networks, is from the adapter.

    Raises:
        UserError: the form would lose something; the path exists; the loaded file differs by more than the stored
            precision explains (float32: 1e-5). Nothing is written then.
    """
    if isinstance(source, str | Path):
        if networks is None:
            raise TypeError("an adapter file is exported with the networks it belongs to")
        adapter = native.load(source, networks)
        try:
            header = native.read_header(source)
            return export(adapter, form, path, dtype=dtype, about=header, overwrite=overwrite)
        finally:
            adapter.detach()
    if form not in FORMS:
        raise UserError(f"unknown format {form!r}: choose {', '.join(FORMS)}")
    kind = container.precision(dtype)
    header = about or Header(config=source.config)
    found = dict(pairs.of_adapter(source))
    if form == "kohya" and not _additive(found):
        raise UserError(
            "kohya files cannot carry the learned magnitude safely (diffusers drops it): use --format peft for "
            "diffusers, or --merge_into DIR for a full model that every program loads"
        )
    tensors, facts = FORMS[form](found, replace(header, config=source.config), source)
    stored = {name: _stored(name, tensor, kind) for name, tensor in tensors.items()}
    metadata = {"format": "pt", **facts}
    if form == "kohya":
        metadata |= _hashes(stored)
    proofs: list[Proof] = []
    container.write(
        path,
        stored,
        metadata,
        check=lambda part: proofs.append(proof.prove(part, source, kind, additive=_additive(found))),
        overwrite=overwrite,
    )
    return proofs[0]


def _additive(found: Mapping[str, Pair]) -> bool:
    return all(pair.magnitude is None for pair in found.values())


def _stored(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    # alpha is a number to be read exactly, not a weight to be rounded
    stored = tensor.detach().to("cpu", torch.float32 if name.endswith(".alpha") else kind).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise UserError(f"{name} is too large for {kind}, or not finite: use --dtype float32, or look at the training")
    return stored


# --- the three forms: pairs -> tensors and metadata


def _kohya(found: Mapping[str, Pair], header: Header, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, pair in found.items():
        network = name.partition(".")[0]
        rank, alpha, _ = header.for_network(network)
        scale = alpha / rank * adapter.u
        k = pair.rank
        alphas[network] = scale * k if scale else float(k)
        _put_kohya(tensors, name, pair.up / scale if scale else pair.up, pair.down, alphas[network])
    text = [name for name in found if name.startswith("text_encoder.")]
    if text and not any(name.endswith(".out_proj") for name in text):
        # diffusers tells this form of text encoder by its out_proj and refuses a file without one: give it a zero pair.
        name, pair = text[0], found[text[0]]
        k, width = pair.down.shape
        zeros = torch.zeros(k, width)
        _put_kohya(tensors, f"{name.rpartition('.')[0]}.out_proj", zeros.T, zeros, alphas["text_encoder"])
    return tensors, _kohya_facts(found, header, alphas, adapter)


def _put_kohya(tensors: dict[str, Tensor], name: str, up: Tensor, down: Tensor, alpha: float) -> None:
    key = names.kohya(name)
    tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(alpha)}


def _peft(found: Mapping[str, Pair], header: Header, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    endings = {"unet": (".lora_B.weight", ".lora_A.weight"), "text_encoder": (".lora_B.weight", ".lora_A.weight")}
    return _dotted(found, header, endings)


def _diffusers(found: Mapping[str, Pair], header: Header, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    text = (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
    return _dotted(found, header, {"unet": (".lora.up.weight", ".lora.down.weight"), "text_encoder": text})


def _dotted(
    found: Mapping[str, Pair], header: Header, endings: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, pair in found.items():
        network = name.partition(".")[0]
        up, down = endings[network]
        tensors |= {f"{name}{up}": pair.up, f"{name}{down}": pair.down}
        ranks[network] = pair.rank
        if pair.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector{pairs.magnitude_ending(network)}"] = pair.magnitude
    facts: dict[str, str] = {}
    if len(set(ranks.values())) > 1:
        lora: dict[str, Any] = {}
        for network, rank in ranks.items():
            lora |= {f"{network}.r": rank, f"{network}.lora_alpha": rank}
            lora[f"{network}.target_modules"] = list(header.for_network(network)[2])
            lora[f"{network}.use_dora"] = not _additive(found)
        facts["lora_adapter_metadata"] = json.dumps(lora, sort_keys=True)
    if header.trigger():
        facts["modelspec.trigger_phrase"] = header.trigger()
    return tensors, facts


FORMS: dict[str, Callable[[Mapping[str, Pair], Header, Any], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "peft": _peft,
}

BASES = {  # by the width of the text the UNet attends to: ss_v2, ss_base_model_version, modelspec.architecture
    768: ("False", "sd_v1", "stable-diffusion-v1/lora"),
    1024: ("True", "sd_v2", "stable-diffusion-v2-512/lora"),
}


def _kohya_facts(
    found: Mapping[str, Pair], header: Header, alphas: Mapping[str, float], adapter: Adapter
) -> dict[str, str]:
    """What A1111 and kohya's tools show, and what modelspec 1.0.1 requires."""

    def common(values: set[str]) -> str:
        return values.pop() if len(values) == 1 else "Dynamic"

    denoisers = [network.module for network in adapter.networks.values() if network.role == "denoiser"]
    width: Any = getattr(getattr(denoisers[0], "config", None), "cross_attention_dim", None) if denoisers else None
    v2, version, architecture = BASES.get(width, ("False", "", "stable-diffusion-v1/lora"))
    side = header.resolution or 512
    trigger = header.trigger()
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": trigger or "SingLoRA",
        "modelspec.resolution": f"{side}x{side}",
        "ss_v2": v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": common({str(pair.rank) for pair in found.values()}),
        "ss_network_alpha": common({str(alpha) for alpha in alphas.values()}),
        "ss_network_args": json.dumps({"trained_as": header.config.method}),
        "ss_resolution": f"({side}, {side})",
        "ss_steps": str(header.step),
    }
    if version:
        facts["ss_base_model_version"] = version
    if header.base_model:
        facts["ss_sd_model_name"] = Path(header.base_model).name or header.base_model
    if trigger:
        facts["modelspec.trigger_phrase"] = trigger
        facts["ss_output_name"] = trigger.replace(" ", "_")
        facts["ss_tag_frequency"] = json.dumps({"subject": {trigger: 1}})
    return facts


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 over the file past its header, which A1111 knows a LoRA by, whatever the metadata."""
    data = hashlib.sha256()
    for name in container.order(tensors):
        data.update(container.tensor_bytes(tensors[name]))
    return {"sshs_model_hash": data.hexdigest(), "modelspec.hash_sha256": f"0x{data.hexdigest()}"}


# --- a full model


def merge_into(family: Any, adapter: Adapter, folder: str | Path) -> Path:
    """Write the whole pipeline with the adapter merged into its weights: a diffusers folder that needs nothing of ours.

    Args:
        family: the base model the adapter is attached to (`families`); it is left as it was.
        folder: new, or empty.

    Raises:
        UserError: the folder holds something, or what was written does not read back the same.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not empty; name a new folder")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    adapter.merge()
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with proof.quiet():
            family.pipeline().save_pretrained(part, safe_serialization=True)
            for name, network in adapter.networks.items():
                _same_weights(part / name, network.module)
        part.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    finally:
        adapter.unmerge()
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _same_weights(folder: Path, network: nn.Module) -> None:
    here = network.state_dict()
    dtype = next(network.parameters()).dtype
    there = type(network).from_pretrained(folder, torch_dtype=dtype).state_dict()  # type: ignore[attr-defined]
    for name, tensor in here.items():
        if name not in there or not torch.equal(tensor.cpu(), there[name]):
            raise UserError(f"{folder.name}: not written: {name} reads back differently")
