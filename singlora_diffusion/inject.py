"""Puts deltas into networks and takes them out again; knows how to wrap a layer, nothing of the maths inside.

In a diffusers UNet the deltas live in the attention processor: it hands the family's own processor an attention whose
projections are adapted, so no attention code is copied. In a text encoder, which has no processors, the projection itself
is wrapped. A delta is a module with `forward(base, x) -> y`, the adapted output of the frozen linear layer `base`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .errors import UserError


def projections(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose path ends in one of `targets`, by path, in module order.

    Raises:
        UserError: a target matches nothing, or an adapter is attached already.
    """
    found: dict[str, nn.Linear] = {}
    for path, module in network.named_modules():
        if isinstance(module, AdaptedAttnProcessor | AdaptedLinear) or path.endswith(".base_layer"):
            raise UserError(f"{type(network).__name__} has an adapter attached already at {path}: detach it first")
        if isinstance(module, nn.Linear) and any(path.endswith(f".{target}") for target in targets):
            found[path] = module
    for target in targets:
        if not any(path.endswith(f".{target}") for path in found):
            known = sorted({p.rsplit(".", 1)[-1] for p, m in network.named_modules() if isinstance(m, nn.Linear)} - {"0"})
            raise UserError(f"no layer {target!r} in {type(network).__name__}; it has {', '.join(known)}")
    return found


def outside_name(network: str, path: str) -> str:
    """A layer's name in files: network, then path, with the `text_model.` level that transformers 5 dropped."""
    if network.startswith("text_encoder") and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return f"{network}.{path}"


class _AdaptedAttention:
    """An attention as its own processor sees it, with some projections replaced by adapted ones."""

    def __init__(self, attention: Attention, deltas: Mapping[str, nn.Module]) -> None:
        self._attention = attention
        for name, delta in deltas.items():
            if name == "to_out_0":
                self.to_out = [partial(delta, attention.to_out[0]), *attention.to_out[1:]]
            else:
                setattr(self, name, partial(delta, getattr(attention, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class AdaptedAttnProcessor(nn.Module):
    """An attention processor around another one, with the deltas of its attention's projections.

    Args:
        inner: the processor that computes the attention.
        deltas: by projection: to_q, to_k, to_v, to_out.0.
    """

    def __init__(self, inner: Any, deltas: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.inner = inner
        self.deltas = nn.ModuleDict({name.replace(".", "_"): delta for name, delta in deltas.items()})

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
        adapted = _AdaptedAttention(attn, self.deltas)
        return self.inner(adapted, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)


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
    """
    undo: list[Callable[[], None]] = []
    by_attention: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for path, delta in deltas.items():
        owner = path.removesuffix(".0").rpartition(".")[0]
        if isinstance(network.get_submodule(owner), Attention):
            by_attention[owner][path.removeprefix(f"{owner}.")] = delta
        else:
            parent, _, name = path.rpartition(".")
            undo.append(_wrap_linear(network.get_submodule(parent), name, delta))
    for owner, group in by_attention.items():
        attention = network.get_submodule(owner)
        assert isinstance(attention, Attention)
        inner = attention.processor
        attention.set_processor(AdaptedAttnProcessor(inner, group))
        undo.append(partial(attention.set_processor, inner))

    def detach() -> None:
        while undo:
            undo.pop()()

    return detach


def _wrap_linear(parent: nn.Module, name: str, delta: nn.Module) -> Callable[[], None]:
    base = getattr(parent, name)
    setattr(parent, name, AdaptedLinear(base, delta))
    return partial(setattr, parent, name, base)
