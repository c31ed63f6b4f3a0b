"""Adapters as ordinary LoRA pairs per layer, from live adapters and from LoRA files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks
from . import container, names
from .container import Index, shown

if TYPE_CHECKING:
    from ..adapters.registry import Adapter


@dataclass(frozen=True)
class Pair:
    """W' - W0 = up @ down, or with a magnitude m (out,): W' = m * (W0 + up @ down) / ||W0 + up @ down|| per row."""

    up: Tensor  # (out, k) float32, scale and u inside; (out, k, 1, 1) for a convolution
    down: Tensor  # (k, in) float32; (k, in, height, width) for a convolution
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def of_adapter(adapter: Adapter) -> Iterator[tuple[str, Pair]]:
    """The layers of an adapter as (name, pair), at its present scale (those with magnitudes: as trained).

    Raises:
        UserError: the method has no such form (OFT, LoKr).
    """
    try:
        for name, (up, down, magnitude) in adapter.pairs():
            yield name, Pair(up.float(), down.float(), None if magnitude is None else magnitude.float())
    except UserError as error:
        method = adapter.config.method
        raise UserError(f"no LoRA file can hold {method}: --merge_into DIR writes a full model instead") from error


def of_file(index: Index, networks: Networks) -> dict[str, Pair]:
    """The layers of an ordinary LoRA file, kohya's, diffusers' or PEFT's, by our names; fitted to `networks`.

    Raises:
        UserError: a tensor that is not part of a LoRA or has no place in these networks, half a pair, a wrong shape.
    """
    path = index.path
    spellings, modules = names.spellings(networks), names.modules(networks)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in container.read_tensors(index).items():
        tagged = names.tag(key)
        if tagged is None or tagged.role not in ("up", "down", "alpha", "magnitude"):
            raise UserError(f"{path}: {shown(key)} is not a tensor of a LoRA")
        if tagged.layer not in spellings:
            raise UserError(f"{path}: {shown(tagged.layer)} is no layer of this model{_hint(index)}")
        if key.endswith(".dora_scale"):
            raise UserError(
                f"{path}: {shown(key)} is a magnitude in a form that diffusers drops: it cannot be used here"
            )
        parts.setdefault(spellings[tagged.layer], {})[tagged.role] = tensor.float()
    folded = _peft_scales(index)
    found: dict[str, Pair] = {}
    for name, part in parts.items():
        if not {"up", "down"} <= set(part):
            raise UserError(f"{path}: {name} has half of its pair only")
        up, down = part["up"], part["down"]
        _fits(f"{path}: {name}", up, down, part.get("magnitude"), modules[name])
        scale = folded.get(name.partition(".")[0], 1.0)
        if "alpha" in part:
            if part["alpha"].numel() != 1:
                raise UserError(f"{path}: {name} has {part['alpha'].numel()} alphas, want one")
            scale = float(part["alpha"].reshape(())) / len(down)
        found[name] = Pair(up * scale, down, part.get("magnitude"))
    if not found:
        raise UserError(f"{path}: holds no layers")
    return found


def _peft_scales(index: Index) -> dict[str, float]:
    """alpha / rank by network, where diffusers' metadata gives them."""
    text = index.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        facts = container.parse_json(text)
        networks = {key.partition(".")[0] for key in facts if key.endswith(".r")}
        if any(facts.get(f"{n}.{k}") for n in networks for k in ("alpha_pattern", "rank_pattern", "use_rslora")):
            raise ValueError("ranks or alphas that differ from layer to layer are not read")
        return {n: float(facts[f"{n}.lora_alpha"]) / int(facts[f"{n}.r"]) for n in networks}
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError, OverflowError) as error:
        raise UserError(f"{index.path}: its lora_adapter_metadata cannot be used: {shown(error)}") from error


def _fits(where: str, up: Tensor, down: Tensor, magnitude: Tensor | None, layer: nn.Module) -> None:
    weight: Any = layer.weight
    rank = len(down) if down.ndim else 0
    wide = (1, 1) if weight.ndim == 4 else ()
    wanted = (weight.shape[0], rank, *wide), (rank, *weight.shape[1:])
    if rank < 1 or (up.shape, down.shape) != wanted:
        raise UserError(
            f"{where}: shapes {tuple(up.shape)} and {tuple(down.shape)} do not make an update of a weight "
            f"{tuple(weight.shape)}: made for another model?"
        )
    if magnitude is not None and magnitude.shape != weight.shape[:1]:
        raise UserError(f"{where}: its magnitude has shape {tuple(magnitude.shape)}, want {tuple(weight.shape[:1])}")


def _hint(index: Index) -> str:
    if any("text_encoder_2." in key or "lora_te2_" in key or "add_embedding" in key for key in index.tensors):
        return ": it was made for Stable Diffusion XL"
    if any("transformer_blocks" in key and not key.startswith(("unet", "lora_unet")) for key in index.tensors):
        return ": it was made for a transformer, not for a UNet"
    return ": it was made for another model"


def total(parts: Sequence[tuple[Mapping[str, Pair], float]]) -> dict[str, Pair]:
    """The sum of adapters, each times its factor: the pairs side by side. A magnitude can only stand alone, at 1."""
    found: dict[str, Pair] = {}
    for pairs, factor in parts:
        for name, pair in pairs.items():
            if pair.magnitude is not None and (len(parts) > 1 or factor != 1.0):
                raise UserError(
                    "an adapter with magnitudes (DoRA) does not add up with others: use it alone, at scale 1"
                )
            before = found.get(name)
            up = pair.up * factor
            if before is not None:
                up, down = torch.cat([before.up, up], dim=1), torch.cat([before.down, pair.down], dim=0)
                found[name] = Pair(up, down)
            else:
                found[name] = Pair(up, pair.down, pair.magnitude)
    return found


def as_peft(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Tensors under PEFT's names, scale folded, one rank per network (zeros fill up).

    Loaders disagree on what files with mixed ranks mean; with one rank there is nothing to disagree on.
    """
    ranks: dict[str, int] = {}
    for name, pair in pairs.items():
        network = name.partition(".")[0]
        ranks[network] = max(ranks.get(network, 0), pair.rank)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        network = name.partition(".")[0]
        lack = ranks[network] - pair.rank
        up = torch.cat([pair.up, pair.up.new_zeros(len(pair.up), lack, *pair.up.shape[2:])], dim=1)
        down = torch.cat([pair.down, pair.down.new_zeros(lack, *pair.down.shape[1:])], dim=0)
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        if pair.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector{magnitude_ending(network)}"] = pair.magnitude
    return tensors


def magnitude_ending(network: str) -> str:
    """transformers 5 starts a magnitude afresh, with no more than a warning, unless its name ends in `.weight`."""
    return ".weight" if network.startswith("text_encoder") else ""
