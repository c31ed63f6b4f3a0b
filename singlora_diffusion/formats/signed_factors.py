"""A SingLoRA as columns with signs: dW = sum_j s_j c_j[:out] c_j[:in]^T, with scale and u inside the columns.

All variants have this form (`positive`: all s = +1; `balanced`: +1, -1, ...; `offset`: A with +, A0 with -). Adapters
are added by putting their columns side by side. A LoRA pair whose factors are tied in this way is a SingLoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.config import MAX_RANK, AdapterConfig
from ..errors import UserError
from ..models.network import network_of
from .safetensors_io import DTYPES, ROUNDED, Index

if TYPE_CHECKING:
    from .native import Header


@dataclass(frozen=True)
class SignedFactors:
    """`values` (max(out, in), k) and `signs` (k,) of +-1, float64, of a weight (out, in)."""

    values: Tensor
    signs: Tensor
    shape: tuple[int, int]

    def pair(self) -> tuple[Tensor, Tensor]:
        """up (out, k), down (k, in), float64, with dW = up @ down."""
        out, in_ = self.shape
        return self.values[:out] * self.signs, self.values[:in_].T

    def scaled(self, factor: float) -> SignedFactors:
        """Those of factor * dW."""
        return SignedFactors(self.values * math.sqrt(abs(factor)), self.signs * math.copysign(1.0, factor), self.shape)


def suffice(config: AdapterConfig) -> bool:
    """Whether an adapter is fully described by signed factors."""
    return config.method == "singlora" and not config.dora


def of_layer(header: Header, state: Mapping[str, Tensor], name: str) -> SignedFactors:
    """Those of a layer in one of our files; of a `dora` adapter, those of its direction."""
    rank, alpha, _ = header.for_network(network_of(name))
    values = state[f"{name}.A"].double()
    signs = torch.ones(rank, dtype=torch.float64)
    if header.config.signature == "balanced":
        signs[1::2] = -1.0
    if header.config.init == "offset":
        values = torch.cat([values, state[f"{name}.A0"].double()], dim=1)
        signs = torch.cat([signs, -signs])
    return SignedFactors(values, signs, header.layers[name]).scaled(alpha / rank * header.u)


def of_matrix(a: Tensor, shape: tuple[int, int]) -> SignedFactors:
    """Those of A[:out] A[:in]^T."""
    return SignedFactors(a.double(), torch.ones(a.shape[1], dtype=torch.float64), shape)


def zero(shape: tuple[int, int]) -> SignedFactors:
    """Those of no update at all."""
    return of_matrix(torch.zeros(max(shape), 1), shape)


def tolerance(index: Index) -> float:
    """How far apart, relative, two numbers of a file may be that were one before they were stored."""
    stored = {DTYPES.get(entry.dtype) for entry in index.tensors.values()}
    return max((ROUNDED[dtype] for dtype in stored if dtype in ROUNDED), default=0.0)


def of_tied_pair(up: Tensor, down: Tensor, tolerance: float) -> SignedFactors | None:
    """Those of up @ down if the pair is tied, else None.

    It is if each column of `up` (out, k) is a multiple of its row of `down` (k, in) on the first min(out, in) entries.
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
    return SignedFactors(long * weight.abs().sqrt(), signs, (out, in_))


def concatenated(parts: list[SignedFactors]) -> SignedFactors:
    """Those of the sum."""
    values = torch.cat([part.values for part in parts], dim=1)
    return SignedFactors(values, torch.cat([part.signs for part in parts]), parts[0].shape)


def as_adapter(
    layers: Mapping[str, SignedFactors], targets: Mapping[str, tuple[str, ...]], roles: Mapping[str, str]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and tensors of the SingLoRA adapter that has these factors: scale 1, no ramp, no offset.

    Where all signs are + it is the paper's form; else `balanced`, with zero columns where signs do not come in pairs.
    Zero columns also make the ranks equal within a role.

    Args:
        targets: by role, denoiser and text.
        roles: of each network of these layers.

    Raises:
        UserError: the rank would be more than any adapter's.
    """
    mixed = any(bool((factors.signs < 0).any()) for factors in layers.values())
    rank = {"denoiser": 1, "text": 1}
    for name, factors in layers.items():
        role = roles[network_of(name)]
        most = 2 * int(max((factors.signs < 0).sum(), (factors.signs > 0).sum())) if mixed else len(factors.signs)
        rank[role] = max(rank[role], most)
        if most > MAX_RANK:
            raise UserError(f"{name} would have rank {most:,}, and the largest is {MAX_RANK:,}")
    state: dict[str, Tensor] = {}
    for name, factors in layers.items():
        values = _alternating(factors) if mixed else factors.values
        padding = values.new_zeros(len(values), rank[roles[network_of(name)]] - values.shape[1])
        state[f"{name}.A"] = torch.cat([values, padding], dim=1).float()
    config = AdapterConfig(
        rank=rank["denoiser"],
        targets=targets.get("denoiser", ()),
        text_rank=rank["text"] if targets.get("text") else None,
        text_targets=targets.get("text", ()),
        signature="balanced" if mixed else "positive",
        ramp_steps=0,
    )
    return config, state


def _alternating(factors: SignedFactors) -> Tensor:
    """The columns in the order +, -, +, - that `balanced` has, with zero columns where one sign runs out."""
    plus, minus = (factors.values[:, factors.signs == sign] for sign in (1.0, -1.0))
    k = max(plus.shape[1], minus.shape[1])
    values = factors.values.new_zeros(len(factors.values), 2 * k)
    values[:, 0 : 2 * plus.shape[1] : 2] = plus
    values[:, 1 : 2 * minus.shape[1] : 2] = minus
    return values
