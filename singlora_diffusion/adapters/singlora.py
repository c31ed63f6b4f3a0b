"""SingLoRA: one matrix per adapted weight.  W = W0 + (alpha / r) u(t) A A^T

Bensaid et al. 2025, "SingLoRA: Low Rank Adaptation Using a Single Matrix", arXiv 2507.05566, eq. 8 and section 4.4.
For a weight W0 of shape (out, in), A has n = max(out, in) rows and the smaller side uses the first rows of A:

    dW = (alpha / r) u(t) A[:out] S A[:in]^T          S = identity in the paper

Two departures are offered by name, both off by default: `init="offset"` subtracts the product of the initial matrix, so
that training starts at exactly dW = 0; `signature="balanced"` puts S = diag(+1, -1, +1, ...) in between, which lifts
the restriction of A A^T to positive semi-definite updates without a further parameter (SymLoRA, arXiv 2504.03719,
learns such a diagonal).
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from . import singlora_fused
from .config import Init, Signature
from .delta import Factors, LowRankDelta

INITS: tuple[str, ...] = get_args(Init)
SIGNATURES: tuple[str, ...] = get_args(Signature)


def kaiming(rows: int, rank: int, generator: torch.Generator | None = None) -> Tensor:
    """Initial A, (rows, rank) float32, entries uniform in +-1/sqrt(rows).

    The paper wants entries of order n^-1/2 for A in R^{n x r}; these have variance 1 / (3 n).
    `nn.init.kaiming_uniform_` on an (n, r) tensor would read fan_in = r and give a product n / r times too large, hence
    fan_in = n here.
    """
    return torch.empty(rows, rank).uniform_(-1.0, 1.0, generator=generator).mul_(1.0 / math.sqrt(rows))


class SingLoRA(LowRankDelta):
    """The update of one linear layer.

    Args:
        base: the frozen layer, weight (out, in).
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
        init: `kaiming` as in the paper, or `offset`: A A^T - A0 A0^T.
        signature: `positive` as in the paper, or `balanced`: A S A^T with S = diag(+1, -1, ...).
        by_width: let wide layers learn more slowly, as n^-1/2.
        generator: a CPU generator; the same state gives the same A.

    A is float32 whatever the base's dtype, and is cast to the input's dtype where it is used.
    """

    A0: Tensor | None
    S: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        init: str = "kaiming",
        signature: str = "positive",
        by_width: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if rank < 1 or init not in INITS or signature not in SIGNATURES:
            raise ValueError(f"rank {rank}, init {init!r}, signature {signature!r}: want >= 1, {INITS}, {SIGNATURES}")
        super().__init__(base, rank, alpha)
        self.init, self.signature, self.by_width = init, signature, by_width
        device = base.weight.device
        start = kaiming(max(self.out_features, self.in_features), rank, generator).to(device)
        self.A = nn.Parameter(start)  # (max(out, in), r) float32
        self.register_buffer("A0", start.clone() if init == "offset" else None)
        signs = torch.tensor([1.0, -1.0], device=device).repeat(rank)[:rank]  # (r,)
        self.register_buffer("S", signs if signature == "balanced" else None, persistent=False)

    def rate(self, key: str, narrowest: int) -> float:
        """By width: the paper's analysis asks for a rate proportional to n^-1/2 (section 4.2; it holds for Adam)."""
        return math.sqrt(narrowest / self.A.shape[0]) if self.by_width and key == "A" else 1.0

    def forward(self, base: nn.Linear, x: Tensor) -> Tensor:
        """Output of the adapted layer for x (..., in): base(x) + x dW^T, (..., out) in x.dtype."""
        if self.scale == 0.0:  # the fused sums may come in another order
            return base(x)
        if (
            self.A0 is None and not self.drops and singlora_fused.applies(base, x)
        ):  # an offset must be exactly zero at the start
            return singlora_fused.adapted_linear(base, x, self.A, self._scaling() * self.scale)
        return torch.add(base(x), self._update(self.seen(x)), alpha=self.scale)

    def _update(self, x: Tensor) -> Tensor:
        """x dW^T at strength 1.

        With D = A - A0, an offset is D S A^T + A0 S D^T: both terms are as small as D, so that little is lost to
        rounding, and exactly zero at the start.
        """
        if self.A0 is None:
            return self._product(x, self.A, self.A)
        moved = self.A - self.A0
        return self._product(x, moved, self.A) + self._product(x, self.A0, moved)

    def _product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """x (left S right^T)^T, scaled; both (max(out, in), r)."""
        z = x @ right[: self.in_features].to(x.dtype)  # (..., r)
        return (z * self._scaling().to(x.dtype)) @ left[: self.out_features].to(x.dtype).T

    def _scaling(self) -> Tensor:
        """(alpha / r) u S: a number, or (r,) with signs."""
        return self.gain if self.S is None else self.gain * self.S

    def pair(self) -> tuple[Tensor, Tensor]:
        """A S and A^T, and beside them those of A0 with the other sign, where it is subtracted."""
        up, down = self._halves(self.A)
        if self.A0 is None:
            return up, down
        up0, down0 = self._halves(self.A0)
        return torch.cat([up, -up0], dim=1), torch.cat([down, down0])

    def _halves(self, a: Tensor) -> tuple[Tensor, Tensor]:
        up = a[: self.out_features]
        return up if self.S is None else up * self.S, a[: self.in_features].T

    def factors(self) -> Factors | None:
        """An ordinary LoRA pair with dW = up @ down exactly: up (out, k), down (k, in), float32, scaled in up.

        k = r, or 2 r with `init="offset"`, whose pair is safe to round: it is not written as the difference of two
        nearly equal products, but [P, Q] [R; T] = [P + Q, (P - Q) / 2] [(R + T) / 2; R - T], where P + Q and R - T are
        small, as the update is, and its columns and rows are of about equal size, above what half precision underflows.
        """
        up, down = self.exact_pair()
        return Factors(up * self.scale, down)

    def exact_pair(self) -> tuple[Tensor, Tensor]:
        """The pair of `factors` at strength 1, constant to autograd, in memory of its own."""
        up, down = (part.detach() for part in self.pair())
        if self.A0 is not None:
            (p, q), (r, t) = up.chunk(2, dim=1), down.chunk(2)
            up, down = torch.cat([p + q, (p - q) / 2], dim=1), torch.cat([(r + t) / 2, r - t])
        up = up * self.gain  # only now: p and q, each rounded by it, would not cancel
        if self.A0 is not None:
            ratio = torch.linalg.vector_norm(down, dim=1) / torch.linalg.vector_norm(up, dim=0)
            power = torch.exp2(ratio.log2().div(2).round())  # of two, so that nothing is rounded
            power = torch.where(power.isfinite() & (power > 0), power, 1.0)  # one of them is zero
            up, down = up * power, down / power[:, None]
        return up, down.clone(memory_format=torch.contiguous_format)
