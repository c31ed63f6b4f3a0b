"""A published model at full size with random weights, as diffusers saves a real one: shapes, files and cost are real.

    python -m benchmarks.make_full_size sd15 runs/sd15-random
    python -m benchmarks.make_full_size flux-dev runs/flux-random --blocks 2

Its images are noise; speed, memory and code paths are the real model's. Networks are made and saved one at a time, so
that the largest of them is all that is held: 1.7 GB in bfloat16 of sd15, 5.1 GB of sdxl.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Seed, parse

from . import make_tiny, published

LENGTHS = {"CLIPTokenizer": 77, "T5Tokenizer": 512, "Qwen2Tokenizer": 512}


@dataclass(frozen=True)
class Settings:
    """Write a model of full-size networks with random weights as a diffusers folder."""

    model: Positional[str]
    """sd15, sdxl, sd35-medium, flux-dev, klein-4b or klein-9b."""
    output_dir: Positional[Path]
    """A folder that does not exist yet."""
    blocks: Count | None = None
    """Of each kind of block in transformers and T5 at most so many. None: all."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights on disk."""
    seed: Seed = 0
    """Of the weights."""


def make(settings: Settings) -> Path:
    """Build, count, save. The folder gets its name when it is complete.

    The tokenizers are the tiny models', which know few words and spell the others, at the published length.

    Raises:
        UserError: `output_dir` exists, or there is no such model.
    """
    out = settings.output_dir
    if out.exists():
        raise UserError(f"{out} exists: choose another folder")
    if settings.model not in published.MODELS:
        raise UserError(f"unknown model {settings.model!r}: there are {', '.join(published.MODELS)}")
    import torch

    model = published.MODELS[settings.model]
    tiny = make_tiny.build(model.family)
    part = out.with_name(f".{out.name}.part")
    for tokenizer in tiny.components.values():
        kind = type(tokenizer).__name__.removesuffix("Fast")
        if kind in LENGTHS:
            tokenizer.model_max_length = LENGTHS[kind]
    tiny.save_pretrained(part, safe_serialization=True)
    torch.manual_seed(settings.seed)
    for number, (name, config) in enumerate(model.parts.items()):
        small = getattr(tiny, name)
        network = published.built(
            config, getattr(torch, settings.dtype), type(small), settings.blocks, **_tokens(small.config)
        )
        count = sum(parameter.numel() for parameter in network.parameters())
        if number == 0 and settings.blocks is None and count != model.parameters:
            raise AssertionError(f"{name} has {count:,} parameters, the published one {model.parameters:,}")
        shutil.rmtree(part / name)
        network.save_pretrained(part / name, safe_serialization=True)
        print(f"{name}: {count:,} parameters", flush=True)
        del network
    if settings.model == "sd15":
        as_published(part)
    part.rename(out)
    return out


def _tokens(small: Any) -> dict[str, Any]:
    """Of a text encoder's config, what the tokenizer decides."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(small, name) for name in names if hasattr(small, name)}


def as_published(folder: Path) -> None:
    """Name the text encoder's tensors and the tokenizer's files as the published, older folder does."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    save_file(
        {f"text_model.{name.removeprefix('text_model.')}": state[name] for name in state}, weights, {"format": "pt"}
    )
    merged = folder / "tokenizer" / "tokenizer.json"
    Tokenizer.from_file(str(merged)).model.save(str(merged.parent))  # vocab.json, merges.txt
    merged.unlink()


def main() -> int:
    """The program; exit code 2 with one line for what the user can mend."""
    began = time.monotonic()
    try:
        settings = parse(Settings, sys.argv[1:], "python -m benchmarks.make_full_size", __doc__ or "")
        out = make(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e9:.2f} GB, {time.monotonic() - began:.0f} s")
    print(
        f"next: singlora generate --pretrained_model_name_or_path {out} --dtype bfloat16 --prompt 'a photo of a dog' "
        f"--seeds 0 --height 256 --width 256 --num_inference_steps 5 --output_dir {out}-samples"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
