"""A SingLoRA as signed columns: dW = sum_j s_j c_j[:out] c_j[:in]^T, with scale and u inside the columns.

In this form every variant is one thing (`positive`: all s = +1; `balanced`: +1, -1, ...; `offset`: A with +, A0 with
-), adding adapters is putting columns side by side, and a LoRA pair can be asked whether it is a SingLoRA in disguise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.config import AdapterConfig
from . import container
from .container import Index
from .native import Header

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Columns:
    """`values` (max(out, in), k) and `signs` (k,) of +-1, float64, of a weight (out, in)."""

    values: Tensor
    signs: Tensor
    shape: tuple[int, int]

    def pair(self) -> tuple[Tensor, Tensor]:
        """up (out, k), down (k, in), float64, with dW = up @ down."""
        out, in_ = self.shape
        return self.values[:out] * self.signs, self.values[:in_].T

    def scaled(self, factor: float) -> Columns:
        """The columns of factor * dW."""
        return Columns(self.values * math.sqrt(abs(factor)), self.signs * math.copysign(1.0, factor), self.shape)


def are_all_of(config: AdapterConfig) -> bool:
    """Whether an adapter is its columns and nothing else."""
    return config.method == "singlora" and not config.dora


def of_layer(header: Header, state: Mapping[str, Tensor], name: str) -> Columns:
    """The columns of a layer in one of our files; of a `dora` adapter, those of its direction."""
    rank, alpha, _ = header.for_network(name.partition(".")[0])
    values = state[f"{name}.A"].double()
    signs = torch.ones(rank, dtype=torch.float64)
    if header.config.signature == "balanced":
        signs[1::2] = -1.0
    if header.config.init == "offset":
        values = torch.cat([values, state[f"{name}.A0"].double()], dim=1)
        signs = torch.cat([signs, -signs])
    return Columns(values, signs, header.layers[name]).scaled(alpha / rank * header.u)


def positive(a: Tensor, shape: tuple[int, int]) -> Columns:
    """The columns of A[:out] A[:in]^T."""
    return Columns(a.double(), torch.ones(a.shape[1], dtype=torch.float64), shape)


def none(shape: tuple[int, int]) -> Columns:
    """No update at all."""
    return positive(torch.zeros(max(shape), 1), shape)


def coarsest(index: Index) -> float:
    """How far two numbers of a file may be apart that were one before they were stored, relative."""
    kinds = {container.DTYPES[entry.dtype][1] for entry in index.tensors.values()}
    return max((TOLERANCE[kind] for kind in kinds if kind in TOLERANCE), default=0.0)


def of_pair(up: Tensor, down: Tensor, tolerance: float) -> Columns | None:
    """The columns of up @ down if it is a SingLoRA in disguise, else None.

    It is one if each column of `up` (out, k) is a multiple of its row of `down` (k, in) on the first min(out, in)
    entries.
    """
    u, d = up.double(), down.double().T
    out, in_ = len(u), len(d)
    least = min(out, in_)
    head_u, head_d = u[:least], d[:least]
    energy = head_d.square().sum(dim=0)
    ratio = (head_u * head_d).sum(dim=0) / energy.clamp_min(torch.finfo(torch.float64).tiny)
    if bool(((head_u - head_d * ratio).norm(dim=0) > tolerance * head_u.norm(dim=0)).any()):
        return None
    long = u if out >= in_ else d
    # A column whose head is zero on both sides cannot be told from other pairs, unless the whole product is zero.
    blank = (energy == 0) | (ratio == 0)
    if bool((blank & (u.norm(dim=0) * d.norm(dim=0) > 0)).any()):
        return None
    weight = 1.0 / ratio if out >= in_ else ratio
    weight = torch.where(blank, torch.zeros_like(weight), weight)
    signs = torch.where(weight < 0, -1.0, 1.0).double()
    return Columns(long * weight.abs().sqrt(), signs, (out, in_))


def beside(parts: list[Columns]) -> Columns:
    """The columns of the sum."""
    values = torch.cat([part.values for part in parts], dim=1)
    return Columns(values, torch.cat([part.signs for part in parts]), parts[0].shape)


def pack(
    layers: Mapping[str, Columns], targets: Mapping[str, tuple[str, ...]], roles: Mapping[str, str]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and tensors of the SingLoRA adapter that has these columns: scale 1, no ramp, no offset.

    Where all signs are + it is the paper's form; else `balanced`, with zero columns where signs do not come in pairs.
    Zero columns also make the ranks equal within a network.

    Args:
        targets: by role, denoiser and text.
        roles: of each network of these layers.
    """
    mixed = any(bool((columns.signs < 0).any()) for columns in layers.values())
    ordered = {name: _interleaved(columns) if mixed else columns.values for name, columns in layers.items()}
    rank = {"denoiser": 1, "text": 1}
    for name, values in ordered.items():
        role = roles[name.partition(".")[0]]
        rank[role] = max(rank[role], values.shape[1])
    state: dict[str, Tensor] = {}
    for name, values in ordered.items():
        padding = values.new_zeros(len(values), rank[roles[name.partition(".")[0]]] - values.shape[1])
        state[f"{name}.A"] = torch.cat([values, padding], dim=1).float()
    config = AdapterConfig(
        rank=rank["denoiser"],
        targets=targets.get("denoiser", ()),
        text_rank=rank["text"] if targets.get("text") else None,
        text_targets=targets.get("text", ()),
        signature="balanced" if mixed else "positive",
    )
    return config, state


def _interleaved(columns: Columns) -> Tensor:
    """The columns in the order +, -, +, - that `balanced` has, with zero columns where one sign runs out."""
    plus, minus = (columns.values[:, columns.signs == sign] for sign in (1.0, -1.0))
    k = max(plus.shape[1], minus.shape[1])
    values = columns.values.new_zeros(len(columns.values), 2 * k)
    values[:, 0 : 2 * plus.shape[1] : 2] = plus
    values[:, 1 : 2 * minus.shape[1] : 2] = minus
    return values
