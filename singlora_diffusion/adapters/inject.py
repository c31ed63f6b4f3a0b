"""Puts deltas into networks and takes them out again; knows how to wrap a layer, nothing of the maths inside.

Where a network has attention processors, the deltas of an attention's projections live in its processor: it hands the
network's own processor an attention whose projections are adapted, so no attention code is copied. Any other linear
layer, such as a text encoder's, is wrapped itself. A delta is a module with `forward(base, x) -> y`, the adapted output
of the frozen linear layer `base`, and a strength: `scale`, `set_scale(scale)`.

While deltas are in, a network's `state_dict` is the base model's own, so that saving it writes a model that anybody can
load; adapters are saved by `formats.save`.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.attention_view import AttentionView
from ..models.linear_view import as_linear, inside


class AdaptedAttnProcessor(nn.Module):
    """An attention processor around another one, with the deltas of its attention's projections.

    Made by `adapted_processor`, which gives its call the signature of the inner one's.

    Args:
        inner: the processor that computes the attention.
        deltas: by projection, as the attention names it: to_q, to_out.0, add_k_proj.
    """

    def __init__(self, inner: Any, deltas: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.inner = inner
        self.names = tuple(deltas)
        self.deltas = nn.ModuleList(deltas.values())

    # Not `forward`: an attention reads this signature to decide which keyword arguments it may pass on.
    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = zip(self.names, self.deltas, strict=True)
        return self.inner(
            AttentionView(attn, {name: partial(delta, attn.get_submodule(name)) for name, delta in pairs}),
            *args,
            **kwargs,
        )

    @property
    def _attention_backend(self) -> Any:
        """`set_attention_backend` of diffusers sets it at the processor that it finds."""
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend


def adapted_processor(inner: Any, deltas: Mapping[str, nn.Module]) -> AdaptedAttnProcessor:
    """An `AdaptedAttnProcessor` that is called as `inner` is."""
    kind: Any = type(inner)
    return _called_like(kind)(inner, deltas)


@cache
def _called_like(kind: type) -> type[AdaptedAttnProcessor]:
    def call(self: AdaptedAttnProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return AdaptedAttnProcessor.__call__(self, attn, *args, **kwargs)

    call.__signature__ = inspect.signature(kind.__call__)  # type: ignore[attr-defined, operator]
    return type(AdaptedAttnProcessor.__name__, (AdaptedAttnProcessor,), {"__call__": call})


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

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.delta(self.base, x)


def is_adapted(path: str, module: nn.Module) -> bool:
    """Whether a module at this path is part of an adapter, ours or PEFT's."""
    return isinstance(module, AdaptedAttnProcessor | AdaptedLinear) or path.endswith(".base_layer")


def attach(network: nn.Module, deltas: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Make `network` compute with the deltas, given by the path of the layer each adapts.

    Returns the exact inverse: called, it leaves the very modules, keys and bits that were there before.

    Raises:
        UserError: an attention computes q, k and v by one fused layer; nothing is attached then.
    """
    by_attention: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    linears: dict[str, nn.Module] = {}
    for path, delta in deltas.items():
        owner = path.removesuffix(".0").rpartition(".")[0]
        attention: Any = network.get_submodule(owner)
        if not _has_processor(attention):
            linears[path] = delta
            continue
        if getattr(attention, "fused_projections", False):
            raise UserError(f"{owner} has fused projections, which no adapter reaches: unfuse_qkv_projections() first")
        by_attention[owner][path.removeprefix(f"{owner}.")] = delta
    with ExitStack() as undo:
        wrapped = {path: AdaptedLinear(_linear(network, path), delta) for path, delta in linears.items()}
        undo.callback(replace(network, wrapped))
        inner = {path: inside(one.base, "base") for path, one in wrapped.items()}
        processors: list[tuple[Any, AdaptedAttnProcessor]] = []
        for owner, group in by_attention.items():
            attention = network.get_submodule(owner)
            undo.callback(attention.set_processor, attention.processor)
            processors.append((attention, adapted_processor(attention.processor, group)))
            attention.set_processor(processors[-1][1])
            inner[f"{owner}.processor"] = "inner"
        undo.callback(keep_keys(network, inner))
        undo.callback(_watch(network, list(deltas.values()), processors))
        return undo.pop_all().close


def _has_processor(module: Any) -> bool:
    """Whether a module is an attention as diffusers has them: its processor is handed the module and does the rest."""
    return getattr(module, "processor", None) is not None and hasattr(module, "set_processor")


def _linear(network: nn.Module, path: str) -> nn.Linear:
    found: Any = as_linear(network.get_submodule(path))
    return found


def replace(network: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules in the place of those that are there; returns the inverse."""
    before = {path: network.get_submodule(path) for path in modules}

    def put(those: Mapping[str, nn.Module]) -> None:
        for path, module in those.items():
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, module)

    put(modules)
    return partial(put, before)


def keep_keys(network: nn.Module, inner: Mapping[str, str]) -> Callable[[], None]:
    """Let `network.state_dict` and `load_state_dict` know the base's tensors only, under the base's own keys.

    Args:
        inner: by the path of each wrapper, the path of the wrapped module in it.

    Returns:
        What takes that back.
    """

    def wrapper_of(key: str) -> str | None:
        """The path of the wrapper that a key lies in."""
        path = key
        while path := path.rpartition(".")[0]:
            if path in inner:
                return path
        return None

    def show(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        shown: dict[str, Any] = {}
        for key, tensor in state.items():
            path = wrapper_of(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if path is None:
                shown[key] = tensor
                continue
            ours, base = f"{prefix}{path}.", f"{prefix}{path}.{inner[path]}."
            if key.startswith(base):
                shown[ours + key.removeprefix(base)] = tensor
        state.clear()
        state.update(shown)

    def take(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in list(state):
            path = wrapper_of(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if path is not None:
                ours = f"{prefix}{path}."
                state[f"{ours}{inner[path]}.{key.removeprefix(ours)}"] = state.pop(key)
        for path, name in inner.items():  # the adapter keeps what it has
            for key, tensor in module.get_submodule(path).state_dict(keep_vars=True).items():
                if not key.startswith(f"{name}."):
                    state[f"{prefix}{path}.{key}"] = tensor

    handles = [network.register_state_dict_post_hook(show), network.register_load_state_dict_pre_hook(take)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _watch(
    network: nn.Module, deltas: Sequence[Any], processors: Sequence[tuple[Any, AdaptedAttnProcessor]]
) -> Callable[[], None]:
    """Around each call: refuse to run with processors lost, and honour `cross_attention_kwargs={"scale": s}`.

    Transformers call it `joint_attention_kwargs`. diffusers takes `scale` out of the arguments before any processor
    sees it, for PEFT's layers. Here it multiplies the deltas' own strength until the call ends, one way or another. It
    is for inference: what gradient checkpointing computes again in the backward pass no longer sees it. Training at
    another strength is what alpha is for.
    """
    usual: list[float] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(attention.processor is not processor for attention, processor in processors):
            raise UserError(
                "attention processors were replaced after the adapter was attached (attention slicing, xFormers, an "
                "IP-Adapter): do that first, then attach"
            )
        given = kwargs.get("cross_attention_kwargs") or kwargs.get("joint_attention_kwargs") or {}
        scale = given.get("scale", 1.0)
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

    def undo() -> None:
        first.remove()
        last.remove()

    return undo
