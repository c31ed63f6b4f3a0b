"""A full-size Stable Diffusion 1.5 with random weights, as diffusers saves a real one: shapes, files and cost are real.

    python -m benchmarks.make_stable_diffusion --output_dir runs/sd15-random

2.1 GB in bfloat16, about 3 GB of memory. Its images are noise; speed, memory and code paths are the real model's.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Seed, parse

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

CONTEXT = 77  # tokens
VOCABULARY = 49_408
PARAMETERS = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
"""The published model's; held against what is built."""


@dataclass(frozen=True)
class Settings:
    """Write a Stable Diffusion 1.5 of random weights as a diffusers folder."""

    output_dir: Path
    """A folder that does not exist yet."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights on disk."""
    seed: Seed = 0
    """Of the weights."""


def unet() -> UNet2DConditionModel:
    """Latents (N, 4, 64, 64) for images of 512 pixels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,  # diffusers' name for the number of heads
    )


def vae() -> AutoencoderKL:
    """512x512x3 to 64x64x4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )


def tokenizer() -> CLIPTokenizer:
    """CLIP's kind and length, but it knows only a few words; the others fall back to their letters."""
    from singlora_diffusion.toyworld import architecture

    words = "a an the photo picture of on in with and sks zwx dog cat toy bear teapot backpack beach snow grass street"
    made = architecture.tokenizer(words.split())
    made.model_max_length = CONTEXT
    return made


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of CLIP ViT-L/14: token ids (N, 77) to hidden states (N, 77, 768)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=CONTEXT,
        projection_dim=768,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def scheduler() -> PNDMScheduler:
    """Noise-predicting, as the published folder has it."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make(settings: Settings) -> Path:
    """Build, count, save. The folder gets its name when it is complete.

    Raises:
        UserError: `output_dir` exists.
    """
    out = settings.output_dir
    if out.exists():
        raise UserError(f"{out} exists: choose another --output_dir")
    import torch
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(settings.seed)
    words = tokenizer()
    with made_as(getattr(torch, settings.dtype)):
        networks = {"unet": unet(), "text_encoder": text_encoder(words), "vae": vae()}
    for name, network in networks.items():
        found = count(network)
        if found != PARAMETERS[name]:
            raise AssertionError(f"{name} has {found:,} parameters, the published one {PARAMETERS[name]:,}")
        print(f"{name}: {found:,} parameters")
    pipeline = StableDiffusionPipeline(
        **networks,
        tokenizer=words,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    part = out.with_name(f".{out.name}.part")
    pipeline.save_pretrained(part, safe_serialization=True)
    as_published(part)
    part.rename(out)
    return out


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


@contextmanager
def made_as(dtype: Any) -> Iterator[None]:
    """Networks built inside have their weights in `dtype` from the start, so none is ever held in float32 besides."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count(network: nn.Module) -> int:
    """Its parameters."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def main() -> int:
    """The program; exit code 2 with one line for what the user can mend."""
    began = time.monotonic()
    try:
        settings = parse(Settings, sys.argv[1:], "python -m benchmarks.make_stable_diffusion", __doc__ or "")
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
