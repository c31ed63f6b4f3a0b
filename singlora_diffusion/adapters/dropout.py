"""Dropout on what an update reads, with masks that follow from the example and not from what was drawn before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BITS = (1 << 32) - 1


class Dropout(nn.Module):
    """Each number of a layer's input is 0 with probability p, and divided by 1 - p otherwise, as in PEFT.

    A mask is a function of the layer, the number of the row and the place in it, and there is no state: whether a run
    is resumed, batches are accumulated or divided among processes, or the forward pass is computed again by gradient
    checkpointing, an example has the same mask, on a GPU and on a CPU.

    Args:
        p: at least 0, below 1.
        layer: a number of 32 bits that tells layers apart.

    Attributes:
        rows: (N,) int64, a number of 32 bits for each of the N rows of the next input; None: nothing is dropped.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, ...); the first axis counts what `rows` numbers.
        """
        if self.rows is None:
            return x
        if len(self.rows) != len(x):
            raise ValueError(f"{len(self.rows)} rows are numbered, and the input has {len(x)}")
        places = torch.arange(x[0].numel(), device=x.device)
        drawn = mixed(mixed(places) ^ mixed(mixed(self.rows) ^ self.layer)[:, None])  # (N, numbers in a row)
        kept = (drawn >= round(self.p * 2**32)).view(x.shape)
        return x * (kept / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def mixed(numbers: Tensor) -> Tensor:
    """Numbers of 32 bits (int64) one to one to others that look random; any change flips each bit in half of the cases.

    The multiplications wrap around at 64 bits, which the lower 32 do not notice.
    """
    numbers = ((numbers ^ (numbers >> 16)) * 0x7FEB352D) & BITS
    numbers = ((numbers ^ (numbers >> 15)) * 0x846CA68B) & BITS
    return numbers ^ (numbers >> 16)
