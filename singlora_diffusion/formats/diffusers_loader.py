"""LoRA files through diffusers' own loader, as its users load them: into bare networks, without a whole model."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ..models.network import Networks, specs

PIPELINES = {
    "FluxTransformer2DModel": diffusers.FluxPipeline,
    "SD3Transformer2DModel": diffusers.StableDiffusion3Pipeline,
}
"""By the denoiser's class; UNets have two, told apart by their second text encoder."""


def loadable(networks: Networks) -> set[str]:
    """Which of the networks diffusers loads LoRA files into; T5 is not among them."""
    modules = {name: one.module for name, one in specs(networks).items()}
    return set(modules) & set(pipeline(modules)._lora_loadable_modules)


def pipeline(networks: Mapping[str, nn.Module]) -> Any:
    """A pipeline around nothing but the networks: enough to load and unload LoRA weights."""
    parts: dict[str, Any] = dict(networks)
    kind: Any = diffusers.StableDiffusionPipeline
    for network in networks.values():
        kind = PIPELINES.get(type(network).__name__, kind)
    if kind is diffusers.StableDiffusionPipeline:
        # load_lora_weights asks the UNet even where the file is about the text encoder alone.
        parts.setdefault("unet", _smallest_unet())
        told = getattr(parts["unet"].config, "addition_embed_type", None) is not None
        if "text_encoder_2" in networks or told:
            kind = diffusers.StableDiffusionXLPipeline
    signature = inspect.signature(kind.__init__).parameters
    absent = {
        name: None for name, one in signature.items() if name != "self" and one.default is inspect.Parameter.empty
    }
    silent = {name: False for name in ("requires_safety_checker", "add_watermarker") if name in signature}
    with quiet():
        return kind(**{**absent, **parts, **silent})


def _smallest_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(2,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=1,
    )


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
