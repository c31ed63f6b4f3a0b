"""Vectors kept from run to run, known by what was embedded and by which encoder.

Neither file names nor dates count: an image is its pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from singlora_diffusion.files import write_bytes

Vectors = NDArray[np.float32]  # (N, D)
Thing = TypeVar("Thing")  # an image or a text


def image_key(image: Image.Image) -> str:
    """sha256 of an RGB image's size and pixels: what the store knows it by."""
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def text_key(text: str) -> str:
    """What the store knows a text by."""
    return "text-" + hashlib.sha256(text.encode()).hexdigest()


class VectorStore:
    """The vectors of one encoder by content key, in one safetensors file.

    The file is named by the encoder's fingerprint, replaced as a whole when saved, and may be deleted at any time.

    Args:
        folder: of the file; None: the vectors are kept in memory alone.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.path = None if folder is None else folder / f"{fingerprint[:16]}.safetensors"
        self._vectors: dict[str, Vectors] = {}
        self._changed = False
        if self.path is not None and os.path.isfile(self.path):
            from safetensors.numpy import load_file

            with contextlib.suppress(Exception):  # a damaged cache is an empty one
                stored = load_file(self.path)
                if len({(vector.shape, str(vector.dtype)) for vector in stored.values()}) == 1:
                    self._vectors = stored

    def vectors(
        self, keys: Sequence[str], things: Sequence[Thing], encode: Callable[[list[Thing]], Vectors]
    ) -> Vectors:
        """One row per key, (N, D). `encode` is given those things that are not yet known, each once."""
        unknown = {key: thing for key, thing in zip(keys, things, strict=True) if key not in self._vectors}
        if unknown:
            self._vectors.update(zip(unknown, encode(list(unknown.values())), strict=True))
            self._changed = True
        return np.stack([self._vectors[key] for key in keys])

    def save(self) -> None:
        """Write what is new, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        if not self._changed or self.path is None:
            return
        from safetensors.numpy import save

        write_bytes(self.path, save(self._vectors))
        self._changed = False
