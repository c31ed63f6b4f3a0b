"""best/: the adapter as it was at the step with the lowest loss on held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import files, formats
from ..adapters import Adapter
from ..errors import UserError
from . import run_folder

RULE = "lowest loss on held-out images; of equal ones the first"


class Kept(NamedTuple):
    """What is in the folder."""

    step: int
    loss: float


def find(out: Path) -> Kept | None:
    """None: nothing is there that can be used."""
    folder = out / run_folder.BEST
    try:
        said, header = files.read_json(folder / run_folder.VALIDATION), formats.read_header(folder / run_folder.ADAPTER)
        kept = Kept(said["step"], said["validation_loss"])
    except (UserError, KeyError, TypeError):
        return None
    sound = kept.step == header.step and isinstance(kept.loss, float) and math.isfinite(kept.loss)
    return kept if sound else None


def save(out: Path, adapter: Adapter, kept: Kept, header: Mapping[str, Any]) -> Path:
    """Write the adapter, then of which step it is: torn apart, they are taken for nothing.

    Raises:
        UserError: they cannot be written.
    """
    folder = out / run_folder.BEST
    folder.mkdir(exist_ok=True)
    formats.save(adapter, folder / run_folder.ADAPTER, about={**header, "step": kept.step})
    said = {"step": kept.step, "validation_loss": kept.loss, "rule": RULE}
    files.write_json(folder / run_folder.VALIDATION, said)
    return folder / run_folder.ADAPTER
