"""Networks built without drawing the random numbers that loading their weights would only overwrite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_RANDOM = ("normal_", "uniform_", "kaiming_uniform_")  # what the others, Xavier's and truncated ones, are made of


class SkipInit(TorchFunctionMode):
    """Inside, in this thread: a tensor that would be filled with random numbers is filled with zeros.

    For architectures known beforehand, all of whose weights are then loaded. Zero, and not what memory happens to
    hold, because truncated normals are drawn again until they are in range; where zero is out of it, that never ends.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func.__name__ in _RANDOM:
            tensor: torch.Tensor = args[0] if args else named["tensor"]
            tensor.detach().zero_()
            return tensor
        return func(*args, **named)
