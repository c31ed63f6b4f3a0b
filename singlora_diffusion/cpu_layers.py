"""A frozen network's layers in the forms that a CPU is quick at: same weights, same answers, fewer seconds.

Two things cost more there than the arithmetic itself:

* A convolution lays its whole weight out anew at each call. Where the map is small, as in the inner half of a UNet,
  that is most of its time. There it is computed as one product of patches with the weight as it lies in memory.
* Without matrix units (AMX) a product of bfloat16 numbers takes longer than one of float32. Where there are rows enough
  to pay for converting the weight, the product is computed in float32 and rounded once at the end, and so is attention.

Nothing is kept besides: neither form stores a second copy of a weight, for the backward pass included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .attention_view import AttentionView

SMALL_MAP, LARGE_WEIGHT = 1 / 4, 1_000_000
"""A convolution is computed as a product up to so many output positions in its batch for each output channel, if its
weight has so many numbers."""
LARGE_MAP = 512
"""From so many output positions on, a convolution of bfloat16 numbers is quicker in float32."""
ENOUGH_ROWS, ENOUGH_WEIGHT = 128, 100_000
"""From so many rows, and numbers in the weight, on, float32 gains more than converting x, weight and y costs."""
PART = 1 << 21
"""Numbers of a weight converted at a time: larger pieces are fetched from the system anew each time, page by page."""


def prepare(network: nn.Module) -> nn.Module:
    """Give those layers and attentions of `network` that gain by them the forms above, in place; returns it.

    Values, names and shapes of parameters stay as they are. Layers that are trained themselves compute as before, and
    so does everything on other devices.
    """
    for module in network.modules():
        if type(module) is nn.Linear and _is_slow(module.weight):
            module.__class__ = CpuLinear
        elif type(module) is nn.Conv2d and _can_change(module):
            module.__class__ = CpuConv2d
        elif isinstance(module, Attention) and _can_widen(module):
            module.set_processor(CpuAttnProcessor(module.processor))
    return network


def _can_change(layer: nn.Conv2d) -> bool:
    usual = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return usual and (_is_slow(layer.weight) or layer.weight.numel() >= LARGE_WEIGHT)


def _can_widen(attention: Any) -> bool:
    stock = type(attention.processor) is AttnProcessor2_0 and attention.norm_q is None
    return stock and _is_slow(attention.to_q.weight)


def product_dtype(x: Tensor, weight: Tensor, rows: int) -> torch.dtype:
    """In what dtype a product of `rows` rows made of x with a weight is quickest: that of x, or float32."""
    enough = rows >= ENOUGH_ROWS and weight.numel() >= ENOUGH_WEIGHT
    return torch.float32 if enough and _is_slow(x) else x.dtype


def _is_slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not QUICK_AT_BFLOAT16


def _quick_at_bfloat16() -> bool:
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # the oldest torch that will do cannot say
    return has.get("architecture") != "x86_64" or bool(has.get("amx_bf16"))


QUICK_AT_BFLOAT16 = _quick_at_bfloat16()  # here once: torch.compile cannot look into the call
"""Whether this CPU has matrix units for bfloat16 (AMX), or is of a kind that was not measured."""


def _stands_for(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether the forms here may take a layer's place: on a CPU, not trained itself, nobody else ruling the dtypes."""
    trained = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    here = x.device.type == "cpu" and x.dtype == layer.weight.dtype
    return here and not trained and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if x.dtype == weight.dtype else _Product.apply(x, weight, bias)


class CpuLinear(nn.Linear):
    """x (..., in) to (..., out) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if not _stands_for(self, x):
            return super().forward(x)
        wide = product_dtype(x, self.weight, x.shape[:-1].numel())
        return _product(x.to(wide), self.weight, self.bias).to(x.dtype)


class CpuConv2d(nn.Conv2d):
    """x (N, C, h, w) to (N, C', h', w') in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if not _stands_for(self, x):
            return super().forward(x)
        height, width = self._positions(0, x.shape[-2]), self._positions(1, x.shape[-1])
        rows = len(x) * height * width
        if rows <= SMALL_MAP * self.out_channels and self.weight.numel() >= LARGE_WEIGHT:
            # Patches overlap, so that their gradients add up: in float32 at least.
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            patches = F.unfold(exact, self.kernel_size, self.dilation, self.padding, self.stride)  # type: ignore[arg-type]
            wide = product_dtype(x, self.weight, rows)
            y = _product(patches.mT.reshape(rows, -1).to(wide), self.weight.flatten(1), self.bias)  # (N h' w', C')
            return y.to(x.dtype).view(len(x), height, width, -1).permute(0, 3, 1, 2)
        if rows >= LARGE_MAP and _is_slow(x):
            return _Convolution.apply(x, self.weight, self.bias, (self.stride, self.padding, self.dilation))
        return super().forward(x)

    def _positions(self, axis: int, size: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        return (size + 2 * int(self.padding[axis]) - reach - 1) // self.stride[axis] + 1


class CpuAttnProcessor:
    """An attention processor whose attention is computed in float32 where that is quicker; the projections as ever."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not _is_slow(hidden_states) or torch.is_autocast_enabled("cpu"):
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        narrow = hidden_states.dtype
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with nullcontext() if torch.compiler.is_compiling() else _kept_as(narrow):
            return self.inner(
                _widened(attn, narrow), hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs
            )


def _kept_as(narrow: torch.dtype) -> AbstractContextManager[None]:
    """The wide tensors of attention itself, those by heads, wait for the backward pass narrow, as in a stock one.

    Queries, keys and values lose nothing by it: they came out of their projections narrow.
    """

    def pack(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
        by_heads = tensor.dtype == torch.float32 and tensor.dim() == 4
        return tensor.to(narrow) if by_heads else tensor, tensor.dtype

    def unpack(kept: tuple[Tensor, torch.dtype]) -> Tensor:
        return kept[0].to(kept[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _widened(attention: Any, narrow: torch.dtype) -> AttentionView:
    """Queries, keys and values come out as float32, the answer goes in `narrow`."""
    wide: dict[str, Callable[[Tensor], Tensor]] = {
        "to_q": lambda x: attention.to_q(x).float(),
        "to_k": lambda x: attention.to_k(x).float(),
        "to_v": lambda x: attention.to_v(x).float(),
        "to_out.0": lambda x: attention.to_out[0](x.to(narrow)),
    }
    return AttentionView(attention, wide)


class _Product(torch.autograd.Function):
    """x W^T + b in the dtype of x; a narrower W is converted by parts in each direction, not kept wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(weight))
        for part, columns in zip(_parts(weight), y.split(_height(weight), dim=1), strict=True):
            torch.mm(rows, part.to(x.dtype).T, out=columns)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        rows = dy.reshape(-1, len(weight))
        dx = rows.new_zeros(len(rows), weight.shape[1])
        for part, columns in zip(_parts(weight), rows.split(_height(weight), dim=1), strict=True):
            dx.addmm_(columns, part.to(dy.dtype))
        return dx.view(*dy.shape[:-1], -1), None, None


def _height(weight: Tensor) -> int:
    return max(1, PART // weight.shape[1])


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(_height(weight))


class _Convolution(torch.autograd.Function):
    """`F.conv2d` computed in float32; the weight is converted in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.shape = geometry, x.shape
        return F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), *geometry).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight.float(), dy.float(), *ctx.geometry).to(dy.dtype), None, None, None
