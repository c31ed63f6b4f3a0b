"""Names of layers in the implementations that models were first published in, which kohya's and ComfyUI's tools use.

Some layers of diffusers are parts of one layer there: q, k and v of an attention are rows of one weight.
diffusers' own converters of whole checkpoints (`diffusers.loaders.single_file_utils`) and of LoRA files
(`diffusers.loaders.lora_conversion_utils`) are what the tests compare these tables with. They are not used in their
place because they go one way only, drop T5, know no LoRA of Stable Diffusion 3, and take FLUX.1's width for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

Table = Mapping[str, tuple[str, ...]]
"""Original layer of a block -> the layers of diffusers that its rows belong to, in order."""


class Place(NamedTuple):
    """Where a layer's weight is in the original implementation.

    layer: of which it is rows. rows: which, in the order that this layer has them; empty: it is that layer. outputs:
    how many rows the original layer has, 0 where `rows` is empty.
    """

    layer: str
    rows: tuple[range, ...] = ()
    outputs: int = 0


def of(module: nn.Module) -> dict[str, Place]:
    """The places of a denoiser's layers by their path in diffusers; none for a class that is not in the table."""
    kind = type(module).__name__
    return CLASSES[kind](module) if kind in CLASSES else {}


# --- Stable Diffusion 1, 2 and XL

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet(module: Any) -> dict[str, Place]:
    """Of a UNet2DConditionModel: the blocks are numbered through, each resnet with what follows it being one."""
    stages = {**AROUND, **dict(_unet_stages(module))}
    found: dict[str, Place] = {}
    for path, layer in module.named_modules():
        stage = next((one for one in _ancestors(path) if one in stages), None)
        if stage is not None and hasattr(layer, "weight"):
            inside = path[len(stage) :].removeprefix(".")
            inside = RESNET.get(inside, inside) if "resnets" in stage else inside
            found[path] = Place(f"{stages[stage]}.{inside}" if inside else stages[stage])
    return found


def _unet_stages(module: Any) -> Iterator[tuple[str, str]]:
    number = 1  # 0 is conv_in
    for i, block in enumerate(module.down_blocks):
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(module.up_blocks):
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        last = 2 if getattr(block, "attentions", None) else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{last}.conv"


def _ancestors(path: str) -> Iterator[str]:
    """The path, then each module that it is in, outwards."""
    while path:
        yield path
        path = path.rpartition(".")[0]


# --- FLUX.1

FLUX_DOUBLE: Table = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
FLUX_SINGLE: Table = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
FLUX_AROUND: Table = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}


def flux(module: Any) -> dict[str, Place]:
    """Of a FluxTransformer2DModel, as in Black Forest Labs' own code."""
    found = _places(module, FLUX_AROUND)
    for i in range(len(module.transformer_blocks)):
        found |= _places(module, FLUX_DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
    for i in range(len(module.single_transformer_blocks)):
        found |= _places(module, FLUX_SINGLE, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    return found | {"norm_out.linear": _halves_exchanged(module, "norm_out.linear", "final_layer.adaLN_modulation.1")}


# --- Stable Diffusion 3 and 3.5

SD3_BLOCK: Table = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
SD3_AROUND: Table = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}


def stable_diffusion_3(module: Any) -> dict[str, Place]:
    """Of an SD3Transformer2DModel, as in Stability's own code."""
    found = _places(module, SD3_AROUND)
    last = len(module.transformer_blocks) - 1
    for i in range(last + 1):
        found |= _places(module, SD3_BLOCK, f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
    for path, layer in (
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (f"transformer_blocks.{last}.norm1_context.linear", f"joint_blocks.{last}.context_block.adaLN_modulation.1"),
    ):
        found[path] = _halves_exchanged(module, path, layer)
    return found


def _places(module: nn.Module, table: Table, original: str = "", path: str = "") -> dict[str, Place]:
    """Of the rows of a table whose layers this model has; some blocks lack some."""
    found: dict[str, Place] = {}
    for layer, parts in table.items():
        sizes = {f"{path}{part}": _outputs(module, f"{path}{part}") for part in parts}
        if not all(sizes.values()):
            continue
        if len(sizes) == 1:
            found[f"{path}{parts[0]}"] = Place(f"{original}{layer}")
            continue
        start = 0
        for part, size in sizes.items():
            found[part] = Place(f"{original}{layer}", (range(start, start + size),), sum(sizes.values()))
            start += size
    return found


def _halves_exchanged(module: nn.Module, path: str, layer: str) -> Place:
    """diffusers takes scale and shift from such a layer, the original shift and scale."""
    outputs = _outputs(module, path)
    return Place(layer, (range(outputs // 2, outputs), range(outputs // 2)), outputs)


def _outputs(module: nn.Module, path: str) -> int:
    """Outputs of the layer at a path; 0 where there is none. Asks no weight, which may be packed or have no data."""
    try:
        layer: Any = module.get_submodule(path)
    except AttributeError:
        return 0
    return int(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features)


CLASSES: Mapping[str, Callable[[Any], dict[str, Place]]] = {
    "UNet2DConditionModel": unet,
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": stable_diffusion_3,
}
"""By the denoiser's class."""
