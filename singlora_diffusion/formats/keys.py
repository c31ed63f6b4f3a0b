"""How programs spell layers and tensors. Ours: `unet.<path>`, `text_encoder.text_model.<path>`, as each spec says.

What each tool reads was tried on diffusers 0.42 and read in the sources of ComfyUI, A1111 and kohya's sd-scripts:
    kohya       lora_unet_<path with _>.lora_down.weight / .lora_up.weight / .alpha, lora_te_text_model_<path with _>...
                The path is that of the network which kohya's tools train: diffusers' UNet for Stable Diffusion 1 and 2,
                the original implementation (`original_names`) for all others.
    peft        <ours>.lora_A.weight / .lora_B.weight, scale folded: PEFT takes alpha = rank for granted
    diffusers   unet.<path>.lora.down.weight, text_encoder.text_model.<path>.lora_linear_layer.down.weight, scale folded
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..models.network import Networks, NetworkSpec, network_of, specs
from . import original_names
from .original_names import Place


class Endings(NamedTuple):
    """What a form puts behind a layer's name for the two factors of a pair."""

    up: str
    down: str


KOHYA = Endings(".lora_up.weight", ".lora_down.weight")
PEFT = Endings(".lora_B.weight", ".lora_A.weight")
DIFFUSERS = {
    "denoiser": Endings(".lora.up.weight", ".lora.down.weight"),
    "text": Endings(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
}
MAGNITUDE = {"denoiser": ".lora_magnitude_vector", "text": ".lora_magnitude_vector.weight"}
"""transformers 5 starts a magnitude afresh, with no more than a warning, unless its name ends in `.weight`."""

# What a tensor is by the end of its name, longest first: `down` (k, in), `up` (out, k), `one` SingLoRA's A.
PARTS = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".training_step_default": "step",
    ".original_layer.weight": "base",
    ".original_layer.bias": "base",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default": "one",
    ".training_step": "step",
    ".dora_scale": "magnitude",
    ".lora_A": "one",
    ".alpha": "alpha",
    ".A": "one",
}
PEFT_WRAPPER = "base_model.model."
"""What PEFT writes before each name; alpha and rank are in an adapter_config.json beside the file then."""
WRAPPERS = (PEFT_WRAPPER, "module.")
DENOISER_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model.", "model.diffusion_model.", "")
"""What programs write before a path in the denoiser, besides its name: kohya's, OneTrainer's, LyCORIS', ComfyUI's and
ai-toolkit's, or nothing."""
TEXT_PREFIXES = {
    "lora_te": ("lora_te1_",),
    "lora_te1": ("lora_te_", "text_encoders.clip_l.transformer."),
    "lora_te2": ("text_encoders.clip_g.transformer.",),
    "lora_te3": ("lora_te2_", "text_encoders.t5xxl.transformer."),
}
"""By kohya's prefix of a text encoder, what some programs write before its paths: ComfyUI its own names, OneTrainer
`lora_te2_` for FLUX.1's T5."""
OLD_PROJECTIONS = {"to_q", "to_k", "to_v", "to_out"}  # diffusers before 0.22 kept them in attention processors


class Tagged(NamedTuple):
    """A tensor's name taken apart: the layer as the file spells it, and what the tensor is to it."""

    layer: str
    part: str


def tag(key: str) -> Tagged | None:
    """Take a tensor's name apart; None if it is no adapter tensor."""
    for ending, part in PARTS.items():
        if key.endswith(ending):
            layer = key.removesuffix(ending)
            for prefix in WRAPPERS:
                layer = layer.removeprefix(prefix)
            return Tagged(layer, part)
    return None


class Piece(NamedTuple):
    """One of our layers that a layer of a file is about; `rows` of it, in the order ours has them, empty: all."""

    name: str
    rows: tuple[range, ...] = ()


def kohya(network: NetworkSpec) -> dict[str, Place]:
    """Where each layer that can be adapted is in a file of kohya's form, by our name: the key without its ending."""
    original = original_names.of(network.module) if _trained_as_original(network.module) else {}
    found: dict[str, Place] = {}
    for path, layer in network.module.named_modules():
        if hasattr(layer, "weight"):
            place = original.get(path, Place(network.file_path(path)))
            found[network.layer(path)] = place._replace(layer=_joined(f"{network.prefix('kohya')}_", place.layer))
    return found


def _trained_as_original(module: nn.Module) -> bool:
    """Whether kohya's tools train the original implementation; of UNets that is Stable Diffusion XL's alone."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "addition_embed_type", "text_time") == "text_time"


def _joined(prefix: str, path: str) -> str:
    """A layer's name after a prefix, which says by its last character whether names are joined by `_` or by `.`."""
    return prefix + (path.replace(".", "_") if prefix.endswith("_") else path)


def spellings(networks: Networks) -> dict[str, tuple[Piece, ...]]:
    """Our layers, linear and convolutional, by every spelling that files use for them or for a layer made of them."""
    found: dict[str, tuple[Piece, ...]] = {}
    for network in specs(networks).values():
        found |= _denoiser(network) if network.role == "denoiser" else _text_encoder(network)
    return found


def _denoiser(network: NetworkSpec) -> dict[str, tuple[Piece, ...]]:
    pieces: dict[str, list[Piece]] = {}
    layers = dict(_layers(network))
    for path, place in original_names.of(network.module).items():
        if path in layers:
            pieces.setdefault(place.layer, []).append(Piece(layers[path], place.rows))
    for path, name in layers.items():
        pieces[path] = [Piece(name)]
        head, _, last = path.removesuffix(".0").rpartition(".")
        if last in OLD_PROJECTIONS:
            pieces[f"{head}.processor.{last}"] = [Piece(name)]
    prefixes = (f"{network.name}.", *DENOISER_PREFIXES)
    return {_joined(prefix, path): tuple(those) for path, those in pieces.items() for prefix in prefixes}


def _text_encoder(network: NetworkSpec) -> dict[str, tuple[Piece, ...]]:
    kohya_ = network.prefix("kohya")
    prefixes = (f"{network.name}.", f"{kohya_}_", *TEXT_PREFIXES.get(kohya_, ()))
    found: dict[str, tuple[Piece, ...]] = {}
    for path, name in _layers(network):
        spelled = {name.partition(".")[2], path}  # transformers 5 has no `text_model.` where files do
        head, _, last = name.partition(".")[2].rpartition(".")
        if last.endswith("_proj"):
            spelled.add(f"{head}.to_{last.removesuffix('_proj')}")
        found |= {_joined(prefix, one): (Piece(name),) for prefix in prefixes for one in spelled}
    return found


def modules(networks: Networks) -> dict[str, nn.Module]:
    """The linear and convolutional layers of the networks by our name."""
    return {
        name: network.module.get_submodule(path)
        for network in specs(networks).values()
        for path, name in _layers(network)
    }


def _layers(network: NetworkSpec) -> list[tuple[str, str]]:
    """Path inside the network and our name of each linear or convolutional layer."""
    return [
        (path, network.layer(path))
        for path, layer in network.module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def target(name: str) -> str:
    """The target that picks a layer: the last step of its path, two where the last is a number."""
    steps = name.split(".")
    return ".".join(steps[-2:] if steps[-1].isdigit() else steps[-1:])


def by_network(names: Mapping[str, object] | list[str]) -> dict[str, list[str]]:
    """Layers by the network they are in."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(network_of(name), []).append(name)
    return found
