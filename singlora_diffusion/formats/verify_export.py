"""Verifies an exported file by loading it as its readers do: through diffusers, into clean copies of the networks.

diffusers loads no LoRA into T5; such layers are read back by `lora_pairs.of_file` instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn

from ..errors import UserError
from ..models.linear_view import LinearView
from ..models.network import NetworkSpec
from ..models.quantized import dequantized
from ..terminal import escaped
from . import diffusers_loader, lora_pairs
from .lora_pairs import Pair
from .safetensors_io import ROUNDED, read_index

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

NAME = "exported"  # the adapter's name in diffusers while it is tried
ROUNDINGS = 8
"""How many times its own rounding a network's outputs may differ: 2 as both sides round, 2 as the live adapter adds its
update up in another order than the file's pairs, 2 as one measured rounding is one draw."""
TRIES = 3
"""Inputs that outputs are compared on before a file is refused. A wrong file is wrong on each; an attention that the
adapter has saturated can flip on one, where a rounding decides."""


@dataclass(frozen=True)
class Difference:
    """How far a file as diffusers loads it is from the adapter it was made of; each the largest, and relative."""

    layers: int
    layer_difference: float
    """Of the layers: ||(loaded - live) x|| / ||live x|| for random x, computed in float64, on dW (on W' where there is
    a magnitude), or on the terms that dW is the sum of, where they all but cancel."""
    update_difference: float
    """Of the layers: the same, always relative to the layer's change alone, ||(W' - W0) x||."""
    output_difference: float
    """Of the networks: ||loaded(x) - live(x)|| / ||live(x)|| for random inputs, as the networks compute."""
    rounding: float
    """Of the networks: the same distance between the loaded network in float32 and in float64, what rounding alone
    does to it here."""


def verify(path: Path, adapter: Adapter, stored: torch.dtype, whole: bool = True) -> Difference:
    """Load `path` into copies of the adapter's networks through diffusers and compare.

    Args:
        stored: the precision of the file, which says how large a difference may be.
        whole: compare the networks' outputs too, not the layers alone.

    Raises:
        UserError: diffusers does not load the file, or it is further from the adapter than the precision explains.
    """
    networks = diffusers_loader.loadable(adapter.networks)
    twins = {name: twin(adapter.networks[name].module, name, adapter) for name in adapter.networks if name in networks}
    if twins:
        load(path, twins)
    others: dict[str, Pair] = {}
    if len(twins) < len(adapter.networks):
        clean = {name: replace(one, module=_without_weights(one.module)) for name, one in adapter.networks.items()}
        others = lora_pairs.of_file(read_index(path), clean)
    places = {name: (network, inside) for network in twins for name, inside in paths(adapter, network).items()}
    bases, pairs = adapter.layers(), dict(lora_pairs.of_adapter(adapter))
    worst = worst_update = 0.0
    for name, update in adapter.delta_weights():
        if name in places:
            network, inside = places[name]
            layer = twins[network].get_submodule(inside)
            if not hasattr(layer, "base_layer"):
                raise UserError(f"not written: diffusers leaves {name} without an adapter")
            difference, of_update = _layer_difference(layer, bases[name], update, pairs[name])
        else:
            difference = of_update = _pair_difference(others.get(name), pairs[name])
        worst, worst_update = max(worst, difference), max(worst_update, of_update)
        if not difference <= ROUNDED[stored]:  # also catches NaN
            raise UserError(
                f"not written: {name}, {'loaded through diffusers' if name in places else 'read back'}, differs by "
                f"{difference:.1e} of its effect from the adapter, more than {stored} explains"
                + ("" if stored == torch.float32 else ": use --dtype float32")
            )
    found = {name for name, pair in others.items() if bool(pair.up.any())}
    for name in sorted(found - set(pairs)):
        raise UserError(f"not written: it changes {name} too")
    for network, loaded in twins.items():
        wanted = {inside for other, inside in places.values() if other == network}
        for inside, layer in loaded.named_modules():
            if hasattr(layer, "base_layer") and inside not in wanted and _changes(layer):
                raise UserError(f"not written: loaded through diffusers, it changes {network}.{inside} too")
    compared = twins if whole else {}
    outputs = [compare_outputs(adapter.networks[name], compared[name], worst) for name in compared] or [(0.0, 0.0)]
    return Difference(len(bases), worst, worst_update, *(max(values) for values in zip(*outputs, strict=True)))


def _changes(layer: Any) -> bool:
    """Whether an adapted linear layer computes something else than its base, which a pair of zeros does not."""
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return not torch.equal(layer(x), layer.base_layer(x))


def compare_outputs(network: NetworkSpec, loaded: nn.Module, layers: float) -> tuple[float, float]:
    """Compare a live network's outputs with those of its twin; returns the difference and the twin's rounding.

    What rounding does to a network depends on the processor, the libraries' order of sums and the adapter, so it is
    measured here. A coarser dtype of the live network, and layers that differ by `layers`, do in proportion more.

    Raises:
        UserError: they differ by more than that explains, whatever the input.
    """
    finest = torch.finfo(torch.float32).eps
    coarser = (torch.finfo(next(network.module.parameters()).dtype).eps + layers) / finest
    for turn in range(TRIES):
        inputs = {key: _rolled(value, turn) for key, value in network.sample_inputs().items()}
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            live = network.module(**inputs)[0].cpu().double()
            inputs = {key: _single(value) for key, value in inputs.items()}
            single = loaded(**inputs)[0]
            with in_float64(loaded):
                exact = loaded(**inputs)[0]
        difference, rounding = _distance(single, live), _distance(single, exact)
        if difference <= ROUNDINGS * rounding * coarser:
            return difference, rounding
    raise UserError(
        f"not written: loaded again, the outputs of {network.name} differ by {difference:.1e}, "
        f"of which rounding explains {ROUNDINGS * rounding * coarser:.1e}"
    )


def _rolled(value: Any, turn: int) -> Any:
    """Another input like this one."""
    return value.roll(turn, -1) if isinstance(value, Tensor) and value.ndim else value


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


@contextmanager
def in_float64(network: nn.Module) -> Iterator[None]:
    """Let a network compute in float64, one layer at a time, so that no second copy of its weights is needed."""
    kept: dict[Tensor, Tensor] = {}

    def widen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                kept[tensor] = tensor.data
                tensor.data = tensor.data.double()
        return tuple(map(_double, args)), {key: _double(value) for key, value in kwargs.items()}

    def restore(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for tensor, data in kept.items():
            tensor.data = data
        kept.clear()

    hooks = []
    try:
        for layer in _layers(network):
            hooks.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
            hooks.append(layer.register_forward_hook(restore, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with tensors of their own; a layer that PEFT wraps counts as one."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if own or hasattr(module, "base_layer"):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def twin(network: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """The network as it was before the adapter came, in float32 on the CPU: a new module around the same base tensors.

    Nothing is copied where they are that already. In half precision diffusers would round the file as it loads it, and
    not every accelerator knows float64.
    """
    clean = _without_weights(network)
    state, bases = dict(network.state_dict()), adapter.layers()
    for outside, path in paths(adapter, name).items():
        base = bases[outside]
        if isinstance(base, LinearView):  # its weight lies the other way round, and is never packed
            continue
        state[f"{path}.weight"] = dequantized(base).detach()
        if base.bias is not None:
            state[f"{path}.bias"] = base.bias.detach()
    clean.load_state_dict({key: _single(state[key]) for key in clean.state_dict()}, assign=True)
    for key, buffer in network.named_buffers():  # those that are not saved are still without data
        owner, _, last = key.rpartition(".")
        if key in dict(clean.named_buffers()) and clean.get_buffer(key).is_meta:
            clean.get_submodule(owner)._buffers[last] = buffer.cpu()
    return clean.train(network.training).requires_grad_(False)


def _without_weights(network: nn.Module) -> nn.Module:
    """A new module of a network's class and configuration, on the meta device."""
    config: Any = network.config
    kind: Any = type(network)
    with torch.device("meta"):
        clean: nn.Module = kind.from_config(config) if isinstance(network, ConfigMixin) else kind(config)
    return clean


def _single(value: Any) -> Any:
    """A tensor on the CPU, in float32 if it is of floating-point numbers; mappings of tensors likewise."""
    if isinstance(value, Mapping):
        return {key: _single(item) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.cpu().float() if value.is_floating_point() else value.cpu()


def paths(adapter: Adapter, network: str) -> dict[str, str]:
    """The adapter's layers in one network: path inside it by name."""
    spec = adapter.networks[network]
    here = {spec.layer(path): path for path, _ in spec.module.named_modules()}
    return {name: here[name] for name in adapter.layers() if name.startswith(f"{network}.")}


def load(path: Path, networks: Mapping[str, nn.Module]) -> None:
    """Load a LoRA file into networks as `pipeline.load_lora_weights` does.

    Raises:
        UserError: diffusers refuses the file.
    """
    pipeline = diffusers_loader.pipeline(networks)
    try:
        with diffusers_loader.quiet():
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=NAME, local_files_only=True
            )
    except Exception as error:  # diffusers has many ways to say no
        reason = escaped(" ".join(str(error).split()), 200)
        raise UserError(f"not written: diffusers does not load it: {type(error).__name__}: {reason}") from error


def _layer_difference(layer: nn.Module, base: nn.Linear, update: Tensor, pair: Pair) -> tuple[float, float]:
    """Relative differences on random inputs: of `Difference.layer_difference` and of `update_difference`."""
    weight, bias, up, down = (_exact(tensor) for tensor in (dequantized(base), base.bias, pair.up, pair.down))
    x = torch.randn(8, base.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), in_float64(layer):
        got = layer(x) - bias
        before = x @ weight.T
        if pair.magnitude is None:  # the pair is the update to the last bit; `update` is rounded, and so its terms are
            change = x @ down.T @ up.T
            size = torch.stack([change.norm(), 1e-2 * (x @ down.T.abs() @ up.T.abs()).norm(), 1e-6 * before.norm()])
        else:
            change = x @ _exact(update).T
            size = (before + change).norm()
        error = (got - before - change).norm()
    return _ratio(error, size.max()), _ratio(error, change.norm())


def _pair_difference(read: Pair | None, pair: Pair) -> float:
    """||read - pair|| / ||pair|| of the updates; 1 where nothing was read."""
    want = pair.product()
    error = want if read is None else read.product() - want
    return _ratio(error.norm(), want.norm())


def _ratio(error: Tensor, size: Tensor) -> float:
    return 0.0 if error == 0 or size == 0 else float(error / size)


def _exact(tensor: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if tensor is None else tensor.detach().cpu().double()
