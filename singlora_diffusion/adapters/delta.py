"""The contract of an update rule: how one frozen linear layer is changed. W' = W0 + dW, of whatever form."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .dropout import Dropout


class Factors(NamedTuple):
    """A change as other programs know it, float32.

    Without magnitude W' = W0 + up @ down; with it W' = magnitude * (W0 + up @ down) / ||W0 + up @ down||, per row.
    """

    up: Tensor  # (out, k), ramp and alpha / rank inside
    down: Tensor  # (k, in)
    magnitude: Tensor | None = None  # (out,)


class Delta(Protocol):
    """The update of one linear layer.

    What this package trains itself is also an `nn.Module` whose `forward(base, x)` is the adapted layer's output for
    x (..., in): (..., out) in x.dtype.
    """

    scale: float
    """Strength at inference: 1.0 is as trained, 0.0 the base layer."""

    @property
    def u(self) -> float:
        """The ramp's value now; 1.0 without one."""
        ...

    def set_ramp(self, u: float) -> None: ...

    def set_scale(self, scale: float) -> None: ...

    def settle(self) -> None:
        """After an optimizer step: put back what left its range."""
        ...

    def number_rows(self, rows: Tensor | None) -> None:
        """`Dropout.rows` of the next forward passes, where there is dropout; None: nothing is dropped."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by key; the live tensors."""
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of `tensors` that are trained, float32 whatever the base's dtype."""
        ...

    def rate(self, key: str, narrowest: int) -> float:
        """A trained tensor's learning rate relative to the others'.

        Args:
            narrowest: the smallest max(out, in) of the adapted layers.
        """
        ...

    def delta_weight(self, weight: Tensor) -> Tensor:
        """W' - W0 for W0 = `weight`, (out, in) float32, at the present ramp and scale."""
        ...

    def factors(self) -> Factors | None:
        """The change as a low-rank pair; None where it is none. With a magnitude: at scale 1."""
        ...


class LowRankDelta(nn.Module):
    """dW = scale (alpha / rank) u(t) up @ down: a rule is its two factors and the trained tensors they are made of.

    Args:
        base: the frozen layer, weight (out, in).
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
    """

    gain: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.out_features, self.in_features = base.out_features, base.in_features
        self.rank, self.alpha = rank, float(alpha)
        # One number on the device, so that the ramp neither recompiles a compiled model nor makes the host wait.
        self.register_buffer("gain", torch.empty((), device=base.weight.device), persistent=False)
        self.scale = 1.0
        self.dropout: Dropout | None = None
        self.set_ramp(1.0)

    def pair(self) -> tuple[Tensor, Tensor]:
        """up (out, k) and down (k, in) float32, differentiable, without alpha / rank and u."""
        raise NotImplementedError

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

    def settle(self) -> None:
        """Every number is allowed."""

    def number_rows(self, rows: Tensor | None) -> None:
        if self.dropout is not None:
            self.dropout.rows = rows

    @property
    def drops(self) -> bool:
        """Whether the update does not see all of its input."""
        return self.dropout is not None and self.dropout.rows is not None

    def seen(self, x: Tensor) -> Tensor:
        """What the update reads of the layer's input (N, ..., in)."""
        return x if self.dropout is None else self.dropout(x)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state_dict(keep_vars=True))

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def rate(self, key: str, narrowest: int) -> float:
        return 1.0

    def forward(self, base: nn.Linear, x: Tensor) -> Tensor:
        """Output of the adapted layer for x (..., in): base(x) + x dW^T, (..., out) in x.dtype."""
        if self.scale == 0.0:  # the sums of a layer with its update may come in another order
            return base(x)
        up, down = (factor.to(x.dtype) for factor in self.pair())
        return torch.add(base(x), (self.seen(x) @ down.T * self.gain.to(x.dtype)) @ up.T, alpha=self.scale)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """dW, (out, in) float32. `weight` is W0, which an additive rule does not need."""
        found = self.factors()
        assert found is not None
        return found.up @ found.down

    @torch.no_grad()
    def factors(self) -> Factors | None:
        """An ordinary LoRA pair with dW = up @ down: up (out, k), down (k, in), float32, scaled in up."""
        up, down = self.pair()
        return Factors(up * (self.gain * self.scale), down.clone(memory_format=torch.contiguous_format))

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, alpha={self.alpha:g}"
