"""LoRA files through diffusers' own loader, as its users load them: into bare networks, without a whole model."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ..models.network import Networks, specs

PIPELINES = (
    diffusers.StableDiffusionPipeline,
    diffusers.StableDiffusionXLPipeline,
    diffusers.StableDiffusion3Pipeline,
    diffusers.FluxPipeline,
    diffusers.Flux2KleinPipeline,
)


def loadable(networks: Networks) -> set[str]:
    """Which of the networks diffusers loads LoRA files into; T5 is not among them."""
    modules = {name: one.module for name, one in specs(networks).items()}
    return set(modules) & set(pipeline(modules)._lora_loadable_modules)


def pipeline(networks: Mapping[str, nn.Module]) -> Any:
    """A pipeline around nothing but the networks: enough to load and unload LoRA weights."""
    parts: dict[str, Any] = dict(networks)
    kind = _kind(networks)
    signature = inspect.signature(kind.__init__).parameters
    for name, smallest in STAND_INS.items():
        if name in signature and name not in parts:
            parts[name] = smallest()
    absent = {
        name: None for name, one in signature.items() if name != "self" and one.default is inspect.Parameter.empty
    }
    silent = {name: False for name in ("requires_safety_checker", "add_watermarker") if name in signature}
    with quiet():
        return kind(**{**absent, **parts, **silent})


def _kind(networks: Mapping[str, nn.Module]) -> Any:
    """The first pipeline that declares parts of these names and classes; Stable Diffusion XL's UNet has a class that is
    not its own, and is told sizes."""
    told = any(getattr(getattr(one, "config", None), "addition_embed_type", None) for one in networks.values())
    for kind in PIPELINES[1:] if told else PIPELINES:
        declared = inspect.signature(kind.__init__).parameters
        if all(name in declared and _named(declared[name], one) for name, one in networks.items()):
            return kind
    return PIPELINES[1 if told or "text_encoder_2" in networks else 0]


def _named(parameter: inspect.Parameter, module: nn.Module) -> bool:
    """Whether a parameter is annotated with the class of a module."""
    annotation = parameter.annotation
    return type(module).__name__ == getattr(annotation, "__name__", annotation)


def _smallest_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(2,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=1,
    )


def _smallest_transformer() -> SD3Transformer2DModel:
    widths = {"caption_projection_dim": 4, "joint_attention_dim": 2, "pooled_projection_dim": 2}
    return SD3Transformer2DModel(2, 1, 1, num_layers=1, attention_head_dim=4, num_attention_heads=1, **widths)


STAND_INS: Mapping[str, Callable[[], nn.Module]] = {"unet": _smallest_unet, "transformer": _smallest_transformer}
"""load_lora_weights asks the denoiser even where a file is about text encoders alone."""


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from the libraries while a file is loaded."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
