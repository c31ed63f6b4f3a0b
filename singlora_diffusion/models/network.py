"""What adapters and files need to know of one network of a base model; no family, no adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Role = Literal["denoiser", "text"]
TEXT = "text_encoder"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Of transformers that attend to image and text together: each has projections of its own."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
T5_ATTENTION = ("q", "k", "v", "o")
PARTS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
MLP = ("ff.net.0.proj", "ff.net.2")
JOINT_MLP = (*MLP, "ff_context.net.0.proj", "ff_context.net.2")


def _same(path: str) -> str:
    return path


def _nothing() -> dict[str, Any]:
    raise NotImplementedError("this network has no sample inputs")


@dataclass(frozen=True)
class NetworkSpec:
    """One network: the module, and how files spell it.

    Attributes:
        name: of the network in the model's folder and at the front of its layers' names in files: `unet`.
        role: what it does; `AdapterConfig` has targets and ranks by role.
        targets: the layers that are adapted unless the user names others.
        presets: further lists of targets by name, such as `attention+mlp`.
        fused: layers that it lacks as it computes them in another one, by the other's name: {"q_proj": "c_attn"}.
        prefixes: what stands in the name's place, by file form, as in {"kohya": "lora_te1"}; else the name itself.
        file_path: a layer's path in the module -> its path in files.
        sample_inputs: small random keyword arguments to call the module with, two examples on its device and in its
            dtype; a function of nothing else.
    """

    name: str
    module: nn.Module
    role: Role
    targets: tuple[str, ...]
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    file_path: Callable[[str], str] = _same
    sample_inputs: Callable[[], dict[str, Any]] = _nothing

    def layer(self, path: str) -> str:
        """A layer's name in files: `unet.mid_block...to_q`, `text_encoder.text_model.encoder...q_proj`."""
        return f"{self.name}.{self.file_path(path)}"

    def prefix(self, form: str) -> str:
        """What the layers of this network begin with in files of a form: kohya, diffusers, peft."""
        return self.prefixes.get(form, self.name)


class Part(NamedTuple):
    """A network of a family: its class, the spec of a module of it by the network's name, and whether it is packed
    when the model is loaded with a quantization: CLIP is not worth it."""

    kind: Any
    spec: Callable[[str, nn.Module], NetworkSpec]
    large: bool = False


def specs_of(table: Mapping[str, Part], owner: object) -> dict[str, NetworkSpec]:
    """Of the modules that `owner` has under the names of the table; None stands for one that it lacks."""
    modules = {name: getattr(owner, name) for name in table}
    return {name: table[name].spec(name, module) for name, module in modules.items() if module is not None}


def network_of(layer: str) -> str:
    """The name of the network that a layer is in, by the layer's name in files: `unet` for `unet.mid_block...to_q`."""
    return layer.partition(".")[0]


Networks = Mapping[str, "NetworkSpec | nn.Module"]


def specs(networks: Networks) -> dict[str, NetworkSpec]:
    """Networks by name, each with its spec: a bare module gets the one that goes by its name and class."""
    texts = [name for name in networks if name.startswith(TEXT)]
    prefixes = {name: f"lora_te{number}" if len(texts) > 1 else "lora_te" for number, name in enumerate(texts, 1)}
    return {
        name: one if isinstance(one, NetworkSpec) else bare(name, one, prefixes.get(name, name))
        for name, one in networks.items()
    }


def bare(name: str, module: nn.Module, prefix: str = "lora_te") -> NetworkSpec:
    """The spec of a module that comes without one: a diffusers UNet, a CLIP text encoder, a language model, or any
    other network.

    Args:
        prefix: of a text encoder's layers in kohya's form.
    """
    if name.startswith(TEXT):
        return clip_text_encoder(name, module, prefix)
    if hasattr(getattr(module, "config", None), "cross_attention_dim"):
        return unet(name, module)
    if hasattr(getattr(module, "config", None), "model_type"):
        return language_model(name, module)
    return NetworkSpec(name, module, "denoiser", ATTENTION)


def unet(name: str, module: nn.Module) -> NetworkSpec:
    """A diffusers UNet2DConditionModel."""
    return NetworkSpec(
        name,
        module,
        "denoiser",
        ATTENTION,
        presets={"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)},
        prefixes={"kohya": "lora_unet"},
        sample_inputs=lambda: unet_inputs(module),
    )


def clip_text_encoder(name: str, module: nn.Module, prefix: str = "lora_te") -> NetworkSpec:
    """A CLIP text encoder of transformers.

    transformers 5 dropped the `text_model.` level from CLIPTextModel; every tool outside expects it in files.
    """
    return NetworkSpec(
        name,
        module,
        "text",
        TEXT_ATTENTION,
        prefixes={"kohya": prefix},
        file_path=lambda path: path if path.startswith("text_model.") else f"text_model.{path}",
        sample_inputs=lambda: text_inputs(module),
    )


class Language(NamedTuple):
    """What is adapted of a kind of language model."""

    targets: tuple[str, ...]
    fused: str = ""
    """The layer that computes queries, keys and values together."""


LANGUAGE: Mapping[str, Language] = {
    "roberta": Language(("query", "value")),
    "gpt2": Language(("c_attn", "c_proj", "c_fc"), fused="c_attn"),
    "llama": Language(("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")),
}
"""By `model_type` of transformers: the layers that the SingLoRA paper adapts (arXiv 2507.05566, section 6.1)."""


def language_model(name: str, module: nn.Module) -> NetworkSpec:
    """A network of transformers. Of a kind that `LANGUAGE` does not list, the layers must be named.

    A fused layer (GPT-2's `c_attn`, out = 3 in) is adapted as the one weight that it is: SingLoRA's A has a row for
    each of its outputs, of which the first, those of the queries, also stand on the side of the inputs.
    """
    config: Any = module.config
    row = LANGUAGE.get(config.model_type, Language(()))
    return NetworkSpec(
        name,
        module,
        "denoiser",
        row.targets,
        fused=dict.fromkeys(PARTS, row.fused) if row.fused else {},
        sample_inputs=lambda: text_inputs(module),
    )


def t5_encoder(name: str, module: nn.Module, prefix: str) -> NetworkSpec:
    """A T5EncoderModel of transformers. No training script of diffusers adapts it, so its layers must be named."""
    return NetworkSpec(
        name,
        module,
        "text",
        targets=(),
        presets={"t5_attention": T5_ATTENTION},
        prefixes={"kohya": prefix},
        sample_inputs=lambda: text_inputs(module),
    )


def unet_inputs(module: nn.Module) -> dict[str, Any]:
    """A batch of two small random latents with text, as a UNet takes them; SDXL's pooled text and sizes too."""
    config: Any = module.config
    draw = normal(module)
    side = 2 ** len(config.down_block_types)
    inputs: dict[str, Any] = {
        "sample": draw(2, config.in_channels, side, side),
        "timestep": torch.tensor(500, device=next(module.parameters()).device),
        "encoder_hidden_states": draw(2, 5, config.cross_attention_dim),
    }
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6).abs()}
    return inputs


def text_inputs(module: nn.Module) -> dict[str, Any]:
    """Two short random texts as token ids."""
    config: Any = module.config
    length = min(8, getattr(config, "max_position_embeddings", 8))  # T5 takes any length
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.to(next(module.parameters()).device)}


def normal(module: nn.Module) -> Callable[..., Tensor]:
    """Draws of a standard normal variable on a module's device and in its dtype, the same each time."""
    generator, like = torch.Generator().manual_seed(1), next(p for p in module.parameters() if p.is_floating_point())
    return lambda *shape: torch.randn(*shape, generator=generator).to(like)
