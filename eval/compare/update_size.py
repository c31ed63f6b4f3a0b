"""How far a training moved the weights: what a learning rate does, told in the same words for every method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from singlora_diffusion.adapters import Adapter
    from singlora_diffusion.models.network import Networks


@dataclass(frozen=True)
class Update:
    """Medians over the adapted layers, of Frobenius norms, relative to ||W0||.

    The two are one where an adapter begins at W0. SingLoRA's paper has it begin at W0 + A A^T of a random A, which the
    ramp brings in: that is a change, but nothing that was learned.
    """

    size: float
    """||W' - W0||."""
    learned: float
    """||W' - W_start||, with W_start what the adapter begins at, without its ramp."""


def update_size(adapter: Path, networks: Networks, seed: int) -> Update:
    """Of an adapter's file or run folder.

    Args:
        networks: those it was trained in; they stay as they are.
        seed: of its training.

    Raises:
        UserError: the file cannot be read, or is for another model.
    """
    import torch

    from singlora_diffusion import adapters, formats

    fresh = adapters.attach(networks, formats.read_header(adapter).config, seed)
    fresh.set_ramp(1.0)
    start = _taken(fresh)
    trained = formats.load(adapter, networks)
    norms = {name: float(torch.linalg.norm(base.weight.float())) for name, base in trained.layers().items()}
    end = _taken(trained)
    known = {name: size for name, size in norms.items() if size}

    def median(changes: dict[str, Tensor]) -> float:
        return float(np.median([float(torch.linalg.norm(changes[name])) / size for name, size in known.items()]))

    return Update(median(end), median({name: change - start[name] for name, change in end.items()}))


def _taken(adapter: Adapter) -> dict[str, Tensor]:
    """W' - W0 by layer; the adapter is detached."""
    try:
        return dict(adapter.delta_weights())
    finally:
        adapter.detach()
