"""Vectors kept from run to run, known by what was embedded and by which encoder.

Neither file names nor dates count: a picture is its pixels.
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

Vectors = NDArray[np.float32]  # (N, D)
Thing = TypeVar("Thing")  # a picture or a text


def picture_key(picture: Image.Image) -> str:
    """sha256 of an RGB picture's size and pixels: what the store knows it by."""
    digest = hashlib.sha256(repr(picture.size).encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def text_key(text: str) -> str:
    """What the store knows a text by."""
    return "text-" + hashlib.sha256(text.encode()).hexdigest()


class VectorStore:
    """The vectors of one encoder by content key, in one safetensors file.

    The file is named by the encoder's fingerprint, replaced as a whole when saved, and may be deleted at any time.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        """With None for a folder, vectors are remembered for as long as the store lives."""
        self.path = None if folder is None else folder / f"{fingerprint[:16]}.safetensors"
        self._vectors: dict[str, Vectors] = {}
        self._changed = False
        if self.path is not None and self.path.is_file():
            from safetensors.numpy import load_file

            with contextlib.suppress(Exception):  # a damaged cache is an empty one
                self._vectors = load_file(self.path)

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
        """Writes what is new, atomically."""
        if self.path is None or not self._changed:
            return
        from safetensors.numpy import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(self._vectors, part)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        self._changed = False
