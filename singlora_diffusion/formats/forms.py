"""The forms that a LoRA file can be written in for a base model, and the programs that read each.

Read in the sources of the programs; docs/files.md says which versions. A form is offered only if diffusers loads it,
since that is how an export is verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UserError
from ..models.network import Networks, specs


@dataclass(frozen=True)
class Form:
    """One form for one kind of denoiser."""

    readers: str
    """The programs that read it."""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By program, ends of layers' names without which it does not recognise a file."""
    warning: str = ""
    """What becomes of it elsewhere; `{text}` of `{all}` layers are the text encoders'."""


ONLY_DIFFUSERS = (
    "this form is for diffusers: ComfyUI applies {text} of the {all} layers (the text encoders'), "
    "Forge refuses it, A1111 applies none: --format kohya is for these"
)
UNET = {
    "kohya": Form(
        "ComfyUI, A1111, Forge, SD.Next, InvokeAI, kohya's sd-scripts, diffusers",
        needs={"InvokeAI": ("attn2.to_k", "attn2.to_v")},
    ),
    "peft": Form("diffusers", warning=ONLY_DIFFUSERS),
    "diffusers": Form("diffusers", warning=ONLY_DIFFUSERS),
}
TABLE: Mapping[str, Mapping[str, Form]] = {
    "UNet2DConditionModel": UNET,
    "SD3Transformer2DModel": {"peft": Form("ComfyUI, stable-diffusion.cpp, diffusers")},
    "FluxTransformer2DModel": {
        "peft": Form(
            "ComfyUI, Forge, InvokeAI, stable-diffusion.cpp, diffusers",
            needs={"InvokeAI": ("single_transformer_blocks.0.attn.to_q", ".transformer_blocks.0.attn.add_q_proj")},
        ),
        "kohya": Form("ComfyUI, Forge, SD.Next, InvokeAI, stable-diffusion.cpp, kohya's sd-scripts, diffusers"),
    },
    "Flux2Transformer2DModel": {"peft": Form("ComfyUI, InvokeAI, diffusers")},
}
"""By the denoiser's class; the first of each is the default. kohya's form of FLUX.1 has the most readers, but its fused
pairs are mostly zeros: the file is two to five times as large."""


def of(networks: Networks) -> Mapping[str, Form]:
    """The forms for a base model, the default first; none for a language model."""
    denoisers = [one.module for one in specs(networks).values() if one.role == "denoiser"]
    if any(hasattr(getattr(module, "config", None), "model_type") for module in denoisers):
        return {}
    kinds = [type(module).__name__ for module in denoisers]
    return TABLE.get(kinds[0], UNET) if kinds else UNET


def chosen(name: str | None, networks: Networks) -> str:
    """A form by name, or the default.

    Raises:
        UserError: there is no such form for this base model.
    """
    forms = of(networks)
    if not forms:
        raise UserError("no program for images reads adapters of language models: use formats.export_peft")
    if name is not None and name not in forms:
        raise UserError(f"--format {name}: not for this base model, choose {' or '.join(forms)}")
    return name or next(iter(forms))
