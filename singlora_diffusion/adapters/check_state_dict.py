"""Whether tensors from outside fit an adapter: asked before any of them is copied in, whoever trains the adapter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UserError


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise a UserError that names the first tensor of `state` that does not fit `own`."""
    for key, tensor in own.items():
        if key not in state:
            raise UserError(f"the adapter has no tensor {key}: it was made for another model or other targets")
        if state[key].shape != tensor.shape:
            found, wanted = tuple(state[key].shape), tuple(tensor.shape)
            raise UserError(f"{key} has shape {found}, not {wanted}: it was made for another model or another rank")
    for key in state:
        if key not in own:
            raise UserError(f"the adapter has a tensor {key} that this model has no place for")
