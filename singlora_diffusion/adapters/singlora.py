"""SingLoRA: one matrix per adapted weight.  W = W0 + (alpha / r) u(t) A A^T

Bensaid et al. 2025, "SingLoRA: Low Rank Adaptation Using a Single Matrix", arXiv 2507.05566, eq. 8 and section 4.4.
For a weight W0 of shape (out, in), A has n = max(out, in) rows and the smaller side uses the first rows of A:

    dW = (alpha / r) u(t) A[:out] S A[:in]^T          S = identity in the paper

Two departures are offered by name, both off by default: `init="offset"` subtracts the product of the initial matrix, so
that training starts at exactly dW = 0; `signature="balanced"` puts S = diag(+1, -1, +1, ...) in the middle, which lifts
the restriction of A A^T to positive semi-definite updates without a further parameter (SymLoRA, arXiv 2504.03719,
learns such a diagonal).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import singlora_fused

INITS = ("kaiming", "offset")
SIGNATURES = ("positive", "balanced")


def ramp(step: int, ramp_steps: int) -> float:
    """u(t) = min(t / T, 1), the paper's warm-up (section 4.1); T = 0 means u = 1 throughout."""
    return min(step / ramp_steps, 1.0) if ramp_steps > 0 else 1.0


def kaiming(rows: int, rank: int, generator: torch.Generator | None = None) -> Tensor:
    """Initial A, (rows, rank) float32, entries uniform in +-1/sqrt(rows).

    The paper wants entries of order n^-1/2 for A in R^{n x r}. `nn.init.kaiming_uniform_` on an (n, r) tensor would
    read fan_in = r and give a product 25 to 80 times too large, hence fan_in = n here.
    """
    return torch.empty(rows, rank).uniform_(-1.0, 1.0, generator=generator).mul_(1.0 / math.sqrt(rows))


class SingLoRA(nn.Module):
    """The update of one linear layer.

    Args:
        base: the frozen layer, weight (out, in).
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
        init: `kaiming` as in the paper, or `offset`: A A^T - A0 A0^T.
        signature: `positive` as in the paper, or `balanced`: A S A^T with S = diag(+1, -1, ...).
        generator: a CPU generator; the same state gives the same A.

    A is float32 whatever the base's dtype, and is cast to the input's dtype where it is used.
    """

    A0: Tensor | None
    S: Tensor | None
    gain: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        init: str = "kaiming",
        signature: str = "positive",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1 or init not in INITS or signature not in SIGNATURES:
            raise ValueError(f"rank {rank}, init {init!r}, signature {signature!r}: want >= 1, {INITS}, {SIGNATURES}")
        device = base.weight.device
        self.out_features, self.in_features = base.out_features, base.in_features
        self.rank, self.alpha, self.init, self.signature = rank, float(alpha), init, signature
        start = kaiming(max(self.out_features, self.in_features), rank, generator).to(device)
        self.A = nn.Parameter(start)  # (max(out, in), r) float32
        self.register_buffer("A0", start.clone() if init == "offset" else None)
        signs = torch.tensor([1.0, -1.0], device=device).repeat(rank)[:rank]  # (r,)
        self.register_buffer("S", signs if signature == "balanced" else None, persistent=False)
        # One number on the device, so that the ramp neither recompiles a compiled model nor makes the host wait.
        self.register_buffer("gain", torch.empty((), device=device), persistent=False)
        self.scale = 1.0
        self.set_ramp(1.0)

    @property
    def u(self) -> float:
        """The ramp's value now, 0 to 1."""
        return self._u

    def set_ramp(self, u: float) -> None:
        """Set u(t). The training loop calls it once per optimizer step; nothing counts in forward."""
        self._u = float(u)
        self.gain.fill_(self.alpha / self.rank * self._u)

    def set_scale(self, scale: float) -> None:
        """Set the strength at inference: 1.0 is as trained, 0.0 the base layer."""
        self.scale = float(scale)

    def forward(self, base: nn.Linear, x: Tensor) -> Tensor:
        """What the adapted layer answers to x (..., in): base(x) + x dW^T, (..., out) in x.dtype."""
        if self.A0 is None and singlora_fused.applies(base, x):  # an offset's halves must cancel exactly at the start
            return singlora_fused.adapted_linear(base, x, self.A, self._middle() * self.scale)
        return torch.add(base(x), self._update(x), alpha=self.scale)

    def _update(self, x: Tensor) -> Tensor:
        """x dW^T at strength 1."""
        y = self._product(x, self.A)
        return y if self.A0 is None else y - self._product(x, self.A0)

    def _product(self, x: Tensor, a: Tensor) -> Tensor:
        a = a.to(x.dtype)
        z = x @ a[: self.in_features]  # (..., r)
        return (z * self._middle().to(x.dtype)) @ a[: self.out_features].T

    def _middle(self) -> Tensor:
        """(alpha / r) u S: a number, or (r,) with signs."""
        return self.gain if self.S is None else self.gain * self.S

    def _pair(self) -> tuple[Tensor, Tensor]:
        """`factors` at strength 1."""
        a, a0, middle = self.A.detach(), self.A0, self._middle()
        up, down = a[: self.out_features] * middle, a[: self.in_features].T
        if a0 is not None:
            up = torch.cat([up, a0[: self.out_features] * -middle], dim=1)
            down = torch.cat([down, a0[: self.in_features].T])
        return up, down

    def _dense(self) -> Tensor:
        """dW at strength 1. The halves of an offset are multiplied apart, so that they cancel exactly at the start."""
        up, down = self._pair()
        products = [u @ d for u, d in zip(up.split(self.rank, dim=1), down.split(self.rank), strict=True)]
        return torch.stack(products).sum(dim=0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """An ordinary LoRA pair with dW = up @ down exactly: up (out, k), down (k, in), float32, scaled in up.

        k = r, or 2 r with `init="offset"`.
        """
        up, down = self._pair()
        return up * self.scale, down.clone(memory_format=torch.contiguous_format)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """dW, (out, in) float32. `weight` is W0, which this purely additive form does not need."""
        return self._dense() * self.scale

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, alpha={self.alpha:g}"
