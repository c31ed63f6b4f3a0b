"""Frozen encoders: images or texts -> unit vectors. `encoder_table` says which there are.

An encoder is a pair of plain functions, `images(list[PIL.Image]) -> (N, D)` and `texts(list[str]) -> (N, D)`, float32
rows of unit length. It is loaded when first called, so a run that finds all its vectors in the store loads none.

Nothing is fetched but `dreambooth-v1`'s own weights and hub names that the user gave, and nothing stands in for what is
missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from singlora_diffusion import device as devices
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import sha256
from singlora_diffusion.terminal import escaped

from .encoder_models import Model
from .encoder_table import ENCODERS, PROTOCOLS
from .preprocessing import Preprocessing

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder. `about` holds all that changes a vector, and nothing else."""

    images: Callable[[list[Image.Image]], Vectors]
    texts: Callable[[list[str]], Vectors] | None
    preprocessing: Preprocessing
    about: dict[str, Any]
    source: str  # where the weights were found

    @property
    def fingerprint(self) -> str:
        """sha256 of `about`: two encoders with the same one give the same vectors."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()


def encoder(
    protocol: str, role: str, source: str | None = None, *, device: str | None = "cpu", batch_size: int = 32
) -> Encoder:
    """The encoder of a protocol for a role. Finds and hashes its files; nothing is loaded yet.

    Args:
        protocol: a row of `PROTOCOLS`.
        role: one of `ROLES`.
        source: a local path or a hub name, instead of where the protocol looks by itself.
        device: as `singlora_diffusion.device.choose` takes it; asked for when the encoder is loaded.
        batch_size: images or texts per forward pass; changes no vector beyond rounding.

    Raises:
        UserError: files that are missing or fit no encoder; it names them and where to get them.
    """
    chosen = PROTOCOLS[protocol]
    row = next(row for row in map(ENCODERS.__getitem__, chosen.encoders) if row.role == role)
    found = row.files.find(source or chosen.sources.get(role), role)
    about = {
        "architecture": found.architecture,
        "files": {name: sha256(path) for name, path in found.hashed.items()},
        "preprocessing": asdict(found.preprocessing),
    }

    where = functools.cache(lambda: devices.choose(device))  # imports torch

    @functools.cache
    def model() -> Model:
        try:
            return row.load(found.path, found.architecture, where())
        except (MemoryError, UserError):
            raise
        except Exception as error:  # the libraries raise many kinds on files that fit no model
            why = escaped(" ".join(str(error).split()), 200)
            raise UserError(f"{found.path}: cannot be loaded as {escaped(found.architecture)} ({why})") from error

    def images(batch: list[Image.Image]) -> Vectors:
        import torch

        def tensors() -> Iterator[Any]:
            for part in _batches(batch, batch_size):
                inputs = np.stack([found.preprocessing(image) for image in part])
                yield torch.from_numpy(inputs).to(where())

        return _unit_vectors(model().images, tensors())

    def texts(lines: list[str]) -> Vectors:
        encode = model().texts
        assert encode is not None  # reads_texts says so
        return _unit_vectors(encode, _batches(lines, batch_size))

    return Encoder(images, texts if row.reads_texts else None, found.preprocessing, about, str(found.path))


def _unit_vectors(encode: Callable[[Any], Any], batches: Iterable[Any]) -> Vectors:
    import torch

    with torch.inference_mode(), _exact_float32():
        parts = [torch.nn.functional.normalize(encode(batch).float(), dim=-1).cpu().numpy() for batch in batches]
    vectors: Vectors = np.concatenate(parts)
    if not np.isfinite(vectors).all():
        raise UserError("an encoder gives vectors that are not numbers; its weights are damaged")
    return vectors


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Convolutions on a GPU round to 10 bits by default, which moves the fourth decimal of a score."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
