"""An attention as a processor sees it, with some of its projections replaced; the attention itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class AttentionView:
    """Stands for `attention`, an attention of diffusers, in the call of a processor.

    Args:
        replaced: what the processor calls instead, by projection: to_q, add_k_proj, to_out.0.
    """

    def __init__(self, attention: Any, replaced: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self._attention = attention
        for name, projection in replaced.items():
            name, _, place = name.partition(".")
            if place:  # one of a list of modules
                modules = [*getattr(self, name)]
                modules[int(place)] = projection
                setattr(self, name, modules)
            else:
                setattr(self, name, projection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)
