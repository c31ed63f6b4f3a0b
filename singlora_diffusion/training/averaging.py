"""The weights to use, where others are trained: their moving average, or what a schedule-free optimizer averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from ..adapters import Adapter

State = dict[str, Tensor]
"""As `Adapter.state_dict`, on its device."""


class Average(Protocol):
    """What is used in place of the weights that are trained."""

    def follow(self, step: int) -> None:
        """Called after each step of the optimizer, from 1 on."""
        ...

    def weights(self) -> State:
        """The weights to use now."""
        ...

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from what `weights` said once."""
        ...


class Moving:
    """An exponential moving average; its decay rises to the one given as (1 + step) / (10 + step), as is usual."""

    def __init__(self, adapter: Adapter, decay: float) -> None:
        self.adapter, self.decay = adapter, decay
        self.kept = live(adapter)

    def follow(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.adapter.state_dict().items():
            self.kept[name].lerp_(tensor, 1 - decay)

    def weights(self) -> State:
        return self.kept

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.kept.items():
            tensor.copy_(weights[name])


class ScheduleFree:
    """The average that a schedule-free optimizer (arXiv 2405.15682) keeps by itself."""

    def __init__(self, adapter: Adapter, optimizer: Any) -> None:
        self.adapter, self.optimizer = adapter, optimizer

    def follow(self, step: int) -> None:
        pass

    def weights(self) -> State:
        before = live(self.adapter)
        self.optimizer.eval()
        found = live(self.adapter)
        self.optimizer.train()
        for name, tensor in self.adapter.state_dict().items():
            tensor.copy_(before[name])  # there and back again is not the same to the bit
        return found

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        pass  # it follows from the optimizer's state


def live(adapter: Adapter) -> State:
    """A copy of the weights that are trained."""
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


@contextmanager
def in_use(adapter: Adapter, average: Average | None) -> Iterator[None]:
    """Inside, the adapter has the weights to use; afterwards those that are trained, to the bit."""
    if average is None:
        yield
        return
    before = live(adapter)
    adapter.load_state_dict(average.weights())
    try:
        yield
    finally:
        adapter.load_state_dict(before)
