"""The denoiser's blocks compiled for training, one class of blocks at a time, and as they were for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UserError

BACKENDS = {"cuda": "inductor"}
"""By the type of device: where it pays. On processors it does not, beside the layers of `models.cpu_layers`."""


class Compiled:
    """Compiles the blocks that a network repeats: equal blocks share their code, so it takes seconds, not minutes.

    Each is one graph: a break in it is an error, not a slow step.

    Raises:
        UserError: compiling does not pay on this device, or the network names no blocks.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        if device.type not in BACKENDS:
            raise UserError(f"--compile: pays on {', '.join(BACKENDS)} only, and this is {device.type}: leave it out")
        self.backend = BACKENDS[device.type]
        named: Any = network
        names = {*(getattr(named, "_repeated_blocks", None) or named._no_split_modules or ())}
        self.blocks = [module for module in network.modules() if type(module).__name__ in names]
        if not self.blocks:
            raise UserError(f"--compile: {type(network).__name__} names no blocks to compile: leave it out")

        self.forms: list[Any] = []

    def begin(self) -> None:
        if not self.forms:
            for block in self.blocks:
                block.compile(fullgraph=True, backend=self.backend)
            self.forms = [block._compiled_call_impl for block in self.blocks]
        for block, form in zip(self.blocks, self.forms, strict=True):
            block._compiled_call_impl = form

    def end(self) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        self.end()
        try:
            yield
        finally:
            self.begin()
