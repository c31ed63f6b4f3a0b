"""A torch generator for each seed of 64 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KEPT = 32  # bits: torch's CPU generator takes 64 and forgets the upper half


def seeded(seed: int) -> torch.Generator:
    """A CPU generator that starts from all 64 bits of a seed.

    Below 2**32 it is `torch.Generator().manual_seed(seed)`. Above, the upper half is mixed into the lower one by a
    one-to-one map, so that seeds which share one half never share a generator.

    Raises:
        ValueError: a negative seed, or one of more than 64 bits.
    """
    import torch

    if not 0 <= seed < 1 << 64:
        raise ValueError(f"a seed has at most 64 bits and no sign, not {seed}")
    low, high = seed & ((1 << KEPT) - 1), seed >> KEPT
    spread = high * 0x9E3779B1 & ((1 << KEPT) - 1)  # an odd factor: 0 stays 0, and no two products are equal
    return torch.Generator().manual_seed(low ^ spread)
