"""What the pages ask for, as settings of the commands, from what stands in their fields. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import formats, models, settings
from ..data.prompts import split_instance_prompt
from ..errors import UserError
from ..formats import forms
from ..sampling import sources
from ..sampling.settings import GenerateSettings
from ..training import config_file, run_folder
from ..training import recipe as recipes
from ..training.recipe import Recipe
from . import fields, making
from .places import Places

MAIN = ("pretrained_model_name_or_path", "method", "rank", "max_train_steps", "learning_rate")
"""Settings of the training page that have a place of their own."""
OWN = (*MAIN, "instance_prompt", "identifier", "output_dir", "resume_from_checkpoint", "overwrite")
SLOTS = 3
"""Adapters at once."""
NOTHING, BASE = "", "base"
"""What may stand beside the images instead of an adapter."""


def prompt_of(identifier: str | None, class_noun: str | None) -> str:
    """The instance prompt.

    Raises:
        UserError: a word is missing.
    """
    for word, what in ((identifier, "the rare word"), (class_noun, "what the subject is")):
        if not (word or "").strip():
            raise UserError(f"Subject: write {what}")
    return f"a photo of {str(identifier).strip()} {str(class_noun).strip()}"


def training(places: Places, advanced: Sequence[str], given: Sequence[Any]) -> Recipe:
    """The recipe that the page asks for.

    Args:
        advanced: names of the settings that the form ends with.
        given: folder, identifier and class noun, the page's own fields, and the advanced ones.

    Raises:
        UserError: as the command line would.
    """
    folder, identifier, class_noun, name, base, method, rank, steps, rate = given[:9]
    images = places.inside(folder, "Subject: images")
    out = places.new(places.root, (name or "").strip() or images.name, "Name of the run")
    wanted = fields.read(
        Recipe,
        {
            **dict(zip(advanced, given[9:], strict=True)),
            "pretrained_model_name_or_path": places.base(base),
            "method": method,
            "rank": f"{rank:g}",
            "max_train_steps": f"{steps or 0:g}",
            "learning_rate": rate,
            "identifier": _unusual(identifier, class_noun),
        },
        {"instance_data_dir": images, "instance_prompt": prompt_of(identifier, class_noun), "output_dir": out},
    )
    for setting, value in settings.changed(wanted).items():
        if isinstance(value, Path):
            places.inside(value, f"--{setting}")
    recipes.check(wanted)
    return wanted


def _unusual(identifier: str, class_noun: str) -> str | None:
    """The identifier, if the trainer would not find it by itself."""
    try:
        if split_instance_prompt(prompt_of(identifier, class_noun)).identifier == identifier.strip():
            return None
    except UserError:
        pass
    return identifier.strip()


def continuation(places: Places, run: Path) -> Recipe:
    """How a run that was stopped or broken off goes on: from its last checkpoint, or from its beginning.

    Raises:
        UserError: it says nothing of how it was begun.
    """
    found, _ = config_file.read(run / run_folder.RECIPE)
    resume = "latest" if run_folder.checkpoints(run) else None
    return settings.build(Recipe, **{**found, "output_dir": run, "resume_from_checkpoint": resume})


def images(places: Places, held: Sequence[Any]) -> tuple[GenerateSettings, GenerateSettings | None]:
    """What the page asks for: the images, and those to compare them with.

    Raises:
        UserError: as the command line would.
    """
    prompt, rest = held[0], held[1:]
    adapters, strengths = rest[:SLOTS], rest[SLOTS : 2 * SLOTS]
    beside, seeds, base, negative, steps, guidance, sampler = rest[2 * SLOTS :]
    used = [
        (places.inside(path, f"Adapter {n + 1}"), float(scale))
        for n, (path, scale) in enumerate(zip(adapters, strengths, strict=True))
        if path
    ]
    numbers, lines = settings.typed(
        GenerateSettings,
        {
            name: text.strip()
            for name, text in (("num_inference_steps", steps or ""), ("guidance_scale", guidance or ""))
            if text.strip()
        },
    )
    if lines:
        raise UserError(*lines)
    shared = {
        "prompt": (prompt.strip(),) if (prompt or "").strip() else (),
        "seeds": (seeds or "").strip(),
        "negative_prompt": negative,
        "scheduler": sampler,
        **numbers,
    }
    model = places.base(base) if (base or "").strip() else None
    one = _settings(places, shared, used, model)
    if not beside:
        return one, None
    if beside == BASE:
        return one, _settings(places, shared, [], model or _base_of(used))
    return one, _settings(places, shared, [(places.inside(beside, "Compare with"), 1.0)], model)


def _settings(
    places: Places, shared: dict[str, Any], used: Sequence[tuple[Path, float]], model: str | None
) -> GenerateSettings:
    scales = tuple(scale for _, scale in used)
    return making.wanted(
        places.galleries,
        {
            **shared,
            "adapter": tuple(path for path, _ in used),
            "scale": scales if set(scales) - {1.0} else (),
            "pretrained_model_name_or_path": model,
        },
    )


def _base_of(used: Sequence[tuple[Path, float]]) -> str | None:
    found = [sources.read_adapter(path) for path, _ in used]
    return sources.base_model(None, found) if found else None


def form_for(program: str, adapter: Path) -> str:
    """The form of file that a program reads, for the adapter's base model.

    Raises:
        UserError: it reads none of them.
    """
    header = formats.read_header(adapter)
    table = forms.of(models.meta_networks(header.base_model or "toyworld"))
    found = next((name for name, form in table.items() if program in form.readers.split(", ")), None)
    if found is None:
        readers = sorted({one for form in table.values() for one in form.readers.split(", ")})
        raise UserError(f"{program} reads no LoRA for this base model; these do: {', '.join(readers)}")
    return found
