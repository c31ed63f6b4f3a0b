"""Settings of trainings that somebody has published or measured, by base model, each with where its numbers come from.

A preset has what its source states; the rest is left to the recipe's defaults. Knows no Gradio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import models
from ..models.hub import PACKAGED
from ..training.recipe import Recipe
from . import fields


@dataclass(frozen=True)
class Preset:
    """Settings for one kind of base model.

    Attributes:
        of: a model of the package by name, or a family.
        values: by the flags' names.
        source: where they come from, and whether they were measured here.
    """

    of: str
    name: str
    values: Mapping[str, Any]
    source: str

    @property
    def key(self) -> str:
        """Its name, which no other has."""
        return f"{self.of}: {self.name}"


def _script(of: str, file: str, but: str = "", **values: Any) -> Preset:
    """Defaults of a script of diffusers. It counts epochs, so it says nothing of the steps."""
    shared = {"method": "lora", "rank": 4, "learning_rate": 1e-4, "train_batch_size": 4, "resolution": 512}
    source = f"The defaults of diffusers' {file}{but}, which states no number of steps. Not measured here."
    return Preset(of, "LoRA, as in diffusers' script", {**shared, **values}, source)


def _example(of: str, page: str, **values: Any) -> Preset:
    """The command with which a family's page in docs/families begins."""
    shared = {"mixed_precision": "bf16", "train_batch_size": 1, "gradient_checkpointing": True}
    source = (
        f"The example of docs/families/{page}.md. The learning rate, where it is left empty, is that of diffusers' "
        f"script for LoRA. Not measured here."
    )
    return Preset(of, "SingLoRA, for a GPU of little memory", {"method": "singlora", **shared, **values}, source)


PRESETS = (
    Preset(
        "toyworld",
        "SingLoRA, the default recipe",
        {"method": "singlora", "rank": 16, "max_train_steps": 400, "learning_rate": 1e-3, "train_batch_size": 4},
        "Measured here on six subjects, beside a third of the rate and three times the rate: docs/measurements.md, "
        "“The default recipe”.",
    ),
    Preset(
        "toyworld-flow",
        "SingLoRA, the rate of toyworld-flow",
        {"method": "singlora", "learning_rate": 3e-3},
        "Measured here on two subjects, against 1e-3, with SingLoRA alone: docs/methods.md, “Learning rates”.",
    ),
    Preset(
        "stable_diffusion",
        "SingLoRA, as published",
        {"method": "singlora", "rank": 16, "max_train_steps": 400, "learning_rate": 1e-3, "targets": ["to_q", "to_k"]},
        "arXiv 2507.05566, section 6.2, on Stable Diffusion 1.5: the UNet's query and key projections, 400 iterations. "
        "It states no batch size, alpha or resolution. Not measured here.",
    ),
    _script("stable_diffusion", "train_dreambooth_lora.py", learning_rate=5e-4, random_crop=True),
    _example("stable_diffusion_xl", "stable-diffusion-xl", max_train_steps=500),
    _script("stable_diffusion_xl", "train_dreambooth_lora_sdxl.py", resolution=1024, adam_weight_decay=1e-4),
    _example("stable_diffusion_3", "stable-diffusion-3", max_train_steps=500),
    _script(
        "stable_diffusion_3",
        "train_dreambooth_lora_sd3.py",
        ", but for the loss, which it weighs by s²",
        weighting_scheme="logit_normal",
    ),
    _example("flux", "flux", max_train_steps=1000, resolution=512, quantize="nf4"),
    _script(
        "flux", "train_dreambooth_lora_flux.py", ", but for its guidance of 3.5 in training", targets=["attention+mlp"]
    ),
    _example("flux_2", "flux-2-klein", max_train_steps=750, resolution=768),
    _script("flux_2", "train_dreambooth_lora_flux2_klein.py"),
)
TOUCHED = tuple(dict.fromkeys(name for preset in PRESETS for name in preset.values))
"""The settings that some preset names."""


def offered(base: str) -> tuple[Preset, ...]:
    """The presets for a base model.

    Raises:
        UserError: it cannot be found out of which family it is.
    """
    kind = base if base in PACKAGED else models.family_of(base)
    return tuple(preset for preset in PRESETS if preset.of == kind)


def chosen(base: str, key: str | None) -> Preset | None:
    """The preset of this key, if it is for the base model.

    Raises:
        UserError: as `offered`.
    """
    return next((preset for preset in offered(base) if preset.key == key), None) if key else None


def held(preset: Preset | None) -> dict[str, bool | str]:
    """What the fields of `TOUCHED` hold with a preset. Without one, and where it says nothing: the defaults."""
    texts = fields.held(Recipe, {} if preset is None else preset.values)
    return {name: texts[name] for name in TOUCHED}
