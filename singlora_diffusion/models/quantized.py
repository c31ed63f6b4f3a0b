"""Frozen linear layers in few bits, by libraries, under adapters in float32 (arXiv 2305.14314).

The libraries' loaders need a GPU or know only their own classes of models, so the layers are replaced here, after
loading and one at a time: the GPU never holds more than the packed network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError


class Quantization(NamedTuple):
    """A way to pack a weight: the library, what a number takes, and a function of a linear layer and a device to a
    packed layer there."""

    library: str
    bytes: float
    pack: Callable[[nn.Linear, str], nn.Linear]


def _nf4(layer: nn.Linear, device: str) -> nn.Linear:
    """4 bits a number by bitsandbytes, in blocks of 64 with a scale each, the scales in 8 bits."""
    library: Any = import_module("bitsandbytes").nn
    with torch.device("meta"):
        packed = library.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
    packed.compute_dtype, packed.compute_type_is_set = layer.weight.dtype, True
    packed.weight = library.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    packed.bias = layer.bias
    packed.support_avx512bf16_for_cpu = False  # it would repack the weight in a form that takes no narrow layers
    packed.to(device)
    return packed


def _int8(layer: nn.Linear, device: str) -> nn.Linear:
    """8 bits a number by torchao, with a scale for each row."""
    library: Any = import_module("torchao.quantization")
    library.quantize_(layer.to(device), library.Int8WeightOnlyConfig())
    return layer


QUANTIZATIONS: Mapping[str, Quantization] = {
    "nf4": Quantization("bitsandbytes", 0.5, _nf4),
    "int8": Quantization("torchao", 1, _int8),
}
"""By the names that `--quantize` takes."""


def check(name: str) -> None:
    """
    Raises:
        UserError: its library is not installed, or does not load.
    """
    library = QUANTIZATIONS[name].library
    try:
        import_module(library)
    except ImportError as error:
        install = 'pip install "singlora-diffusion[quantize]"'
        raise UserError(f"--quantize {name} needs {library}, which does not load ({error}): {install}") from error


def quantize(network: nn.Module, name: str, device: str) -> None:
    """Pack the linear layers of a frozen network on the CPU, in place, each onto `device`.

    Layers that share their weight with an embedding stay, and those that transformers keeps in float32 (T5's `wo`).
    """
    shared = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    for path, layer in list(network.named_modules()):
        names = path.split(".")
        if type(layer) is nn.Linear and id(layer.weight) not in shared and not set(kept) & set(names):
            owner = network.get_submodule(path.rpartition(".")[0])
            setattr(owner, names[-1], QUANTIZATIONS[name].pack(layer, device).eval())


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is packed: no ordinary tensor of floats."""
    weight: Any = layer.weight
    return type(weight.data) is not Tensor or not weight.is_floating_point()


def dequantized(layer: nn.Module) -> Tensor:
    """The weight that a layer multiplies by, (out, in): unpacked where it is packed, else the live one."""
    weight: Any = layer.weight
    if not is_quantized(layer):
        plain: Tensor = weight
        return plain
    if hasattr(weight, "quant_state"):
        unpack: Any = import_module("bitsandbytes.functional").dequantize_4bit
        found: Tensor = unpack(weight.data, weight.quant_state)
    else:
        found = weight.dequantize()
    return found.detach()
