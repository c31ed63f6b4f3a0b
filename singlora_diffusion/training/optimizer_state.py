"""Any optimizer's state as named tensors and JSON, bit for bit: no pickle, and no order to rely on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter

Numbers = dict[str, Any]
"""{"state": {parameter: {key: number}}, "groups": [{key: number}, ...]}; JSON gives floats back to the bit."""


def of(adapter: Adapter, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Numbers]:
    """What the optimizer keeps of each parameter, found by identity and named as in files, and of its groups."""
    names = {tensor.data_ptr(): name for name, tensor in adapter.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {"state": {}, "groups": []}
    for parameter, state in optimizer.state.items():
        name = names[parameter.data_ptr()]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
            elif _is_number(value):
                numbers["state"].setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        numbers["groups"].append({key: value for key, value in group.items() if _is_number(value)})
    return tensors, numbers


def restore(
    adapter: Adapter, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put it into a fresh optimizer.

    Raises:
        ValueError: it is of another adapter, or no state at all.
    """
    parameters = {p.data_ptr(): p for group in optimizer.param_groups for p in group["params"]}
    stored = {name: parameters.get(tensor.data_ptr()) for name, tensor in adapter.state_dict().items()}
    own = {name: parameter for name, parameter in stored.items() if parameter is not None}
    found: dict[str, dict[str, Any]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        parameter = own.get(name)
        if parameter is None:
            raise ValueError(f"{name} is no tensor of this adapter")
        if value.ndim == parameter.ndim and value.shape != parameter.shape and key.startswith("exp_avg"):
            raise ValueError(f"moments of {name} have another shape")
        # Most keep their step count on the CPU; what has a shape lives beside the parameter.
        stays = value.ndim == 0 and not optimizer.defaults.get("fused")
        found.setdefault(name, {})[key] = value if stays else value.to(parameter.device)
    for name, values in numbers.get("state", {}).items():
        found.setdefault(name, {}).update({key: value for key, value in values.items() if _is_number(value)})
    for name, values in found.items():
        optimizer.state[own[name]] = values
    for group, saved in zip(optimizer.param_groups, numbers.get("groups", ()), strict=False):
        group.update({key: value for key, value in saved.items() if key != "lr" and _is_number(value)})


def _is_number(value: object) -> bool:
    """What JSON can say; an infinite one is a setting that means `no limit`, and never changes."""
    return isinstance(value, bool | int | float) and math.isfinite(value)
