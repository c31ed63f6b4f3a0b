"""The adapted linear layer as one differentiable operation: what `SingLoRA` computes, in fewer passes over the data.

    y = x W^T + b + z A[:out]^T,   z = (x A[:in]) * middle

Beside the plain form, which autograd differentiates piece by piece: the update is accumulated into the base's output
and into its input gradient by the multiplications themselves, and the two terms of A's gradient meet in one buffer
instead of two of full size:

    dz = (dy A[:out]) * middle        dA[:in] += x^T dz        dA[:out] += dy^T z        dx = dy W + dz A[:in]^T

Where the base is one of the CPU's forms, the products with A are of float32 throughout: with so few columns, casting A
and starting more operations would take longer than they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .cpu_layers import CpuLinear, product_dtype


def applies(base: nn.Linear, x: Tensor) -> bool:
    """Whether `base` is computed by F.linear with frozen weights and nothing else, in the dtype of x.

    False for quantized layers, layers that are hooked or trained themselves, and under autocast.
    """
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    plain = type(base) in (nn.Linear, CpuLinear) and not hooks and "forward" not in vars(base)
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    return plain and frozen and x.dtype == base.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def adapted_linear(base: nn.Linear, x: Tensor, a: Tensor, middle: Tensor) -> Tensor:
    """x (W + dW)^T + b with dW = (A[:out] * middle) A[:in]^T, (..., out); differentiable once, in x and A.

    Args:
        base: a frozen layer (out, in) for which `applies`.
        x: (..., in), in the dtype of the base.
        a: (max(out, in), r), of any dtype.
        middle: a number or (r,), a constant.
    """
    wide = thin = x.dtype
    if isinstance(base, CpuLinear):
        wide, thin = product_dtype(x, base.weight, x.shape[:-1].numel()), torch.float32
    return _AdaptedLinear.apply(x, base.weight, base.bias, a, middle, wide, thin)


class _AdaptedLinear(torch.autograd.Function):
    """Products with W in the dtype `wide`, those with A in the dtype `thin`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        middle: Tensor,
        wide: torch.dtype,
        thin: torch.dtype,
    ) -> Tensor:
        outs, ins = weight.shape
        rows = x.reshape(-1, ins)
        z = (rows.to(thin) @ a[:ins].to(thin)).mul_(middle)
        y = F.linear(rows.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
        ctx.save_for_backward(x, weight, a, z, middle)
        ctx.wide = wide
        return _plus(y, z, a[:outs]).to(x.dtype).view(*x.shape[:-1], outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, z, middle = ctx.saved_tensors
        outs, ins = weight.shape
        dy_rows = dy.reshape(-1, outs)
        thin = dy_rows.to(z.dtype)
        dz = (thin @ a[:outs].to(z.dtype)).mul_(middle)
        dx = da = None
        if ctx.needs_input_grad[0]:  # a text encoder's output, cached, needs none
            dx = _plus(dy_rows.to(ctx.wide) @ weight.to(ctx.wide), dz, a[:ins]).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[3]:
            # Transposed: X^T z with so few columns takes two to four times as long as z^T X.
            terms = [(dz.T @ x.reshape(-1, ins).to(z.dtype)).to(a.dtype), (z.T @ thin).to(a.dtype)]
            short, long = sorted(terms, key=lambda term: term.shape[1])
            long[:, : short.shape[1]] += short
            da = long.T
        return dx, None, None, da, None, None, None


def _plus(y: Tensor, z: Tensor, half: Tensor) -> Tensor:
    """y + z half^T, in place: y (n, m), z (n, r), half (m, r)."""
    half = half.to(z.dtype)
    return y.addmm_(z, half.T) if y.dtype == z.dtype else y.add_((z @ half.T).to(y.dtype))
