"""The flags of `singlora generate`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .. import settings
from ..data import prompts
from ..errors import UserError
from ..files import check_writable
from ..settings import Count, NotNegative, Number, Side
from ..terminal import escaped

MOST_IMAGES = 100_000
"""In one call: their records are held in memory."""


@dataclass(frozen=True)
class OutputSettings:
    """Where the images go."""

    output_dir: Path
    """Folder for the images, manifest.jsonl and contact_sheet.png. Images that are there already are not made again."""
    overwrite: bool = False
    """Replace images that were made there under other settings."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    pretrained_model_name_or_path: str | None = None
    """`toyworld`, `toyworld-flow`, a diffusers folder, a hub id, or a .safetensors checkpoint. None: the adapter's
    own."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another autoencoder: a diffusers folder, a hub id or a .safetensors file. None: the one that the adapter was
    trained with, else the base model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the networks compute in. None: bfloat16 on a GPU that has it, float16 on an older one,
    float32 elsewhere."""
    quantize: Literal["nf4", "int8"] | None = None
    """Keep the networks in 4 bits (nf4, by bitsandbytes) or 8 (int8, by torchao), to fit a smaller GPU."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""


@dataclass(frozen=True)
class AdapterSettings:
    """The adapters."""

    adapter: tuple[Path, ...] = ()
    """Run folders, adapter files or LoRAs of other programs; several add up. Empty: the base model alone."""
    scale: tuple[Number, ...] = (1.0,)
    """Strength, 1 as trained, 0 the base model: one for all adapters, or one for each."""
    merge: bool = False
    """Merge the adapters into the weights: the base model's speed."""


@dataclass(frozen=True)
class PromptSettings:
    """What the images show."""

    prompts: str | None = None
    """A prompt file, a template per line, or a set that comes with the package: object, live_subject, toyworld.
    None, and no --prompt: the set that suits the model and the class noun."""
    prompt: tuple[str, ...] = ()
    """Prompts as they stand, instead of --prompts."""
    identifier: str | None = None
    """What stands for {token}; "" for nothing. None: the first adapter's own."""
    class_noun: str | None = None
    """What stands for {class}. None: the first adapter's own."""
    negative_prompt: str = ""
    """Negative prompt: what the images are steered away from."""


@dataclass(frozen=True)
class SamplingSettings:
    """How they are sampled."""

    seeds: str = "0-3"
    """One image per prompt and seed: 7, or 0,5,7, or 0-3."""
    num_inference_steps: Count | None = None
    """Denoising steps. None: what suits the model, 25 for most."""
    guidance_scale: NotNegative | None = None
    """Strength of the prompt. None: what suits the model, 7.5 for most."""
    scheduler: str | None = None
    """ddim, dpm++ or euler; FLUX.1 and Stable Diffusion 3 take euler alone. None: the model's own."""
    height: Side | None = None
    """Pixels, a multiple of 8 for most models. None: the model's own."""
    width: Side | None = None
    """Pixels, a multiple of 8 for most models. None: the model's own."""
    batch_size: Count = 4
    """Images at once. A matter of memory and speed: each image has a random generator of its own."""


@dataclass(frozen=True)
class GenerateSettings:
    """Make images, prompts x seeds, with adapters or with the base model alone."""

    output: OutputSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    prompting: PromptSettings = field(default_factory=PromptSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


def check(wanted: GenerateSettings) -> None:
    """Raise a UserError for settings that cannot work, before anything is loaded."""
    settings.check(wanted)
    parse_seeds(wanted.sampling.seeds)
    adapters, texts = wanted.adapters, wanted.prompting
    for flag, text in (*(("prompt", one) for one in texts.prompt), *((name, getattr(texts, name)) for name in _TEXTS)):
        _check_text(flag, text or "")
    if texts.prompts is not None and texts.prompt:
        raise UserError("--prompts names a file or set, --prompt gives prompts as they stand: use one of them")
    if texts.prompts is not None:
        prompts.load(texts.prompts)
    if not adapters.adapter and wanted.model.pretrained_model_name_or_path is None:
        raise UserError("name an adapter with --adapter, or a base model with --pretrained_model_name_or_path")
    if not adapters.adapter and (adapters.merge or adapters.scale != (1.0,)):
        raise UserError("--merge and --scale are about an adapter: name it with --adapter")
    if adapters.adapter and len(adapters.scale) not in (1, len(adapters.adapter)):
        raise UserError(
            f"{len(adapters.scale)} numbers for --scale and {len(adapters.adapter)} for --adapter: "
            f"give one scale for all adapters, or one for each"
        )
    check_writable(wanted.output.output_dir, "--output_dir")


def scales(adapters: AdapterSettings) -> list[float]:
    """One per adapter."""
    return list(adapters.scale * len(adapters.adapter) if len(adapters.scale) == 1 else adapters.scale)


def parse_seeds(text: str) -> list[int]:
    """ "0-3" -> [0, 1, 2, 3]; "0,5,7" -> [0, 5, 7]; both kinds may be mixed.

    Raises:
        UserError: anything else, a seed named twice, or more than `MOST_IMAGES` of them.
    """
    flag = f'--seeds "{escaped(text)}"'
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:\s*-\s*([0-9]{1,18}))?\s*", part)
        if match is None:
            raise UserError(f'{flag}: cannot read "{escaped(part.strip())}"; write 7, or 0,5,7, or 0-3')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{flag}: {first}-{last} runs backwards")
        if len(seeds) + last - first >= MOST_IMAGES:
            raise UserError(f"{flag}: more than {MOST_IMAGES:,} images per prompt")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{flag}: a seed is named twice")
    return seeds


_TEXTS = ("identifier", "class_noun", "negative_prompt")


def _check_text(flag: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the terminal sent and that are no UTF-8
        raise UserError(f"--{flag} {escaped(text)}: is not valid text") from None
