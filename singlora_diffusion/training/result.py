"""The adapter's file at the end of a training: written, read back, and compared with the live model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..adapters import Adapter
from ..errors import UserError
from ..models import Family
from ..models.network import NetworkSpec
from .material import Material
from .recipe import Recipe, without_folders


def about(recipe: Recipe, family: Family, found: Material, resolution: int) -> dict[str, Any]:
    """What the header of an adapter file says of its training; equal trainings say the same.

    `base_model` and another autoencoder stay as the user named them: generating loads them.
    """
    return {
        "family": family.name,
        "base_model": family.source,
        "base_hash": family.fingerprint,
        "prediction_type": family.noise_process.prediction_type,
        "instance_prompt": found.prompt,
        "identifier": found.subject.identifier,
        "class_noun": found.subject.class_noun,
        "resolution": resolution,
        "images": len(found.instance),
        "recipe": without_folders(recipe),
    }


def save(family: Family, adapter: Adapter, path: Path, header: Mapping[str, Any]) -> None:
    """Write the adapter's file and prove that a model made from it computes what the live one does.

    The adapter is detached.

    Raises:
        UserError: the file cannot be written, or a model made from it computes something else.
    """
    formats.save(adapter, path, about=header)
    adapted = adapter.networks
    live = outputs(adapted)
    adapter.detach()
    read_back = formats.load(path, family.networks)
    same = torch.equal(live, outputs(adapted))
    read_back.detach()
    if not same:
        raise UserError(f"{path} does not compute what the model did that it was saved from: do not use it")


def outputs(networks: Mapping[str, NetworkSpec]) -> Tensor:
    """What networks make of their sample inputs, flat, float32."""
    with torch.inference_mode():
        outputs = [network.module(**network.sample_inputs())[0] for network in networks.values()]
        return torch.cat([output.float().flatten().cpu() for output in outputs])
