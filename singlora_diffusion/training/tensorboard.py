"""TensorBoard: a listener that draws curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .events import Event, Started, Step

CURVES = ("loss", "lr", "u", "grad_norm")


class TensorBoard:
    """Curves over the steps, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=event.step + 1)
        elif isinstance(event, Step):
            for name in CURVES:
                self.writer.add_scalar(name, getattr(event, name), event.step)

    def close(self) -> None:
        """Write what is buffered."""
        if self.writer is not None:
            self.writer.close()
