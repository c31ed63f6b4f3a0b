"""What is to be made: a record for each prompt and seed, with all that determines the image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..data import prompts
from ..data.prompts import Prompt
from ..errors import UserError
from ..terminal import escaped, note
from .manifest import Record
from .settings import MOST_IMAGES, GenerateSettings, PromptSettings, parse_seeds, scales

if TYPE_CHECKING:
    from ..formats import Header
    from ..models import Family
    from .sources import AdapterSource

OF_THE_RUN = (
    "adapter_sha256",
    "scale",
    "merged",
    "base_hash",
    "vae_hash",
    "dtype",
    "steps",
    "guidance_scale",
    "scheduler",
    "negative_prompt",
    "height",
    "width",
)
"""What all images of a folder share."""
OF_THE_IMAGE = ("prompt", "seed", *OF_THE_RUN)
"""What determines an image."""


def plan(wanted: GenerateSettings, family: Family, adapters: Sequence[AdapterSource]) -> list[Record]:
    """The records of prompts x seeds, prompt by prompt.

    Raises:
        UserError: a setting that the family cannot do, no prompts, nothing to fill into them, or too many images.
    """
    seeds = parse_seeds(wanted.sampling.seeds)
    identifier, class_noun = _subject(wanted.prompting, adapters[0].header if adapters else None)
    chosen = _prompts(wanted.prompting, family, identifier, class_noun)
    if len(chosen) * len(seeds) > MOST_IMAGES:
        raise UserError(
            f"{len(chosen)} prompts x {len(seeds):,} seeds are more than {MOST_IMAGES:,} images: give fewer --seeds"
        )
    shared = _shared(wanted, family, adapters)
    return [
        {
            "file": f"{one.index:03d}-{seed}.png",
            "prompt": one.text(identifier or "", class_noun or ""),
            "prompt_without_token": one.without_token(class_noun or ""),
            "template": one.template,
            "prompt_index": one.index,
            "seed": seed,
            "identifier": identifier,
            "class_noun": class_noun,
            **shared,
        }
        for one in chosen
        for seed in seeds
    ]


def note_cut_prompts(family: Family, records: Sequence[Record]) -> None:
    """Say so when the model cuts off the ends of prompts."""
    texts = list(dict.fromkeys(record["prompt"] for record in records))
    overflows = {text: count for text in texts if (count := family.prompt_overflow(text))}
    if overflows:
        text, count = next(iter(overflows.items()))
        note(
            f"{len(overflows)} of {len(texts)} prompts are too long for {escaped(family.source)} and are cut, this one "
            f'by {count} tokens: "{escaped(text)}"'
        )


def _shared(wanted: GenerateSettings, family: Family, adapters: Sequence[AdapterSource]) -> Record:
    """Of every record of the run."""
    from ..models.family import check_sides

    sampling = wanted.sampling
    steps = sampling.num_inference_steps or family.steps
    limit = _most_steps(family)
    if steps > limit:
        raise UserError(f"--num_inference_steps {steps}: {escaped(family.source)} can take at most {limit} steps")
    if sampling.scheduler is not None and sampling.scheduler not in family.schedulers:
        known = ", ".join(family.schedulers)
        raise UserError(f"--scheduler {escaped(sampling.scheduler)}: {escaped(family.source)} can take {known}")
    height, width = check_sides(family, sampling.height, sampling.width, ("--height", "--width"))
    return {
        "adapter": _joined([os.fsencode(one.named).decode(errors="replace") for one in adapters]),
        "adapter_sha256": _joined([one.sha256 for one in adapters]),
        "scale": _joined(scales(wanted.adapters)),
        "merged": wanted.adapters.merge if adapters else None,
        "base_model": family.source,
        "base_hash": family.fingerprint,
        "vae": family.vae_source,
        "vae_hash": family.vae_fingerprint if family.vae_source else None,
        "dtype": str(family.dtype).removeprefix("torch."),
        "steps": steps,
        "guidance_scale": family.guidance if sampling.guidance_scale is None else sampling.guidance_scale,
        "scheduler": sampling.scheduler or type(family.scheduler).__name__,
        "negative_prompt": wanted.prompting.negative_prompt,
        "height": height,
        "width": width,
    }


def _most_steps(family: Family) -> int:
    """Each step has a training timestep of its own, and diffusers lets the first begin at an offset from 0."""
    config = family.scheduler.config
    return int(config.get("num_train_timesteps", 1000)) - int(config.get("steps_offset", 0))


def _joined(values: Sequence[str | float]) -> str | float | None:
    """What a record says of several things under a name for one: `runs/dog + runs/cat`, `1.0 + 0.7`."""
    return " + ".join(map(str, values)) if len(values) > 1 else values[0] if values else None


def _subject(wanted: PromptSettings, header: Header | None) -> tuple[str | None, str | None]:
    """Identifier and class noun; None where neither user nor adapter says."""
    identifier = (header.identifier or None) if header else None
    class_noun = (header.class_noun or None) if header else None
    return (
        identifier if wanted.identifier is None else wanted.identifier.strip(),
        class_noun if wanted.class_noun is None else wanted.class_noun.strip(),
    )


def _prompts(wanted: PromptSettings, family: Family, identifier: str | None, class_noun: str | None) -> list[Prompt]:
    if wanted.prompt:
        chosen = [Prompt(_as_template(text, identifier), i) for i, text in enumerate(wanted.prompt)]
    elif wanted.prompts is not None:
        chosen = prompts.load(wanted.prompts)
    elif class_noun is None:
        raise UserError('no prompts: give --prompt "a photo of a dog", or --prompts object --class_noun backpack')
    else:
        chosen = prompts.load(prompts.suggested(family.prompt_set, class_noun))
    for field, value, flag in (("{token}", identifier, "identifier sks"), ("{class}", class_noun, "class_noun dog")):
        if value is None and any(field in one.template for one in chosen):
            raise UserError(f"the prompts have a {field} to fill in, and no adapter says what with: give --{flag}")
    return chosen


def _as_template(prompt: str, identifier: str | None) -> str:
    """A literal prompt with the identifier marked, so that the scores can read it without."""
    if not identifier or "{token}" in prompt:
        return prompt
    return prompts.with_word_replaced(prompt, identifier, "{token}")
