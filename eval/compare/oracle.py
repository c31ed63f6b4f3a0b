"""On toyworld the truth is known: a network that reads class, colour, pattern and place says what an image shows."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from singlora_diffusion.data.images import open_image
from singlora_diffusion.sampling.manifest import MANIFEST, read_manifest

from ..metrics import Metric, mean_over_prompts


def _row(label: str, description: str) -> Metric:
    return Metric(label, description, "reader", (), "image", np.equal, unit="share")


ROWS = {
    "right_class": _row("Class right", "share of images whose class is read as the subject's"),
    "right_colour": _row("Colour right", "share of images whose main colour is read as the subject's"),
    "right_pattern": _row("Pattern right", "share of images whose pattern is read as the subject's"),
    "right_place": _row("Place right", "share of images whose place is read as the prompt's"),
}
"""As rows of `eval.metrics.METRICS`, of readings instead of vectors."""


def scores(folder: Path, subject: str) -> dict[str, float]:
    """Read the images in a folder with a manifest.

    Args:
        subject: one of toyworld's; the images are of it, in the places that their prompts name.

    Returns:
        A number in [0, 1] for each of `ROWS`; places count in prompts that name one, and are left out without any.
    """
    from singlora_diffusion.toyworld import subjects, world

    who = subjects.subject(subject).identity
    lines = read_manifest(folder / MANIFEST)
    read = _read([folder / name for name in lines])
    truth = {
        "class": world.CLASSES.index(who.cls),
        "colour": world.COLOURS.index(who.colour),
        "pattern": world.PATTERNS.index(who.pattern),
    }
    prompts = [str(line.get("prompt", "")) for line in lines.values()]
    found = {
        f"right_{name}": mean_over_prompts((read[name] == value).astype(np.float64), prompts)
        for name, value in truth.items()
    }
    places = [_place(prompt, world.PLACES) for prompt in prompts]
    named = [i for i, place in enumerate(places) if place is not None]
    if named:
        right = [float(world.BACKGROUNDS[read["background"][i]] == places[i]) for i in named]
        found["right_place"] = mean_over_prompts(np.array(right), [prompts[i] for i in named])
    return found


def _place(prompt: str, places: dict[str, tuple[str, ...]]) -> str | None:
    """The place with the longest wording that a prompt ends with."""
    worded = [(words, name) for name, all_words in places.items() for words in all_words]
    fitting = [(len(words), name) for words, name in worded if prompt.endswith(words)]
    return max(fitting)[1] if fitting else None


@cache
def _reader() -> Any:
    from singlora_diffusion.toyworld import figures

    return figures.load_reader()


def _read(paths: list[Path]) -> dict[str, np.ndarray]:
    """Attribute -> (N,) indices. Images of another size than toyworld's are resized to it."""
    from singlora_diffusion.toyworld import architecture, autoencoding

    side = architecture.RESOLUTION
    images = np.stack([np.asarray(open_image(path).resize((side, side))) for path in paths])
    return {name: values.numpy() for name, values in _reader().read(autoencoding.tensor(images)).items()}
