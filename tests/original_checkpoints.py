"""Pipelines as single-file checkpoints: tensors under the names of the implementations they were published in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from singlora_diffusion.formats import original_names

State = dict[str, Tensor]

VAE = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)
OPEN_CLIP = (
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"final_layer_norm", "ln_final"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
)


def stable_diffusion_1(pipe: Any) -> State:
    return {
        **unet(pipe.unet),
        **autoencoder(pipe.vae),
        **clip(pipe.text_encoder.state_dict(), "cond_stage_model.transformer.text_model."),
        "model_ema.decay": torch.tensor(0.9999),
    }


def stable_diffusion_2(pipe: Any) -> State:
    """With one more layer in the text encoder, as published: nobody uses its outputs."""
    text = open_clip(pipe.text_encoder, "cond_stage_model.model.")
    last = pipe.text_encoder.config.num_hidden_layers
    more = {
        name.replace(".resblocks.0.", f".resblocks.{last}."): t.clone()
        for name, t in text.items()
        if "blocks.0." in name
    }
    return {**unet(pipe.unet), **autoencoder(pipe.vae), **text, **more}


def stable_diffusion_xl(pipe: Any) -> State:
    return {
        **unet(pipe.unet),
        **autoencoder(pipe.vae),
        **clip(pipe.text_encoder.state_dict(), "conditioner.embedders.0.transformer.text_model."),
        **open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model."),
    }


def unet(module: Any) -> State:
    state = module.state_dict()
    layers = {path: place.layer for path, place in original_names.of(module).items()}
    layers["conv_norm_out"] = "out.0"  # no linear layer or convolution: adapters do not know it
    return {
        f"model.diffusion_model.{layer}.{kind}": state[f"{path}.{kind}"]
        for path, layer in layers.items()
        for kind in ("weight", "bias")
        if f"{path}.{kind}" in state
    }


def autoencoder(module: Any) -> State:
    last = len(module.config.block_out_channels) - 1
    found: State = {}
    for name, tensor in module.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{last - int(match[1])}", name)
        square = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        found[f"first_stage_model.{_renamed(name, VAE)}"] = tensor[..., None, None] if square else tensor
    return found


def clip(state: Mapping[str, Tensor], prefix: str) -> State:
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def open_clip(module: Any, prefix: str) -> State:
    state = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    found: State = {}
    for name, tensor in state.items():
        attention, _, kind = name.partition(".self_attn.q_proj.")
        if kind:
            whole = torch.cat([state[f"{attention}.self_attn.{one}_proj.{kind}"] for one in "qkv"])
            found[f"{prefix}{_renamed(attention, OPEN_CLIP)}.attn.in_proj_{kind}"] = whole
        elif name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T.contiguous()
        elif "_proj." not in name or "out_proj" in name:
            found[prefix + _renamed(name, OPEN_CLIP)] = tensor
    return found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
