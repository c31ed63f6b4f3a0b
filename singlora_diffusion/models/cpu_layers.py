"""Faster forms of a frozen network's layers on a CPU: the same weights and the same results, to rounding.

Two things cost more on a CPU than the arithmetic itself:

* A convolution lays out its whole weight anew at each call. On a small map, as in the inner half of a UNet, that is
  most of its time. There the convolution is computed as one product of the weight, as it lies in memory, with patches
  of the map. For a kernel of 1 x 1 the map itself is the patches.
* On some processors a product of bfloat16 numbers takes longer than one of float32. Where there are enough rows to pay
  for converting the weight, the product is computed in float32 and rounded once at the end, and so are convolutions and
  attention.

Which of these pays depends on the processor: `PAYS` says what was measured where, and nothing is used elsewhere.
No form stores a second copy of a weight, not even for the backward pass.

How a form gets in: `prepare` puts a subclass of the layer in the layer's place, which shares the layer's state, and
returns the undo, as `adapters.inject.attach` does. The layer itself is not changed. The other ways lose something:
a wrapper around the layer changes the names of parameters, and `isinstance(layer, nn.Linear)`, by which PEFT finds its
targets, no longer holds. A `forward` set on the instance makes a reference cycle, which keeps gigabytes alive until the
garbage collector looks. Forward hooks run before or after the stock computation, not instead of it. A
`TorchFunctionMode` around a call has ended when gradient checkpointing computes the call again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .attention_view import AttentionView

FEW_POSITIONS = 96
"""With fewer positions in the maps of a batch, fetching a weight takes longer than computing with it: there
convolutions become products."""
LARGE_WEIGHT = 100_000
"""Numbers in a weight from which on float32, or a 1 x 1 convolution as a product, gains more than it costs."""
SLOW_MAP = 20_480
"""Up to so many numbers in one image's map, PyTorch leaves a float32 convolution to its own slow form."""
PART = 1 << 21
"""Numbers of a weight converted at a time: larger pieces are fetched from the system anew each time, page by page."""


class Forms(NamedTuple):
    """Which of the forms are used."""

    patches: int = 0
    """Convolutions over small maps as one product, from so many numbers in the weight on; 0: none."""
    pointwise: bool = False
    """Convolutions with a kernel of 1 x 1 as one product, whatever the size of the map."""
    wide: int = 0
    """Products and convolutions of bfloat16 numbers in float32, from so many rows or positions on, and attention;
    0: none."""


PAYS = {
    # Xeon with avx512_bf16, without AMX
    "intel avx512": Forms(patches=1_000_000, pointwise=True, wide=96),
    # EPYC, Zen 5: bfloat16 is four times as fast as float32, and gains from `pointwise`, which float32 does not
    "amd avx512": Forms(patches=10_000_000, pointwise=True),
    # Zen 5 limited to AVX2: without AVX-512 PyTorch leaves bfloat16 to loops that take ten to a hundred times as long
    "avx2": Forms(patches=10_000_000, wide=8),
}
"""By `cpu_kind`, the forms that were shown to pay (docs/performance.md, `benchmarks.layers`). AMX, ARM and whatever
else is not in the table keep the stock layers."""


def cpu_kind() -> str:
    """Vendor and vector instructions, as far as they decide what pays: `intel avx512`, `amd avx512`, `avx2`, ...

    Heeds ATEN_CPU_CAPABILITY, which limits what PyTorch uses. AVX2 is one kind, whoever made it.
    """
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    if vectors != "avx512":
        return vectors
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not there before torch 2.11
    vendor = next((name for name in ("intel", "amd") if name in has.get("cpu_name", "").lower()), "unknown")
    return f"{vendor} {'amx' if has.get('amx_bf16') else vectors}"


def prepare(network: nn.Module, forms: Forms | None = None) -> Callable[[], None]:
    """Put the faster forms in the places of those layers and attentions inside `network` that gain by them.

    Values, names, shapes and identities of parameters stay as they are. Layers that are trained themselves compute as
    before, and so does everything on other devices and under autocast.

    Args:
        forms: by default what pays on this processor.

    Returns the exact inverse: called, it puts back the very modules that were there before. Adapters attached in the
    meantime are detached first.
    """
    if forms is None:
        forms = PAYS.get(cpu_kind(), Forms())
    undo: list[Callable[[], None]] = []
    made: dict[nn.Module, nn.Module] = {}  # a layer in two places stays one layer
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, Attention) and forms.wide and _can_widen(module):
            undo.append(partial(module.set_processor, module.processor))
            module.set_processor(CpuAttnProcessor(module.processor))
        if module not in made:
            if type(module) is nn.Linear and forms.wide and _is_slow(module.weight):
                made[module] = _in_place_of(module, CpuLinear, forms)
            elif type(module) is nn.Conv2d and _can_change(module, forms):
                made[module] = _in_place_of(module, CpuConv2d, forms)
        if module in made:
            parent, _, name = path.rpartition(".")
            owner = network.get_submodule(parent)
            setattr(owner, name, made[module])
            undo.append(partial(setattr, owner, name, module))

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def _can_change(layer: nn.Conv2d, forms: Forms) -> bool:
    usual = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    wide = forms.wide > 0 and _is_slow(layer.weight)
    soon = wide or (forms.pointwise and _is_pointwise(layer))
    numbers = layer.weight.numel()
    return usual and bool((soon and numbers >= LARGE_WEIGHT) or (forms.patches and numbers >= forms.patches))


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.weight[0, 0].numel() == 1 and layer.stride == (1, 1) and layer.padding == (0, 0)


def _can_widen(attention: Any) -> bool:
    stock = type(attention.processor) is AttnProcessor2_0 and attention.norm_q is None
    return stock and _is_slow(attention.to_q.weight)


def _is_slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _pays(forms: Forms, x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether a product of `rows` rows made of x with `weight` is quicker in float32."""
    return 0 < forms.wide <= rows and weight.numel() >= LARGE_WEIGHT and _is_slow(x)


def _stands_for(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether the forms here may take a layer's place: on a CPU, not trained itself, nobody else ruling the dtypes."""
    trained = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    here = x.device.type == "cpu" and x.dtype == layer.weight.dtype
    return here and not trained and not torch.is_autocast_enabled("cpu")


def _in_place_of(layer: nn.Module, kind: Any, forms: Forms) -> nn.Module:
    """A layer of `kind` that shares the parameters, the hooks and everything else of `layer`.

    Not the business of a constructor: PEFT calls that of a layer's type for layers of its own.
    """
    stand_in = kind.__new__(kind)
    vars(stand_in).update(vars(layer))
    stand_in.forms = forms
    return stand_in


class CpuLinear(nn.Linear):
    """x (..., in) to (..., out) in the dtype of x."""

    forms = Forms()

    def forward(self, x: Tensor) -> Tensor:
        if not _stands_for(self, x) or self.product_dtype(x) == x.dtype:
            return super().forward(x)
        return _Product.apply(x.reshape(-1, self.in_features), self.weight, self.bias).view(*x.shape[:-1], -1)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """In what dtype a product of x (..., in) with the weight is quickest: that of x, or float32."""
        return torch.float32 if _pays(self.forms, x, self.weight, x.shape[:-1].numel()) else x.dtype


class CpuConv2d(nn.Conv2d):
    """x (N, C, h, w) to (N, C', h', w') in the dtype of x."""

    forms = Forms()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or not _stands_for(self, x):
            return super().forward(x)
        height, width = self._positions(0, x.shape[2]), self._positions(1, x.shape[3])
        if min(len(x), height, width) < 1:  # nothing to compute, or an error
            return super().forward(x)
        positions = len(x) * height * width
        wide = _pays(self.forms, x, self.weight, positions)
        few = positions < FEW_POSITIONS and 0 < self.forms.patches <= self.weight.numel()
        if few or (self.forms.pointwise and _is_pointwise(self)):
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
    """Queries, keys and values come out as float32, the result goes in `narrow`."""
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
