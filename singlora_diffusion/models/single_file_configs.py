"""What diffusers' folders say of a model in their config files, read off the shapes of a single file's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by their names in the implementation that a model was first published in."""
Config = dict[str, Any]

HEAD = 64
"""Width of an attention head, where a model does not have a number of heads that is the same everywhere."""


def unet(shapes: Shapes, prefix: str, sample_size: int, heads: int | None = None) -> Config:
    """Of a UNet2DConditionModel.

    Args:
        heads: of every attention; None: as many as heads of `HEAD` channels fit.
    """
    own = _below(shapes, prefix)
    down = sorted(number for number in _numbers(own, "input_blocks.") if f"input_blocks.{number}.0.op.weight" in own)
    layers = (down[0] if down else _count(own, "input_blocks.")) - 1
    starts = [1 + level * (layers + 1) for level in range(len(down) + 1)]
    channels = [own[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts]
    depths = [_count(own, f"input_blocks.{start}.1.transformer_blocks.") for start in starts]
    text = next(shape[1] for name, shape in own.items() if name.endswith("attn2.to_k.weight"))
    projections = next(shape for name, shape in own.items() if name.endswith(".proj_in.weight"))
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": own["input_blocks.0.0.weight"][1],
        "out_channels": own["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": text,
        "attention_head_dim": heads or [max(1, width // HEAD) for width in channels],  # diffusers' name for numbers
        "use_linear_projection": len(projections) == 2,
    }
    told = own.get("label_emb.0.0.weight")
    if told is None:
        return config
    return {
        **config,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": told[1],
    }


def autoencoder(shapes: Shapes, prefix: str, scaling_factor: float, sample_size: int) -> Config:
    """Of an AutoencoderKL."""
    own = _below(shapes, prefix)
    levels = _count(own, "encoder.down.")
    latent = own["decoder.conv_in.weight"][1]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "block_out_channels": [own[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": _count(own, "encoder.down.0.block."),
        "latent_channels": latent,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in own,
        "use_post_quant_conv": "post_quant_conv.weight" in own,
    }


def clip(shapes: Shapes, prefix: str) -> Config:
    """Of OpenAI's CLIP text encoder, in the names that transformers gives its layers."""
    own = _below(shapes, f"{prefix}text_model.")
    layers = _count(own, "encoder.layers.")
    vocabulary, width = own["embeddings.token_embedding.weight"]
    context = own["embeddings.position_embedding.weight"][0]
    return _text(vocabulary, width, context, layers, own["encoder.layers.0.mlp.fc1.weight"][0], width, "quick_gelu")


def open_clip(shapes: Shapes, prefix: str, *, last_but_one: bool) -> Config:
    """Of a text encoder in OpenCLIP's names.

    Args:
        last_but_one: the layers end before the last one, whose outputs the model does not use.
    """
    own = _below(shapes, prefix)
    layers = _count(own, "transformer.resblocks.") - last_but_one
    vocabulary, width = own["token_embedding.weight"]
    projection = own["text_projection"][1] if "text_projection" in own else width
    inside = own["transformer.resblocks.0.mlp.c_fc.weight"][0]
    return _text(vocabulary, width, own["positional_embedding"][0], layers, inside, projection, "gelu")


def _text(
    vocabulary: int, width: int, context: int, layers: int, inside: int, projection: int, activation: str
) -> Config:
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": context,
        "num_hidden_layers": layers,
        "intermediate_size": inside,
        "projection_dim": projection,
        "hidden_act": activation,
        "num_attention_heads": max(1, width // HEAD),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def _numbers(shapes: Shapes, prefix: str) -> set[int]:
    """The numbers that follow a prefix."""
    found = (name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix))
    return {int(number) for number in found if number.isdecimal()}


def _count(shapes: Shapes, prefix: str) -> int:
    return len(_numbers(shapes, prefix))
