"""What a worker loads once, however many cells it runs: base model, encoders, vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from singlora_diffusion import device as devices

from ..encoders import Encoder, encoder
from ..vector_store import VectorStore
from .settings import TrainingSettings

if TYPE_CHECKING:
    from singlora_diffusion.models import Family


@dataclass(frozen=True)
class Tools:
    """What cells are run with."""

    family: Family
    device: str


@cache
def tools(training: TrainingSettings) -> Tools:
    """Of the process that asks; loaded when first asked for."""
    from singlora_diffusion import models

    where = devices.choose(training.device)
    dtype = devices.compute_dtype(where, {"no": "float32", "bf16": "bfloat16"}[training.mixed_precision])
    family = models.load(training.pretrained_model_name_or_path, dtype, where)
    return Tools(family, where)


@cache
def open_encoder(protocol: str, role: str, source: str | None, **options: Any) -> Encoder:
    """`eval.encoders.encoder`, once."""
    return encoder(protocol, role, source, **options)


def open_store(folder: Path, fingerprint: str) -> VectorStore:
    """Vectors in memory, one store for all cells of a worker, so that references and gallery are embedded once."""
    return _store(fingerprint)


@cache
def _store(fingerprint: str) -> VectorStore:
    return VectorStore(None, fingerprint)
