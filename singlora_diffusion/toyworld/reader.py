"""The attribute reader: class, background, main colour and pattern, read off a image; the oracle of toyworld."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reader(nn.Module):
    """A small residual network with one linear head per attribute.

    Args:
        sizes: number of values by attribute, {"class": 12, "background": 12, ...}.
    """

    def __init__(self, sizes: dict[str, int], width: int = 16) -> None:
        super().__init__()
        self.sizes = sizes
        widths = [width, 2 * width, 4 * width, 6 * width]
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            _Block(w_in, w_out) for w_in, w_out in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], size) for name, size in sizes.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits by attribute, (N, size), for images (N, 3, 64, 64) in [-1, 1]."""
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        x = x.mean(dim=(2, 3))
        return {name: head(x) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, pixels: Tensor) -> dict[str, Tensor]:
        """Indices by attribute, (N,) int64."""
        return {name: logits.argmax(dim=1) for name, logits in self(pixels).items()}


class _Block(nn.Module):
    def __init__(self, w_in: int, w_out: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, w_in), nn.GroupNorm(8, w_out)])
        self.convs = nn.ModuleList([nn.Conv2d(w_in, w_out, 3, padding=1), nn.Conv2d(w_out, w_out, 3, padding=1)])
        self.skip = nn.Conv2d(w_in, w_out, 1)
        self.down = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](nn.functional.silu(self.norms[0](x)))
        y = self.convs[1](nn.functional.silu(self.norms[1](y)))
        return self.down(y + self.skip(x))
