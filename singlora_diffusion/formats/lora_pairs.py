"""Adapters as ordinary LoRA pairs per layer, from live adapters and from LoRA files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks, NetworkSpec, network_of
from ..terminal import escaped
from . import keys, safetensors_io
from .safetensors_io import Index

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"
"""Where alpha and rank are: diffusers' entry in a file's metadata, PEFT's file beside it."""


@dataclass(frozen=True)
class Pair:
    """W' - W0 = up @ down, or with a magnitude m (out,): W' = m * (W0 + up @ down) / ||W0 + up @ down|| per row."""

    up: Tensor  # (out, k) float32, scale and u inside; (out, k, 1, 1) for a convolution
    down: Tensor  # (k, in) float32; (k, in, height, width) for a convolution
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, factor: float) -> Pair:
        return Pair(self.up * factor, self.down, self.magnitude)

    def product(self) -> Tensor:
        """up @ down, (out, in) float64; of a convolution (out, in * height * width)."""
        return self.up.flatten(1).double() @ self.down.flatten(1).double()

    def rows(self, rows: Sequence[range]) -> Pair | None:
        """Of these rows of the update, in this order, without the columns that are zero there; None if all are."""
        up = torch.cat([self.up[one.start : one.stop] for one in rows])
        if self.magnitude is not None:
            return Pair(up, self.down, torch.cat([self.magnitude[one.start : one.stop] for one in rows]))
        used = up.any(dim=0)
        return Pair(up[:, used], self.down[used]) if bool(used.any()) else None

    def balanced(self) -> Pair:
        """The same product from factors of about the same size: powers of two go from one to the other, column by
        column, so that small ones do not fall below what half precision can tell from zero."""
        up, down = self.up.flatten(1).square().mean(dim=0).sqrt(), self.down.flatten(1).square().mean(dim=1).sqrt()
        tiny = torch.finfo(torch.float32).tiny
        shift = torch.exp2(torch.round(torch.log2(down.clamp_min(tiny) / up.clamp_min(tiny)) / 2))
        shift = torch.where((up > 0) & (down > 0), shift, torch.ones_like(shift))
        return Pair(
            self.up * shift.reshape(1, -1, *[1] * (self.up.ndim - 2)),
            self.down / shift.reshape(-1, *[1] * (self.down.ndim - 1)),
            self.magnitude,
        )

    def norm(self) -> float:
        """||up @ down||, by the smaller of the product and the Gram matrices: a rank may be anything."""
        if self.rank >= min(self.up.shape[0], self.down[0].numel()):
            return float(torch.linalg.norm(self.product()))
        up, down = self.up.flatten(1).double(), self.down.flatten(1).double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())

    def compact(self) -> Pair:
        """The same update at a rank no larger than the weight's: a file's rank may be anything."""
        if self.rank <= self.up.shape[0]:
            return self
        product = self.product().to(self.up.dtype)
        up = torch.eye(len(product)).reshape(len(product), len(product), *self.up.shape[2:])
        return Pair(up, product.reshape(len(product), *self.down.shape[1:]), self.magnitude)


def fused(parts: Sequence[tuple[Sequence[range], Pair]], outputs: int) -> Pair:
    """The pair of a layer of so many outputs, of which each part is about the rows that it names: block by block.

    Without magnitudes. The rank is the sum of the parts' ranks.
    """
    rank = sum(pair.rank for _, pair in parts)
    up, column = torch.zeros(outputs, rank), 0
    for rows, pair in parts:
        start = 0
        for one in rows:
            up[one.start : one.stop, column : column + pair.rank] = pair.up[start : start + len(one)]
            start += len(one)
        column += pair.rank
    return Pair(up, torch.cat([pair.down for _, pair in parts]))


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
    """The layers of an ordinary LoRA file, in any form that `keys` knows, by our names; fitted to `networks`.

    A pair for a fused layer becomes one for each of the layers it is made of. Columns that do nothing there are left
    out, so that a fused pair made of the parts' own pairs gives these back.

    Raises:
        UserError: a tensor that is not part of a LoRA or has no place in these networks, half a pair, a wrong shape, a
            layer that occurs twice.
    """
    path = index.path
    spellings, modules = keys.spellings(networks), keys.modules(networks)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors_io.read_tensors(index).items():
        tagged = keys.tag(key)
        if tagged is None or tagged.part not in ("up", "down", "alpha", "magnitude"):
            raise UserError(f"{path}: {escaped(key)} is not a tensor of a LoRA")
        if tagged.layer not in spellings:
            raise UserError(f"{path}: {escaped(tagged.layer)} is no layer of this model{_hint(index)}")
        if key.endswith(".dora_scale"):
            raise UserError(
                f"{path}: {escaped(key)} is a magnitude in a form that diffusers drops: it cannot be used here"
            )
        parts.setdefault(tagged.layer, {})[tagged.part] = tensor.float()
    folded = _peft_scales(index)
    found: dict[str, Pair] = {}
    for layer, part in parts.items():
        pieces = spellings[layer]
        where = f"{path}: {pieces[0].name if len(pieces) == 1 else escaped(layer)}"
        if not {"up", "down"} <= set(part):
            raise UserError(f"{where} has half of its pair only")
        up, down, magnitude = part["up"], part["down"], part.get("magnitude")
        _fits(where, up, down, magnitude, [modules[piece.name] for piece in pieces])
        scale = folded.get(network_of(pieces[0].name), folded.get("", 1.0))
        if "alpha" in part:
            if part["alpha"].numel() != 1:
                raise UserError(f"{where} has {part['alpha'].numel()} alphas, want one")
            scale = float(part["alpha"].reshape(())) / len(down)
        whole = Pair(up * scale, down, magnitude)
        for piece in pieces:
            pair = whole.rows(piece.rows) if piece.rows else whole
            if piece.name in found:
                raise UserError(f"{path}: {piece.name} occurs twice, under names of different programs")
            if pair is not None:
                found[piece.name] = pair
    if not found:
        raise UserError(f"{path}: holds no layers")
    return found


def config_beside(index: Index) -> Any:
    """What the adapter_config.json of PEFT beside a file says; None without one, or if it is too long to be one.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or is not JSON.
    """
    path = index.path.with_name(CONFIG)
    return safetensors_io.parse_json(path.read_bytes()) if path.is_file() and path.stat().st_size < 1 << 20 else None


def _peft_scales(index: Index) -> dict[str, float]:
    """alpha / rank by network from diffusers' metadata; of all, under "", from what lies beside a file of PEFT's own.

    Raises:
        UserError: they cannot be used.
    """
    where = METADATA
    try:
        if where in index.metadata:
            facts = safetensors_io.parse_json(index.metadata[where])
        elif any(key.startswith(keys.PEFT_WRAPPER) for key in index.tensors):
            where = CONFIG
            beside = config_beside(index)
            if beside is None:
                return {}
            facts = {f".{key}": value for key, value in beside.items()}
        else:
            return {}
        networks = {key.partition(".")[0] for key in facts if key.endswith(".r")}
        if any(facts.get(f"{n}.{k}") for n in networks for k in ("alpha_pattern", "rank_pattern", "use_rslora")):
            raise ValueError("ranks or alphas that differ from layer to layer are not read")
        return {n: float(facts[f"{n}.lora_alpha"]) / int(facts[f"{n}.r"]) for n in networks}
    except (OSError, ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index.path}: its {where} cannot be used: {escaped(error)}") from error


def _fits(where: str, up: Tensor, down: Tensor, magnitude: Tensor | None, layers: Sequence[nn.Module]) -> None:
    """Raise unless a pair makes an update of a layer, or of several as one: their outputs one below the other."""
    weights: list[Any] = [layer.weight for layer in layers]
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    rank = len(down) if down.ndim else 0
    wide = (1, 1) if len(shape) == 4 else ()
    wanted = (shape[0], rank, *wide), (rank, *shape[1:])
    if rank < 1 or (up.shape, down.shape) != wanted:
        raise UserError(
            f"{where}: shapes {tuple(up.shape)} and {tuple(down.shape)} do not make an update of a weight {shape}: "
            f"made for another model?"
        )
    if magnitude is not None and magnitude.shape != shape[:1]:
        raise UserError(f"{where}: its magnitude has shape {tuple(magnitude.shape)}, want {shape[:1]}")


MADE_FOR = {
    "Stable Diffusion 3": ("joint_blocks",),
    "FLUX.1": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "a transformer, not for a UNet": (
        "transformer.transformer_blocks",
        "lora_transformer_",
        "model.transformer_blocks",
    ),
    "Stable Diffusion XL": ("text_encoder_2.", "lora_te2_", "add_embedding", "label_emb"),
}
"""Parts of names that tell the model of a file; the first that occurs counts."""


def _hint(index: Index) -> str:
    names = "\n".join(index.tensors)
    models = (model for model, marks in MADE_FOR.items() if any(mark in names for mark in marks))
    return f": it was made for {next(models, 'another model')}"


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
            scaled = pair.scaled(factor).compact()
            if before is not None:
                up, down = torch.cat([before.up, scaled.up], dim=1), torch.cat([before.down, scaled.down], dim=0)
                scaled = Pair(up, down).compact()
            found[name] = scaled
    return found


def as_peft(pairs: Mapping[str, Pair], networks: Mapping[str, NetworkSpec]) -> dict[str, Tensor]:
    """Tensors under PEFT's names, scale folded, one rank per network (zeros fill up).

    Loaders disagree on what files with mixed ranks mean; with one rank there is nothing to disagree on.
    """
    tensors: dict[str, Tensor] = {}
    for network, names in keys.by_network(pairs).items():
        rank = max(pairs[name].rank for name in names)
        for name in names:
            pair = pairs[name]
            lack = rank - pair.rank
            up = torch.cat([pair.up, pair.up.new_zeros(len(pair.up), lack, *pair.up.shape[2:])], dim=1)
            down = torch.cat([pair.down, pair.down.new_zeros(lack, *pair.down.shape[1:])], dim=0)
            tensors |= {f"{name}{keys.PEFT.up}": up, f"{name}{keys.PEFT.down}": down}
            if pair.magnitude is not None:
                tensors[f"{name}{keys.MAGNITUDE[networks[network].role]}"] = pair.magnitude
    return tensors
