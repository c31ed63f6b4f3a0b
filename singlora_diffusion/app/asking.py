"""What the pages ask for, as settings of the commands, from what stands in their fields. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from .. import files, formats, models, settings
from ..data.prompts import split_instance_prompt
from ..errors import UserError
from ..formats import forms
from ..sampling import sources
from ..sampling.settings import GenerateSettings
from ..terminal import escaped
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
NUMBERS = ("num_inference_steps", "guidance_scale", "width", "height")
"""Settings of the page that makes images which stand there as text; empty for the model's own."""
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
            "rank": str(int(rank or 0)),
            "max_train_steps": str(int(steps or 0)),
            "learning_rate": rate,
            "identifier": _unusual(identifier, class_noun),
        },
        {"instance_data_dir": images, "instance_prompt": prompt_of(identifier, class_noun), "output_dir": out},
    )
    for setting, value in settings.changed(wanted).items():
        if isinstance(value, Path):
            places.inside(value, f"--{setting}")
    if wanted.model.pretrained_vae_model_name_or_path is not None:
        places.base(wanted.model.pretrained_vae_model_name_or_path, "--pretrained_vae_model_name_or_path")
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
    beside, seeds, base, negative, *numbers, sampler = rest[2 * SLOTS :]
    used = [
        (places.inside(path, f"Adapter {n + 1}"), 1.0 if scale is None else float(scale))
        for n, (path, scale) in enumerate(zip(adapters, strengths, strict=True))
        if path
    ]
    texts = {name: (text or "").strip() for name, text in zip(NUMBERS, numbers, strict=True)}
    typed, lines = settings.typed(GenerateSettings, {name: text for name, text in texts.items() if text})
    if lines:
        raise UserError(*lines)
    shared = {
        "prompt": (prompt.strip(),) if (prompt or "").strip() else (),
        "seeds": (seeds or "").strip(),
        "negative_prompt": negative,
        "scheduler": sampler,
        **typed,
    }
    model = places.base(base) if (base or "").strip() else None
    one = _settings(places, shared, used, model)
    if not beside:
        return one, None
    if beside == BASE:
        return one, _settings(places, shared, [], model or _base_of(used))
    return one, _settings(places, shared, [(places.inside(beside, "Compare with"), 1.0)], model)


def restored(places: Places, image: Path) -> tuple[list[Any], list[str]]:
    """What is to stand in the fields to make an image once more, and a line for each thing that may differ.

    Returns:
        Values as `images` takes them, but for what the image is compared with: None.

    Raises:
        UserError: it does not say how it was made.
    """
    found = making.restored(image)
    paths, lines = list[str | None](), list[str]()
    hashes = [*found["adapter_sha256"], *[None] * len(found["adapter"])]
    for named, sha256 in zip(found["adapter"], hashes, strict=False):
        path = _known(places, named)
        paths.append(None if path is None else str(path))
        if path is None or len(paths) > SLOTS:
            why = f"more than {SLOTS} adapters" if path else "not in the folders of this page"
            lines.append(f"{escaped(named, 1000)}: {why}; the rest is restored")
        elif sha256 is not None and files.sha256(making.file_of(path)) != sha256:
            lines.append(f"{escaped(places.shown(path), 1000)}: has been trained anew, or is another of that name")
    used = [*paths, *[None] * SLOTS][:SLOTS]
    numbers = ["" if found[name] is None else f"{found[name]:g}" for name in NUMBERS]
    values = [
        found["prompt"],
        *used,
        *[*found["scale"], *[1.0] * SLOTS][:SLOTS],
        None,
        found["seeds"],
        "" if any(used) else found["pretrained_model_name_or_path"] or "",
        found["negative_prompt"],
        *numbers,
        found["scheduler"] or "",
    ]
    return values, lines


def _known(places: Places, named: str) -> Path | None:
    """The adapter in the page's folders that an image names: where it was, or else the youngest that is called so."""
    wanted = Path(named).parts[: -1 if Path(named).name == run_folder.ADAPTER else None]

    def alike(path: Path) -> int:
        """Names from the end that are the same."""
        pairs = zip(reversed(path.parts), reversed(wanted), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    best = max(places.adapter_files(), key=alike, default=None)
    part_of_run = wanted[-1:] == (run_folder.BEST,) or run_folder.CHECKPOINT.fullmatch("".join(wanted[-1:]))
    needed = 2 if part_of_run else 1  # whose best step it is, its own name does not say
    return best if best is not None and alike(best) >= needed else None


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
