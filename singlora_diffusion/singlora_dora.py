"""SingLoRA as the direction of DoRA: a learned magnitude per output row on top of W0 + dW.

    W' = m * (W0 + dW) / ||W0 + dW||,   dW = (alpha / r) u(t) A[:out] S A[:in]^T,   m initialised to ||W0||

DoRA: Liu et al. 2024, arXiv 2402.09353, equation 5; the norm is detached (section 4.3) and taken per output row, as in the
authors' and PEFT's code. The combination is suggested, not tried, in the SingLoRA paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .singlora import SingLoRA


class DoraSingLoRA(SingLoRA):
    """`SingLoRA` with a magnitude m (out,) float32 as a second trained tensor; same arguments, same contract."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, **options) -> None:
        super().__init__(base, rank, alpha, **options)
        squares = base.weight.detach().float().square().sum(dim=1)  # ||W0||^2 per output row
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())

    def norm(self, weight: Tensor) -> Tensor:
        """||W0 + dW|| per output row, (out,) float32, without forming dW.

        With dW = U V: ||w + uV||^2 = ||w||^2 + 2 u.(V w) + u (V V^T) u^T, so the largest product is W0 V^T, (out, k).
        """
        with torch.no_grad():
            up, down = self.factors()
            cross = (weight.to(torch.float32) @ down.T * up).sum(dim=1)
            gram = (up @ (down @ down.T) * up).sum(dim=1)
            return (self.squares + 2 * cross + gram).clamp_min(0).sqrt()

    def forward(self, base: nn.Linear, x: Tensor) -> Tensor:
        """x W'^T + bias, (..., out) in x.dtype."""
        ratio = (self.magnitude / self.norm(base.weight)).to(x.dtype)
        y = ratio * (F.linear(x, base.weight) + self.update(x))
        return y if base.bias is None else y + base.bias

    def delta_weight(self, weight: Tensor) -> Tensor:
        """W' - W0, (out, in) float32, for W0 = `weight`."""
        w0 = weight.detach().float()
        directed = w0 + super().delta_weight(weight)
        return (self.magnitude.detach() / self.norm(weight))[:, None] * directed - w0
