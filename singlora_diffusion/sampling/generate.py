"""Pictures: prompts x seeds with adapters or the base model alone. The first adapter's header says what is needed."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..data import prompts
from ..data.prompts import Prompt
from ..errors import UserError
from . import gallery
from .gallery import Line

if TYPE_CHECKING:
    from PIL import Image

    from ..formats import Header
    from ..models import Family


@dataclass(frozen=True)
class GenerateSettings:
    """Make pictures, prompts x seeds, with adapters or with the base model alone."""

    output_dir: Path
    """Folder for the pictures, manifest.jsonl and contact_sheet.png. What is there already is not made again."""
    adapter: tuple[Path, ...] = ()
    """Run folders, adapter files or LoRAs of other programs; several add up. Empty: the base model alone."""
    pretrained_model_name_or_path: str | None = None
    """`toyworld`, a diffusers folder or a hub id. None: the model that the first adapter was trained on."""
    prompts: str | None = None
    """A prompt file, a template per line, or a set that comes with the package: object, live_subject, toyworld.
    None, and no --prompt: the set that suits the model and the class noun."""
    prompt: tuple[str, ...] = ()
    """Prompts as they stand, instead of --prompts."""
    seeds: str = "0-3"
    """One picture per prompt and seed: 7, or 0,5,7, or 0-3."""
    identifier: str | None = None
    """What stands for {token}; "" for nothing. None: the first adapter's own."""
    class_noun: str | None = None
    """What stands for {class}. None: the first adapter's own."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float | None = None
    """Strength of the prompt. None: what suits the model, 7.5 for most."""
    scheduler: Literal["ddim", "dpm++", "euler"] | None = None
    """The sampler. None: the model's own."""
    negative_prompt: str = ""
    """What the pictures shall not show."""
    height: int | None = None
    """Pixels, a multiple of 8. None: the model's own."""
    width: int | None = None
    """Pixels, a multiple of 8. None: the model's own."""
    scale: tuple[float, ...] = (1.0,)
    """Strength, 1 as trained, 0 the base model: one for all adapters, or one for each."""
    merge: bool = False
    """Merge the adapters into the weights: the base model's speed."""
    batch_size: int = 4
    """Pictures at once. A matter of memory and speed: each picture has a random generator of its own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the networks compute in. None: float32 on the CPU, float16 on a GPU."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""
    overwrite: bool = False
    """Replace pictures that were made here under other settings."""


def generate(settings: GenerateSettings, *, quiet: bool = False) -> list[Line]:
    """Make what is missing of prompts x seeds, PNG by PNG, then the contact sheet.

    Args:
        quiet: print nothing but warnings.

    Returns:
        The manifest's lines for these prompts and seeds, prompt by prompt.

    Raises:
        UserError: settings, adapter or base model that do not work, or other pictures in the folder.
    """
    check(settings)
    seeds = parse_seeds(settings.seeds)
    device, dtype = _device(settings)
    adapters = [Given(path) for path in settings.adapter]
    header = adapters[0].header if adapters else None
    family = _base(settings, adapters, dtype, device)
    identifier, class_noun = _subject(settings, header)
    chosen = _prompts(settings, family, identifier, class_noun)

    run = {
        "adapter": _joined([str(adapter.named) for adapter in adapters]),
        "adapter_sha256": _joined([adapter.sha256 for adapter in adapters]),
        "scale": _joined(_scales(settings)),
        "merged": settings.merge if adapters else None,
        "base_model": family.source,
        "base_hash": family.fingerprint,
        "dtype": dtype,
        "steps": settings.num_inference_steps,
        "guidance_scale": family.guidance if settings.guidance_scale is None else settings.guidance_scale,
        "scheduler": settings.scheduler or type(family.scheduler).__name__,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height or family.resolution,
        "width": settings.width or family.resolution,
    }
    plan: list[Line] = [
        {
            "file": f"{one.index:03d}-{seed}.png",
            "prompt": one.text(identifier or "", class_noun or ""),
            "prompt_without_token": one.without_token(class_noun or ""),
            "template": one.template,
            "prompt_index": one.index,
            "seed": seed,
            "identifier": identifier,
            "class_noun": class_noun,
            **run,
        }
        for one in chosen
        for seed in seeds
    ]
    _warn_of_cut_prompts(family, plan)
    if adapters:
        _attach(adapters, family, settings)  # an adapter for another model leaves no folder behind
    todo = gallery.missing(settings.output_dir, plan, settings.overwrite)
    began = time.monotonic()
    if todo:
        for line, picture in _sampled(family, todo, settings, quiet):
            gallery.add(settings.output_dir, line, picture)
    seconds = time.monotonic() - began
    gallery.lay_out(settings.output_dir, plan)
    if not quiet:
        _report(settings, header, len(plan), len(todo), seconds)
    return plan


def parse_seeds(text: str) -> list[int]:
    """ "0-3" -> [0, 1, 2, 3]; "0,5,7" -> [0, 5, 7]; both kinds may be mixed.

    Raises:
        UserError: anything else, a seed named twice, or more than 100,000 of them.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\s*-\s*(\d{1,18}))?\s*", part)
        if match is None:
            raise UserError(f'--seeds "{text}": cannot read "{part.strip()}"; write 7, or 0,5,7, or 0-3')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f'--seeds "{text}": {first}-{last} runs backwards')
        if len(seeds) + last - first >= 100_000:
            raise UserError(f'--seeds "{text}": more than 100,000 pictures per prompt')
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f'--seeds "{text}": a seed is named twice')
    return seeds


def check(settings: GenerateSettings) -> None:
    """Raise a UserError for settings that cannot work, before anything is loaded."""
    for name in ("num_inference_steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    for name in ("height", "width"):
        side = getattr(settings, name)
        if side is not None and (side < 8 or side % 8):
            raise UserError(f"--{name} must be a multiple of 8 pixels, not {side}")
    numbers = [("scale", scale) for scale in settings.scale]
    for name, number in [("guidance_scale", settings.guidance_scale), *numbers]:
        if number is not None and not math.isfinite(number):
            raise UserError(f"--{name} must be a finite number, not {number}")
    if settings.prompts is not None and settings.prompt:
        raise UserError("--prompts names a file or set, --prompt gives prompts as they stand: use one of them")
    if settings.prompts is not None:
        prompts.load(settings.prompts)
    if not settings.adapter and settings.pretrained_model_name_or_path is None:
        raise UserError("name an adapter with --adapter, or a base model with --pretrained_model_name_or_path")
    if not settings.adapter and (settings.merge or settings.scale != (1.0,)):
        raise UserError("--merge and --scale are about an adapter: name it with --adapter")
    if settings.adapter and len(settings.scale) not in (1, len(settings.adapter)):
        raise UserError(
            f"{len(settings.scale)} numbers for --scale and {len(settings.adapter)} for --adapter: "
            f"give one scale for all adapters, or one for each"
        )
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise UserError(f"--output_dir {settings.output_dir} is a file: name a folder")


# --- what to generate with -------------------------------------------------------------------------------------------


class Given:
    """An adapter that the user named: of this program, or a LoRA of another.

    Attributes:
        named: as the user named it. header: what our own file says of itself, else None. sha256: of the whole file.
    """

    def __init__(self, named: Path) -> None:
        from .. import formats
        from ..formats import recognition

        found = formats.recognise(named)
        if found.kind == recognition.UNKNOWN:
            raise recognition.refuse(found)
        self.named, self.path = named, found.index.path
        self.header = formats.read_header(named) if found.kind == recognition.NATIVE else None
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()


def _attach(adapters: Sequence[Given], family: Family, settings: GenerateSettings) -> None:
    """Put the adapters into the family's networks for good."""
    from .. import formats

    attached = formats.attach_files([one.path for one in adapters], family.networks, _scales(settings))
    if settings.merge:
        attached.merge()


def _scales(settings: GenerateSettings) -> list[float]:
    """One per adapter."""
    return list(settings.scale * len(settings.adapter) if len(settings.scale) == 1 else settings.scale)


def _joined(values: Sequence[str | float]) -> str | float | None:
    """What the manifest says of several things under a name for one: `runs/dog + runs/cat`, `1.0 + 0.7`."""
    return " + ".join(map(str, values)) if len(values) > 1 else values[0] if values else None


def _base(settings: GenerateSettings, adapters: Sequence[Given], dtype: str, device: str) -> Family:
    """The base model: the one the user names, else the very one that the first adapter was trained on."""
    from .. import models

    named = settings.pretrained_model_name_or_path
    header = adapters[0].header if adapters else None
    if named is not None:
        family = models.load(named, dtype, device)
    elif header is None or not header.base_model:
        raise UserError(
            f"{adapters[0].named} does not say what model it is for: name it with --pretrained_model_name_or_path"
        )
    else:
        try:
            family = models.load(header.base_model, dtype, device)
        except UserError as error:
            raise UserError(
                f"the adapter's base model: {error}; or name it with --pretrained_model_name_or_path"
            ) from None
    for adapter in adapters:
        _check_base(adapter, family, settings)
    return family


def _check_base(adapter: Given, family: Family, settings: GenerateSettings) -> None:
    """Refuse an adapter of another model, unless the user says which model to use; then say so."""
    header = adapter.header
    if header is None:
        return
    if header.family and header.family != family.name:
        raise UserError(f"{adapter.named} is for the family {header.family}, {family.source} is of {family.name}")
    if not header.base_hash or header.base_hash == family.fingerprint:
        return
    known = f"{header.base_model} (weights {header.base_hash[:12]})"
    found = f"{family.source} (weights {family.fingerprint[:12]})"
    if settings.pretrained_model_name_or_path is not None:
        _warn(f"{adapter.named} was trained on {known}; it is used on {found}, as asked for")
    elif header.base_model == family.source:
        raise UserError(
            f"{adapter.named} needs {known}, but {found} is another model by now: bring that one back, or say "
            f"which to use with --pretrained_model_name_or_path"
        )
    else:
        raise UserError(
            f"{adapter.named} was trained on {known}, {settings.adapter[0]} on {found}: say which to use with "
            f"--pretrained_model_name_or_path"
        )


def _device(settings: GenerateSettings) -> tuple[str, str]:
    """Device and dtype."""
    import torch

    device = settings.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).strip().splitlines()[0]}") from error
    return device, settings.dtype or ("float32" if kind == "cpu" else "float16")


def _subject(settings: GenerateSettings, header: Header | None) -> tuple[str | None, str | None]:
    """Identifier and class noun; None where neither user nor adapter says."""
    identifier = (header.identifier or None) if header else None
    class_noun = (header.class_noun or None) if header else None
    return (
        identifier if settings.identifier is None else settings.identifier.strip(),
        class_noun if settings.class_noun is None else settings.class_noun.strip(),
    )


def _prompts(
    settings: GenerateSettings, family: Family, identifier: str | None, class_noun: str | None
) -> list[Prompt]:
    if settings.prompt:
        chosen = [Prompt(_as_template(text, identifier), i) for i, text in enumerate(settings.prompt)]
    elif settings.prompts is not None:
        chosen = prompts.load(settings.prompts)
    elif class_noun is None:
        raise UserError(
            'what shall the pictures show? --prompt "a photo of a dog", or --prompts object --class_noun backpack'
        )
    else:
        chosen = prompts.load(prompts.suggested(family.prompts, class_noun))
    for field, value, flag in (("{token}", identifier, "identifier sks"), ("{class}", class_noun, "class_noun dog")):
        if value is None and any(field in one.template for one in chosen):
            raise UserError(f"the prompts have a {field} to fill in, and no adapter says what with: --{flag}")
    return chosen


def _as_template(prompt: str, identifier: str | None) -> str:
    """A literal prompt with the identifier marked, so that the scores can read it without."""
    if not identifier or "{token}" in prompt:
        return prompt
    return re.sub(rf"(?<!\w){re.escape(identifier)}(?!\w)", "{token}", prompt)


# --- making and writing ----------------------------------------------------------------------------------------------


def _sampled(
    family: Family, todo: Sequence[Line], settings: GenerateSettings, quiet: bool
) -> Iterator[tuple[Line, Image.Image]]:
    """The pictures of the lines in order, with a progress bar."""
    import torch
    from rich.console import Console

    from ..progress import bar

    with bar(Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("generating", total=len(todo))
        for start in range(0, len(todo), settings.batch_size):
            batch = todo[start : start + settings.batch_size]
            first = batch[0]
            try:
                pictures = family.sample(
                    [line["prompt"] for line in batch],
                    [line["seed"] for line in batch],
                    steps=first["steps"],
                    guidance=first["guidance_scale"],
                    height=first["height"],
                    width=first["width"],
                    negative_prompt=first["negative_prompt"],
                    sampler=settings.scheduler,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{len(batch)} pictures at once do not fit the GPU: --batch_size 1, or a smaller size"
                ) from error
            yield from zip(batch, pictures, strict=True)
            progress.advance(task, len(batch))


# --- words -----------------------------------------------------------------------------------------------------------


def _warn_of_cut_prompts(family: Family, plan: Sequence[Line]) -> None:
    texts = list(dict.fromkeys(line["prompt"] for line in plan))
    long = [text for text in texts if family.prompt_overflow(text)]
    if long:
        _warn(
            f"{len(long)} of {len(texts)} prompts are longer than {family.source} reads and are cut, "
            f'by {family.prompt_overflow(long[0])} tokens: "{long[0]}"'
        )


def _warn(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _report(settings: GenerateSettings, header: Header | None, total: int, made: int, seconds: float) -> None:
    kept = f", {total - made} were there already" if total > made else ""
    pace = f", {seconds / made:.2f} s each" if made else ""
    pictures = "picture" if made == 1 else "pictures"
    print(f"{settings.output_dir}: {made} {pictures} made{pace}{kept}; see {settings.output_dir / gallery.SHEET}")
    references = str(header.recipe.get("instance_data_dir", "")) if header else ""
    folder, references = (
        shlex.quote(str(settings.output_dir)),
        shlex.quote(references) if references else "REAL_PICTURES",
    )
    print(f"next: singlora score --images {folder} --references {references}")
