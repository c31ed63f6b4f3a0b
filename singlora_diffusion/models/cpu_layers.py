"""A frozen network's layers in the forms that a CPU is quick at: same weights, same answers, fewer seconds.

Two things cost more there than the arithmetic itself:

* A convolution lays its whole weight out anew at each call. Where the map is small, as in the inner half of a UNet,
  that is most of its time. There it is computed as one product of the weight, as it lies in memory, with patches. For a
  kernel of 1 x 1 the map is all the patches there are, and that pays at any size.
* Without matrix units (AMX) a product of bfloat16 numbers takes longer than one of float32. Where there are rows enough
  to pay for converting the weight, the product is computed in float32 and rounded once at the end, and so are
  convolutions and attention.

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

FEW = 96
"""With fewer rows, or positions in the maps of a batch, fetching a weight takes longer than computing with it: there
convolutions become products, and bfloat16 stays bfloat16. From here on bfloat16 is computed in float32."""
LARGE_WEIGHT, VERY_LARGE_WEIGHT = 100_000, 1_000_000
"""Numbers in a weight from which on float32 gains more than converting x and y costs, and patches more than cutting
them out."""
SLOW_MAP = 20_480
"""Up to so many numbers in one picture's map, PyTorch leaves a float32 convolution to its own slow form."""
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
    soon = _is_pointwise(layer) or _is_slow(layer.weight)
    return usual and layer.weight.numel() >= (LARGE_WEIGHT if soon else VERY_LARGE_WEIGHT)


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.weight[0, 0].numel() == 1 and layer.stride == (1, 1) and layer.padding == (0, 0)


def _can_widen(attention: Any) -> bool:
    stock = type(attention.processor) is AttnProcessor2_0 and attention.norm_q is None
    return stock and _is_slow(attention.to_q.weight)


def product_dtype(x: Tensor, weight: Tensor, rows: int) -> torch.dtype:
    """In what dtype a product of `rows` rows made of x with a weight is quickest: that of x, or float32."""
    enough = rows >= FEW and weight.numel() >= LARGE_WEIGHT
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


class CpuLinear(nn.Linear):
    """x (..., in) to (..., out) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not _stands_for(self, x) or product_dtype(x, self.weight, rows) == x.dtype:
            return super().forward(x)
        return _Product.apply(x.reshape(rows, -1), self.weight, self.bias).view(*x.shape[:-1], -1)


class CpuConv2d(nn.Conv2d):
    """x (N, C, h, w) to (N, C', h', w') in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if not _stands_for(self, x):
            return super().forward(x)
        height, width = self._positions(0, x.shape[-2]), self._positions(1, x.shape[-1])
        positions = len(x) * height * width
        wide = product_dtype(x, self.weight, positions) != x.dtype
        if _is_pointwise(self) or (positions < FEW and self.weight.numel() >= VERY_LARGE_WEIGHT):
            product = _ColumnProduct.apply if wide else _column_product
            y = product(self._patches(x), self.weight.flatten(1), self.bias)
            return y.view(-1, len(x), height, width).transpose(0, 1).contiguous()
        if wide:
            return _Convolution.apply(x, self.weight, self.bias, (self.stride, self.padding, self.dilation))
        return super().forward(x)

    def _patches(self, x: Tensor) -> Tensor:
        """(C k k, N h' w')"""
        if _is_pointwise(self):
            columns = x.flatten(2)
        else:  # patches overlap, so that their gradients add up: in float32 at least
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            columns = F.unfold(exact, self.kernel_size, self.dilation, self.padding, self.stride).to(x.dtype)  # type: ignore[arg-type]
        return columns.transpose(0, 1).reshape(columns.shape[1], -1)

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


def _column_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b of columns x (in, n): (out, n)."""
    return weight @ x if bias is None else torch.addmm(bias[:, None], weight, x)


class _Product(torch.autograd.Function):
    """x W^T + b of rows x (n, in), in float32 by parts of W in each direction, so that nothing wide is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide, y = x.float(), x.new_empty(len(x), len(weight))
        for part in _parts(len(weight), max(x.shape)):
            some = wide @ weight[part].float().T
            y[:, part] = some if bias is None else some.add_(bias[part])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
        for part in _parts(len(weight), max(dx.shape)):
            dx.addmm_(dy[:, part].float(), weight[part].float())
        return dx.to(dy.dtype), None, None


class _ColumnProduct(torch.autograd.Function):
    """W x + b of columns x (in, n), as `_Product` otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide, y = x.float(), x.new_empty(len(weight), x.shape[1])
        for part in _parts(len(weight), max(x.shape)):
            some = weight[part].float() @ wide
            y[part] = some if bias is None else some.add_(bias[part, None])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = dy.new_zeros(weight.shape[1], dy.shape[1], dtype=torch.float32)
        for part in _parts(len(weight), max(dx.shape)):
            dx.addmm_(weight[part].float().T, dy[part].float())
        return dx.to(dy.dtype), None, None


class _Convolution(torch.autograd.Function):
    """`F.conv2d` computed in float32; the weight is converted by parts of whole channels in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.shape = geometry, x.shape
        wide, y = x.float(), []
        for part in _parts(len(weight), weight[0].numel()):
            some = F.conv2d(wide, weight[part].float(), None if bias is None else bias[part].float(), *geometry)
            y.append(some.to(x.dtype))
        return torch.cat(y, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        wide, dx = dy.float(), []
        least = SLOW_MAP // ctx.shape[2:].numel() + 1
        for part in _parts(weight.shape[1], weight[:, 0].numel(), least):
            some = weight[:, part].float()
            shape = (len(dy), some.shape[1], *ctx.shape[2:])
            dx.append(conv2d_input(shape, some, wide, *ctx.geometry).to(dy.dtype))
        return torch.cat(dx, dim=1), None, None, None


def _parts(count: int, each: int, least: int = 1) -> list[slice]:
    """`count` things of `each` numbers, evenly: some PART numbers at a time, but about `least` things and more."""
    pieces = max(1, min(-(-count * each // PART), count // least))
    some = -(-count // pieces)
    some += -some % 16 if some > 16 else 0  # as libraries like their channels
    return [slice(start, start + some) for start in range(0, count, some)]
