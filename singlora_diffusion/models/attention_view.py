"""An attention as a processor sees it, with some of its projections replaced; the attention itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class AttentionView:
    """Stands for `attention`, a diffusers Attention, in the call of a processor.

    Args:
        replaced: what the processor calls instead, by projection: to_q, to_k, to_v, to_out.0.
    """

    def __init__(self, attention: Any, replaced: dict[str, Callable[[Tensor], Tensor]]) -> None:
        self._attention = attention
        for name, projection in replaced.items():
            if name == "to_out.0":
                self.to_out = [projection, *attention.to_out[1:]]
            else:
                setattr(self, name, projection)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)
