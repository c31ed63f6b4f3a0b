"""What encoders made of images and prompts, kept in a folder from run to run, and known by its content alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import files
from ..terminal import escaped

Tensors = dict[str, Tensor]


class EncodingCache:
    """A folder of safetensors files, each written whole or not at all.

    Args:
        folder: is made where there is none. None: nothing is kept, everything is made anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.damaged = folder, list[Path]()
        """`damaged`: entries that could not be used and were made anew."""

    def get(self, kind: str, key: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """The entry with this key; where there is none, or a damaged one, what `make` gives, which is kept.

        Args:
            kind: how the file's name begins.
            key: JSON of everything that determines the tensors.
            make: gives contiguous tensors on the CPU.

        Raises:
            UserError: the entry cannot be written.
        """
        if self.folder is None:
            return make()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{kind}-{name}.safetensors"
        found = self._read(path)
        if found is None:
            found = make()
            files.write_bytes(path, save(found, {"sha256": _digest(found)}))
        return found

    def remarks(self) -> list[str]:
        """A line for each damaged entry; said once."""
        said, self.damaged = self.damaged, []
        return [f"{escaped(path, 1000)}: was damaged and has been made anew" for path in said]

    def _read(self, path: Path) -> Tensors | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                promised = (opened.metadata() or {}).get("sha256")
        except (SafetensorError, OSError):
            promised, found = None, {}
        if promised != _digest(found):
            self.damaged.append(path)
            return None
        return found


def _digest(tensors: Tensors) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()
