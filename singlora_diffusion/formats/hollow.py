"""Networks whose weights are zeros that take no memory, for handling adapters of models that do not fit into it.

An adapter's file depends on the names and shapes of layers alone, unless it has magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import device
from ..models.network import NetworkSpec


def fit(networks: Mapping[str, NetworkSpec]) -> bool:
    """Whether the weights of these networks, which may be on the meta device, fit into free memory as float32."""
    numbers = sum(one.numel() for network in networks.values() for one in network.module.parameters())
    return 4 * numbers < device.free_memory("cpu")


def fill(networks: Mapping[str, NetworkSpec]) -> None:
    """Give networks on the meta device weights on the CPU: float32 zeros, each tensor one number seen many times."""
    for network in networks.values():
        for module in network.module.modules():
            for name, tensor in module.named_parameters(recurse=False):
                zeros = torch.zeros(()).expand(tensor.shape)
                module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
        network.module.eval()
