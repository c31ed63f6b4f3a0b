"""README.md of a run folder: what the adapter is and how it is used, as the hub shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..adapters.methods import METHODS
from . import best, run_folder
from .events import in_words
from .recipe import Recipe

if TYPE_CHECKING:
    from ..models import Family

SETTINGS = (
    "method rank alpha targets text_targets max_train_steps train_batch_size gradient_accumulation_steps learning_rate "
    "text_encoder_lr lr_scheduler snr_gamma with_prior_preservation mixed_precision quantize seed"
)
"""Those that say how the adapter came about; none is a path of this machine."""


def write(recipe: Recipe, family: Family, about: dict[str, Any], readers: str | None) -> Path:
    """Write the card of a finished run.

    Args:
        about: as in the header of the adapter's file.
        readers: the programs that read the exported LoRA; None: there is none.

    Raises:
        UserError: it cannot be written.
    """
    path = recipe.output.output_dir / run_folder.CARD
    files.write_text(path, "\n".join(_lines(recipe, family, about, readers)) + "\n")
    return path


def _lines(recipe: Recipe, family: Family, about: dict[str, Any], readers: str | None) -> Iterator[str]:
    import yaml

    out, prompt = recipe.output.output_dir, about["instance_prompt"]
    previews = sorted((out / run_folder.PREVIEWS).glob("step-*.png"))
    base = Path(family.source).name if Path(family.source).exists() else family.source
    trigger = " ".join(word for word in (about["identifier"], about["class_noun"]) if word)
    head = {
        "base_model": base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "singlora", *(["lora"] if readers else [])],
        "instance_prompt": prompt,
    }
    yield f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"
    yield f"{run_folder.CARD_MARK}\n"
    yield f"# {_plain(trigger or prompt)}\n"
    learned = f"learned from {about['images']} images at {about['resolution']} pixels"
    yield f"{METHODS[recipe.adapter.method].label} of **{_plain(base)}** for one subject, {learned}.\n"
    yield f"Trigger words: `{_plain(trigger or prompt)}`, as in `{_plain(prompt)}`.\n"
    if previews:
        newest = previews[-1].relative_to(out)
        shown = recipe.validation.validation_prompt or prompt
        yield f"![{_plain(shown)}]({newest.as_posix()})\n"
    yield "## Use it\n"
    if readers:
        yield from _in_diffusers(family, base, prompt)
        yield f"`{run_folder.LORA}` is an ordinary LoRA, read by {readers}.\n"
    if "ComfyUI" in (readers or ""):
        yield "In ComfyUI it goes into `models/loras`.\n"
    yield f"This program: `singlora generate --adapter {run_folder.ADAPTER} --prompt {json.dumps(_plain(prompt))}`.\n"
    yield "## Training\n"
    if (kept := best.find(out)) is not None:
        step = f"step {kept.step} of {recipe.optimization.max_train_steps}"
        yield f"Best in validation: {step}, {in_words(kept.figures)} ({kept.rule}).\n"
    yield "| setting | value |\n|---|---|"
    settings = {**about["recipe"], "family": family.name}
    for name in ("family", *SETTINGS.split()):
        if settings[name] not in (None, []) and settings[name] is not False:
            yield f"| {name} | {_plain(settings[name])} |"


def _in_diffusers(family: Family, base: str, prompt: str) -> Iterator[str]:
    kind, load = "DiffusionPipeline", "from_pretrained"
    if Path(family.source).is_file():
        kind, load = type(family.pipeline()).__name__, "from_single_file"
    yield f"""```python
import torch
from diffusers import {kind}

pipeline = {kind}.{load}({json.dumps(base)}, torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("THIS FOLDER", weight_name="{run_folder.LORA}")
image = pipeline({json.dumps(prompt)}).images[0]
```
"""


def _plain(value: Any) -> str:
    """In one line of Markdown that shows it as it is."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "".join(c if c.isprintable() and c not in "`|[]<>*" else " " for c in text)
