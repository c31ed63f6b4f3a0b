"""best/: the adapter as it was at the best step, by a rule that is written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import files, formats
from ..adapters import Adapter
from ..errors import UserError
from . import run_folder


class Rule(NamedTuple):
    """How two validations are compared."""

    words: str
    value: Callable[[Mapping[str, float]], float]
    """Of a validation's figures; the larger the better."""


RULES = {
    "loss": Rule(
        "lowest loss on held-out images; of equal ones the first", lambda figures: -figures["validation_loss"]
    ),
    "scores": Rule(
        "largest product of DINO and CLIP-T, each at least 0; of equal ones the first",
        lambda figures: max(figures["dino"], 0.0) * max(figures["clip_t"], 0.0),
    ),
}
"""By the values of --validate. The product is what a comparison chooses learning rates by."""


class Kept(NamedTuple):
    """What is in the folder."""

    step: int
    figures: Mapping[str, float]
    """Of the validation after that step."""
    rule: str
    """What it was chosen by, in words."""


def find(out: Path, rule: Rule | None = None) -> Kept | None:
    """None: nothing is there that can be used, or it was chosen by another rule than the given one."""
    folder = out / run_folder.BEST
    try:
        said, header = files.read_json(folder / run_folder.VALIDATION), formats.read_header(folder / run_folder.ADAPTER)
        step, words = said.pop("step"), said.pop("rule")
        by = next(one for one in RULES.values() if one.words == words)
        sound = step == header.step and rule in (None, by) and math.isfinite(by.value(said))
    except (UserError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    return Kept(step, said, words) if sound else None


def is_better(figures: Mapping[str, float], kept: Kept | None, rule: Rule) -> bool:
    """Whether the adapter with these figures is to be kept in place of the one that is."""
    value = rule.value(figures)
    return math.isfinite(value) and (kept is None or value > rule.value(kept.figures))


def save(out: Path, adapter: Adapter, kept: Kept, header: Mapping[str, Any]) -> Path:
    """Write the adapter, then of which step it is: torn apart, they are taken for nothing.

    Raises:
        UserError: they cannot be written.
    """
    folder = out / run_folder.BEST
    folder.mkdir(exist_ok=True)
    formats.save(adapter, folder / run_folder.ADAPTER, about={**header, "step": kept.step})
    files.write_json(folder / run_folder.VALIDATION, {"step": kept.step, **kept.figures, "rule": kept.rule})
    return folder / run_folder.ADAPTER
