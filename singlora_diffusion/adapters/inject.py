"""Puts deltas into networks and takes them out again; knows how to wrap a layer, nothing of the maths inside.

In a diffusers UNet the deltas live in the attention processor: it hands the family's own processor an attention whose
projections are adapted, so no attention code is copied. In a text encoder, which has no processors, the projection
itself is wrapped. A delta is a module with `forward(base, x) -> y`, the adapted output of the frozen linear layer
`base`, and a strength: `scale`, `set_scale(scale)`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..errors import UserError
from ..models.attention_view import AttentionView

LAST_NAME = re.compile(r"[^.]+(\.\d+)?$")  # `to_q`, but `to_out.0`: a bare number would say nothing


def projections(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose path ends in one of `targets`, by path, in module order.

    Raises:
        UserError: a target matches nothing, or an adapter is attached already.
    """
    layers: dict[str, nn.Linear] = {}
    for path, module in network.named_modules():
        if isinstance(module, AdaptedAttnProcessor | AdaptedLinear) or path.endswith(".base_layer"):
            raise UserError(f"{type(network).__name__} has an adapter attached already at {path}: detach it first")
        if isinstance(module, nn.Linear):
            layers[path] = module
    for target in targets:
        if not any(_ends(path, target) for path in layers):
            known = sorted({LAST_NAME.search(path)[0] for path in layers})  # type: ignore[index]  # always matches
            raise UserError(f"no layer {target!r} in {type(network).__name__}; it has {', '.join(known)}")
    return {path: layer for path, layer in layers.items() if any(_ends(path, target) for target in targets)}


def _ends(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}")


class AdaptedAttnProcessor(nn.Module):
    """An attention processor around another one, with the deltas of its attention's projections.

    Args:
        inner: the processor that computes the attention.
        deltas: by projection: to_q, to_k, to_v, to_out.0.
    """

    def __init__(self, inner: Any, deltas: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.inner = inner
        self.deltas: Any = nn.ModuleDict({name.replace(".", "_"): delta for name, delta in deltas.items()})

    # Not `forward`: Attention.forward reads this signature to decide which keyword arguments it may pass on.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        view = AttentionView(attn, {name: partial(delta, attn.get_submodule(name)) for name, delta in self._by_name()})
        return self.inner(view, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)

    def _by_name(self) -> Iterator[tuple[str, Any]]:
        return ((name.replace("to_out_0", "to_out.0"), delta) for name, delta in self.deltas.items())


class AdaptedLinear(nn.Module):
    """A frozen linear layer with its delta, in the layer's place; shows the layer's weight and bias as its own."""

    def __init__(self, base: nn.Linear, delta: nn.Module) -> None:
        super().__init__()
        self.base, self.delta = base, delta

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.delta(self.base, x)


def attach(network: nn.Module, deltas: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Make `network` answer with the deltas, given by the path of the layer each adapts.

    Returns the exact inverse: called, it leaves the very modules, keys and bits that were there before.

    Raises:
        UserError: an attention computes q, k and v by one fused layer; nothing is attached then.
    """
    undo: list[Callable[[], None]] = []
    by_attention: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    linears: dict[str, nn.Module] = {}
    for path, delta in deltas.items():
        owner = path.removesuffix(".0").rpartition(".")[0]
        attention = network.get_submodule(owner)
        if not isinstance(attention, Attention):
            linears[path] = delta
            continue
        if getattr(attention, "fused_projections", False):
            raise UserError(f"{owner} has fused projections, which no adapter reaches: unfuse_qkv_projections() first")
        by_attention[owner][path.removeprefix(f"{owner}.")] = delta
    for path, delta in linears.items():
        parent, _, name = path.rpartition(".")
        undo.append(_wrap_linear(network.get_submodule(parent), name, delta))
    processors: list[tuple[Any, AdaptedAttnProcessor]] = []
    for owner, group in by_attention.items():
        owned: Any = network.get_submodule(owner)
        undo.append(partial(owned.set_processor, owned.processor))
        processors.append((owned, AdaptedAttnProcessor(owned.processor, group)))
        owned.set_processor(processors[-1][1])
    undo += _watch(network, list(deltas.values()), processors)

    def detach() -> None:
        while undo:
            undo.pop()()

    return detach


def _wrap_linear(parent: nn.Module, name: str, delta: nn.Module) -> Callable[[], None]:
    base = getattr(parent, name)
    setattr(parent, name, AdaptedLinear(base, delta))
    return partial(setattr, parent, name, base)


def _watch(
    network: nn.Module, deltas: Sequence[Any], processors: Sequence[tuple[Any, AdaptedAttnProcessor]]
) -> list[Callable[[], None]]:
    """Around each call: refuse to run with processors lost, and honour `cross_attention_kwargs={"scale": s}`.

    diffusers takes `scale` out of the arguments before any processor sees it, for PEFT's layers. Here it multiplies the
    deltas' own strength until the call ends, one way or another. It is for inference: what gradient checkpointing
    computes again in the backward pass no longer sees it. Training at another strength is what alpha is for.
    """
    usual: list[float] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(attention.processor is not processor for attention, processor in processors):
            raise UserError(
                "attention processors were replaced after the adapter was attached (attention slicing, xFormers, an "
                "IP-Adapter): do that first, then attach"
            )
        scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0)
        if scale != 1.0:
            usual.extend(delta.scale for delta in deltas)
            for delta in deltas:
                delta.set_scale(delta.scale * scale)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for delta, scale in zip(deltas, usual, strict=False):  # empty unless the call was scaled
            delta.set_scale(scale)
        usual.clear()

    first = network.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    last = network.register_forward_hook(after, always_call=True)
    return [first.remove, last.remove]
