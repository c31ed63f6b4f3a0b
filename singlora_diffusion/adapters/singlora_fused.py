"""The adapted linear layer as one differentiable operation: what `SingLoRA` computes, in fewer passes over the data.

    y = x W^T + b + z A[:out]^T,   z = (x A[:in]) * scaling

Beside the plain form, which autograd differentiates piece by piece: the update is accumulated into the base's output
and into its input gradient by the multiplications themselves, and the two terms of A's gradient meet in one buffer
instead of two of full size:

    dz = (dy A[:out]) * scaling        dA[:in] += x^T dz        dA[:out] += dy^T z        dx = dy W + dz A[:in]^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..models.cpu_layers import CpuLinear
from ..models.quantized import is_quantized


def applies(base: nn.Linear, x: Tensor) -> bool:
    """Whether `base` is computed by F.linear with frozen weights and nothing else, in the dtype of x.

    False for quantized layers, layers that are hooked or trained themselves, and under autocast.
    """
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    plain = type(base) in (nn.Linear, CpuLinear) and not hooks and "forward" not in vars(base)
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    plain = plain and not is_quantized(base)
    return plain and frozen and x.dtype == base.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def adapted_linear(base: nn.Linear, x: Tensor, a: Tensor, scaling: Tensor) -> Tensor:
    """x (W + dW)^T + b with dW = (A[:out] * scaling) A[:in]^T, (..., out); differentiable once, in x and A.

    Args:
        base: a frozen layer (out, in) for which `applies`.
        x: (..., in), in the dtype of the base.
        a: (max(out, in), r), of any dtype.
        scaling: a number or (r,), a constant.
    """
    wide = base.product_dtype(x) if isinstance(base, CpuLinear) else x.dtype
    return _AdaptedLinear.apply(x, base.weight, base.bias, a, scaling, wide)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, scaling: Tensor, wide: torch.dtype
    ) -> Tensor:
        outs, ins = weight.shape
        rows = x.reshape(-1, ins).to(wide)
        z = (rows @ a[:ins].to(wide)).mul_(scaling)
        y = F.linear(rows, weight.to(wide), None if bias is None else bias.to(wide)).addmm_(z, a[:outs].to(wide).T)
        ctx.save_for_backward(x, weight, a, z, scaling)
        return y.to(x.dtype).view(*x.shape[:-1], outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, z, scaling = ctx.saved_tensors
        outs, ins = weight.shape
        dy_rows = dy.reshape(-1, outs).to(z.dtype)
        dz = (dy_rows @ a[:outs].to(z.dtype)).mul_(scaling)
        dx = da = None
        if ctx.needs_input_grad[0]:  # a text encoder's output, cached, needs none
            dx = (dy_rows @ weight.to(z.dtype)).addmm_(dz, a[:ins].to(z.dtype).T).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[3]:
            # Transposed: x^T z with so few columns takes two to four times as long as z^T x.
            terms = [(dz.T @ x.reshape(-1, ins).to(z.dtype)).to(a.dtype), (z.T @ dy_rows).to(a.dtype)]
            short, long = sorted(terms, key=lambda term: term.shape[1])
            long[:, : short.shape[1]] += short
            da = long.T
        return dx, None, None, da, None, None
