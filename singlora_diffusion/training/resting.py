"""What the steps do not call makes room for them: the autoencoder, and text encoders whose prompts are encoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..models import Family

ASIDE = "cpu"
"""Where they rest. With a T5 encoder that is about 10 GB more for the denoiser in training."""


class Resting:
    """The parts of a base model that leave its device while steps are done, and come back for previews.

    Args:
        text: whether the text encoders rest too: every prompt is encoded, and none of them is adapted.
    """

    def __init__(self, family: Family, text: bool) -> None:
        readers = [network.module for network in family.networks.values() if text and network.role == "text"]
        self.modules, self.device = [family.vae, *readers], family.device

    def begin(self) -> None:
        self._move(ASIDE)

    def end(self) -> None:
        self._move(self.device)

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """All parts are in their places inside: for images in the middle of a training."""
        self.end()
        try:
            yield
        finally:
            self.begin()

    def _move(self, where: torch.device | str) -> None:
        for module in self.modules:
            module.to(where)
