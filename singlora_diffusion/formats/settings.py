"""The flags of the commands that handle adapter files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from ..settings import CountOrZero, Number, Positive

Format = Literal["kohya", "diffusers", "peft"]
Precision = Literal["float32", "fp16", "bf16"]


@dataclass(frozen=True)
class ExportSettings:
    """Write an adapter as a file that other programs load, or merge it into a full model."""

    adapter: str
    """A run folder or an adapter file."""
    output: str | None = None
    """The file to write, `.safetensors`."""
    format: Format | None = None
    """kohya: SD 1, 2, XL in ComfyUI, A1111, Forge, SD.Next, InvokeAI, diffusers; FLUX.1 in these but A1111.
    peft: SD 3 and FLUX in ComfyUI and diffusers, FLUX also in InvokeAI, FLUX.1 in Forge; SD 1, 2, XL in diffusers.
    diffusers: SD 1, 2, XL in old versions of diffusers.
    None: kohya for SD 1, 2, XL, else peft: kohya's file for FLUX.1 is 2 to 5 times as large."""
    dtype: Precision = "float32"
    """Precision of the stored numbers. fp16 halves the file and rounds the adapter."""
    merge_into: str | None = None
    """Instead of a file: a new folder that gets the whole pipeline with the adapter merged into it."""
    pretrained_model_name_or_path: str | None = None
    """The base model. None: the one the adapter's header names."""
    overwrite: bool = False
    """Replace `output` if it exists."""


@dataclass(frozen=True)
class ImportSettings:
    """Turn a SingLoRA of another program into one of ours."""

    file: Positional[str]
    """The file to read, `.safetensors`."""
    output: str
    """The adapter file to write, `.safetensors`."""
    pretrained_model_name_or_path: str
    """The base model it was trained on."""
    alpha: Positive | None = None
    """Its alpha, where the file does not say. None: what lies beside the file says, else the rank, with a note."""
    ramp_steps: CountOrZero = 1000
    """T of its ramp, used if the file carries the trainer's step: u = min(step / T, 1). 0: u = 1."""
    dtype: Precision = "float32"
    """Precision of the stored numbers."""
    overwrite: bool = False
    """Replace `output` if it exists."""


@dataclass(frozen=True)
class InspectSettings:
    """Say what an adapter file is, layer by layer."""

    file: Positional[str]
    """A run folder or a `.safetensors` file."""
    pretrained_model_name_or_path: str | None = None
    """The base model, to relate each update to the weight it changes. None: updates are given by themselves."""


@dataclass(frozen=True)
class AddSettings:
    """Add SingLoRA adapters up into one, exactly."""

    adapters: Positional[tuple[str, ...]]
    """Run folders or adapter files."""
    output: str
    """The adapter file to write, `.safetensors`."""
    scale: tuple[Number, ...] = (1.0,)
    """A factor for all adapters, or one for each."""
    overwrite: bool = False
    """Replace `output` if it exists."""
