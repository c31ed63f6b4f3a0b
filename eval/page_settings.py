"""How images on a page were made and scored: generation, recipes, encoders, as rows of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .encoder_table import ROLES
from .results import ScoredImage, ScoredSet
from .score_file import Result

SAMPLING_LABELS = {
    "base_model": "base model",
    "adapter": "adapter",
    "identifier": "identifier",
    "class_noun": "class noun",
    "steps": "sampling steps",
    "guidance_scale": "guidance scale",
    "scheduler": "scheduler",
    "negative_prompt": "negative prompt",
    "scale": "adapter scale",
    "dtype": "dtype",
    "width": "width",
    "height": "height",
    "seed": "seeds",
}


def sampling(generated: Sequence[ScoredSet]) -> list[tuple[str, list[str]]]:
    """How the images were made: (setting, one text per set)."""
    rows = [(label, [_seen(one.images, key) for one in generated]) for key, label in SAMPLING_LABELS.items()]
    return [(label, texts) for label, texts in rows if any(texts)]


def _seen(images: Sequence[ScoredImage], key: str) -> str:
    values = [image.about[key] for image in images if image.about.get(key) is not None]
    return ", ".join(dict.fromkeys(map(plain, values)))


def recipes(generated: Sequence[ScoredSet]) -> dict[str, Any]:
    """Training settings: those that differ, (setting, one text per set), and those that do not, (setting, text)."""
    trained = [one for one in generated if one.recipe]
    keys = dict.fromkeys(key for one in trained for key in one.recipe)
    rows = [(key, [plain(one.recipe.get(key)) for one in trained]) for key in keys]
    return {
        "names": [one.name for one in trained],
        "differ": [(key, texts) for key, texts in rows if len(set(texts)) > 1],
        "same": [(key, texts[0]) for key, texts in rows if len(set(texts)) == 1],
    }


def encoders(results: Iterable[Result]) -> list[str]:
    """A line per encoder behind the scores."""
    lines: dict[str, None] = {}
    for result in results:
        for role, made in result.encoders.items():
            way = {key: made.preprocessing.get(key, "?") for key in ("resize", "interpolation", "crop")}
            sized = (
                f"shorter side to {way['resize']}, {way['interpolation']}, centre {way['crop']} x {way['crop']} pixels"
            )
            files = ", ".join(f"{file} {digest[:12]}" for file, digest in made.files.items())
            name = f"{ROLES.get(role, role)}, protocol {result.protocol}: {made.architecture}"
            lines[f"{name}; {sized}; sha256: {files}"] = None
    return list(lines)


def plain(value: Any) -> str:
    """A setting's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(plain, value)) or "none"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
