"""What a prompt asks for: another place, something on the subject, or another subject; and scores by it.

Likeness ought to fall where a prompt changes the subject itself, so one mean over all prompts hides what happens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import mean_over_prompts

KINDS = {
    "place": "the subject somewhere",
    "accessory": "the subject wearing something",
    "property": "the subject changed: its colour, its material, its shape",
}
_PLAIN = re.compile(r"(?:an?|the|photo|image|picture|of|\s)*", re.IGNORECASE)
_WORN = re.compile(r"\b(?:wearing|dressed|outfit|costume)\b", re.IGNORECASE)


def kind(template: str) -> str:
    """The kind of a prompt, by its words: those around the subject's name describe it, those behind it its place.

    Args:
        template: with {token} and {class}, as "a red {token} {class}".
    """
    before, _, after = template.partition("{class}")
    if not _PLAIN.fullmatch(before.replace("{token}", " ")):
        return "property"
    return "accessory" if _WORN.search(after) else "place"


def by_kind(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Kind -> metric -> mean over its prompts; empty where the templates are not known, or are of one kind.

    Args:
        rows: of the images, as scores.json has them.
        metrics: those with a number for each image.
    """
    rows = list(rows)
    if not rows or not all(isinstance(row.get("template"), str) for row in rows):
        return {}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(kind(row["template"]), []).append(row)
    if len(groups) < 2:
        return {}
    return {
        name: {
            metric: mean_over_prompts(np.array([row[metric] for row in group]), [row["template"] for row in group])
            for metric in metrics
        }
        for name, group in sorted(groups.items(), key=lambda item: list(KINDS).index(item[0]))
    }
