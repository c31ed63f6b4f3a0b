"""How the outside world spells layers and tensors. Ours: `unet.<path>`, `text_encoder.text_model.<path>`.

What each tool reads was tried on diffusers 0.42 and read in the sources of ComfyUI, A1111 and kohya's sd-scripts:
    kohya       lora_unet_<path with _>.lora_down.weight / .lora_up.weight / .alpha, lora_te_text_model_<path with _>...
    peft        <ours>.lora_A.weight / .lora_B.weight, scale folded: PEFT takes alpha = rank for granted
    diffusers   unet.<path>.lora.down.weight, text_encoder.text_model.<path>.lora_linear_layer.down.weight, scale folded
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..models.network import Networks, NetworkSpec, specs

# What a tensor is by the end of its name, longest first: `down` (k, in), `up` (out, k), `one` SingLoRA's A.
ROLES = {
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


class Tagged(NamedTuple):
    """A tensor's name taken apart: the layer as the file spells it, and what the tensor is to it."""

    layer: str
    role: str


def tag(key: str) -> Tagged | None:
    """Take a tensor's name apart; None if it is no adapter tensor."""
    for ending, role in ROLES.items():
        if key.endswith(ending):
            layer = key.removesuffix(ending)
            for prefix in ("base_model.model.", "module."):
                layer = layer.removeprefix(prefix)
            return Tagged(layer, role)
    return None


def kohya(name: str) -> str:
    """`unet.a.b` -> `lora_unet_a_b`; `text_encoder.text_model.a` -> `lora_te_text_model_a`."""
    network, _, path = name.partition(".")
    return f"lora_{'te' if network == 'text_encoder' else network}_{path.replace('.', '_')}"


def spellings(networks: Networks) -> dict[str, str]:
    """Our name of each linear or convolutional layer of the networks by every spelling that files use for it."""
    found: dict[str, str] = {}
    for network, path, name, _ in _layers(networks):
        found[name] = found[kohya(name)] = name
        if network.role == "denoiser":
            found[path] = name
            head, _, last = path.removesuffix(".0").rpartition(".")
            if last in ("to_q", "to_k", "to_v", "to_out"):  # diffusers before 0.22
                found[f"unet.{head}.processor.{last}"] = name
        else:
            short = name.replace(".text_model.", ".", 1)
            found[short] = found[kohya(short)] = found[kohya(name).replace("lora_te_", "lora_te1_", 1)] = name
            head, _, last = name.rpartition(".")
            if last.endswith("_proj"):
                found[f"{head}.to_{last.removesuffix('_proj')}"] = name
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
