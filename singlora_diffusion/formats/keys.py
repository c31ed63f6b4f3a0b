"""How programs spell layers and tensors. Ours: `unet.<path>`, `text_encoder.text_model.<path>`, as each spec says.

What each tool reads was tried on diffusers 0.42 and read in the sources of ComfyUI, A1111 and kohya's sd-scripts:
    kohya       lora_unet_<path with _>.lora_down.weight / .lora_up.weight / .alpha, lora_te_text_model_<path with _>...
    peft        <ours>.lora_A.weight / .lora_B.weight, scale folded: PEFT takes alpha = rank for granted
    diffusers   unet.<path>.lora.down.weight, text_encoder.text_model.<path>.lora_linear_layer.down.weight, scale folded
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ..models.network import Networks, NetworkSpec, specs


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
WRAPPERS = ("base_model.model.", "module.")
ALSO_READ = {"lora_te": ("lora_te1",), "lora_te1": ("lora_te",)}
"""Other prefixes that some programs write for a network of this one."""
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


def kohya(network: NetworkSpec, name: str) -> str:
    """`unet.a.b` -> `lora_unet_a_b`; `text_encoder.text_model.a` -> `lora_te_text_model_a`."""
    return _kohya(network.prefix("kohya"), name)


def _kohya(prefix: str, name: str) -> str:
    return f"{prefix}_{name.partition('.')[2].replace('.', '_')}"


def spellings(networks: Networks) -> dict[str, str]:
    """Our name of each linear or convolutional layer of the networks by every spelling that files use for it."""
    found: dict[str, str] = {}
    for network, path, name, _ in _layers(networks):
        own = network.prefix("kohya")
        also = [path] if network.role == "denoiser" else [f"{network.name}.{path}"]  # without `text_model.`
        for spelling in (name, f"{network.name}.{path}"):
            also += [spelling, *(_kohya(prefix, spelling) for prefix in (own, *ALSO_READ.get(own, ())))]
        head, _, last = path.removesuffix(".0").rpartition(".")
        if network.role == "denoiser" and last in OLD_PROJECTIONS:
            also.append(f"{network.name}.{head}.processor.{last}")
        if network.role == "text" and last.endswith("_proj"):
            also.append(f"{name.rpartition('.')[0]}.to_{last.removesuffix('_proj')}")
        found |= dict.fromkeys(also, name)
    return found


def modules(networks: Networks) -> dict[str, nn.Module]:
    """The linear and convolutional layers of the networks by our name."""
    return {name: layer for _, _, name, layer in _layers(networks)}


def _layers(networks: Networks) -> list[tuple[NetworkSpec, str, str, nn.Module]]:
    return [
        (network, path, network.layer(path), layer)
        for network in specs(networks).values()
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
        found.setdefault(name.partition(".")[0], []).append(name)
    return found
