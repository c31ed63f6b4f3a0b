"""SingLoRA as the direction of DoRA: a learned magnitude per output row on top of W0 + dW.

    W' = m * (W0 + dW) / ||W0 + dW||,   dW = (alpha / r) u(t) A[:out] S A[:in]^T,   m initialised to ||W0||

DoRA: Liu et al. 2024, arXiv 2402.09353, equation 5; the norm is detached (section 4.3) and taken per output row, as in
the authors' and PEFT's code. The combination is suggested, not tried, in the SingLoRA paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.quantized import dequantized
from . import singlora_fused
from .config import AdapterConfig
from .delta import Factors
from .singlora import SingLoRA

TINY = 1e-24
"""Floor of a squared norm: a row of zeros stays one instead of becoming 0 / 0."""


class DoraSingLoRA(SingLoRA):
    """`SingLoRA` with a magnitude m (out,) float32 as a second trained tensor; same arguments.

    A magnitude is a norm: it starts at ||W0||, is trained as it is, and `settle` puts what an optimizer step took below
    zero back to it. Another parametrisation, as a logarithm, would change what Adam does and what stored files mean.

    The strength at inference goes with the whole change, W0 + scale (W' - W0).

    Args:
        magnitude_ratio: the learning rate of the magnitudes over that of A.
    """

    squares: Tensor

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, *, magnitude_ratio: float = 1.0, **options: Any
    ) -> None:
        super().__init__(base, rank, alpha, **options)
        self.magnitude_ratio = magnitude_ratio
        squares = dequantized(base).detach().float().square().sum(dim=1)  # ||W0||^2 per output row
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())

    def settle(self) -> None:
        """No magnitude below zero."""
        with torch.no_grad():
            self.magnitude.clamp_(min=0.0)

    def rate(self, key: str, narrowest: int) -> float:
        return self.magnitude_ratio if key == "magnitude" else super().rate(key, narrowest)

    def norm(self, weight: Tensor) -> Tensor:
        """||W0 + dW|| per output row, (out,) float32, without forming dW; a constant to autograd.

        With dW = U V: ||w + uV||^2 = ||w||^2 + 2 u.(V w) + u (V V^T) u^T, so the largest product is W0 V^T, (out, k).
        """
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            up, down = self.pair()
            up = up * self.gain
            cross = (weight.float() @ down.T * up).sum(dim=1)
            gram = (up @ (down @ down.T) * up).sum(dim=1)
            return (self.squares + 2 * cross + gram).clamp_min(TINY).sqrt()

    def forward(self, base: nn.Linear, x: Tensor) -> Tensor:
        """x W'^T + bias, (..., out) in x.dtype."""
        if self.scale == 0.0:
            return base(x)
        ratio = self.magnitude / self.norm(dequantized(base))
        # As a change of y, so that what has not moved yet gives exactly what the base does, whatever the dtype.
        if self.A0 is None and self.scale == 1.0 and not self.drops and singlora_fused.applies(base, x):
            y = singlora_fused.adapted_linear(base, x, self.A, self._scaling())
            return torch.addcmul(y, (ratio - 1).to(x.dtype), y if base.bias is None else y - base.bias)
        y, seen = base(x), self.seen(x)
        linear = base(seen) if self.drops else y
        linear = linear if base.bias is None else linear - base.bias
        change = (ratio - 1).to(x.dtype) * linear + ratio.to(x.dtype) * self._update(seen)
        return torch.add(y, change, alpha=self.scale)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """scale (W' - W0), (out, in) float32, for W0 = `weight`."""
        ratio = (self.magnitude.detach() / self.norm(weight))[:, None]
        up, down = self.exact_pair()
        return self.scale * ((ratio - 1) * weight.detach().float() + ratio * (up @ down))

    def factors(self) -> Factors | None:
        """The direction as a pair, at scale 1 whatever the scale is, and the magnitude."""
        return Factors(*self.exact_pair(), self.magnitude.detach())


def delta(
    base: nn.Linear, rank: int, alpha: float, config: AdapterConfig, generator: torch.Generator | None
) -> SingLoRA:
    """What the configuration asks for at one layer."""
    options: dict[str, Any] = {
        "init": config.init,
        "signature": config.signature,
        "by_width": config.rate_by_width,
        "generator": generator,
    }
    if config.dora:
        return DoraSingLoRA(base, rank, alpha, magnitude_ratio=config.magnitude_lr_ratio, **options)
    return SingLoRA(base, rank, alpha, **options)
