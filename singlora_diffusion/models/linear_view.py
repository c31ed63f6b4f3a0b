"""GPT-2's linear layers, transformers' `Conv1D`, as ordinary ones: the same numbers, seen the other way round."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LinearView(nn.Linear):
    """Stands for a `Conv1D`, whose weight is (in, out), wherever a linear layer is wanted.

    Nothing is copied: `weight`, (out, in), is a view of the layer's own, so that what is written into it is in both.

    Args:
        layer: computes the outputs, as it always did.
    """

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)  # a linear layer's own would make parameters
        self.layer = layer
        self.in_features, self.out_features = layer.weight.shape
        self.training = layer.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        found: Tensor = self.layer.weight.T
        return found

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        found: Tensor = self.layer.bias
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        found: Tensor = self.layer(x)
        return found


def as_linear(module: nn.Module) -> nn.Linear | None:
    """A linear layer as it is, a `Conv1D` through a view; None for anything else."""
    if isinstance(module, nn.Linear):
        return module
    kind = type(module)  # compared by name: importing transformers takes longer than attaching
    is_conv1d = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    return LinearView(module) if is_conv1d else None


def inside(base: nn.Module, name: str) -> str:
    """Where a wrapper that calls its base `name` has the network's own module."""
    return f"{name}.layer" if isinstance(base, LinearView) else name
