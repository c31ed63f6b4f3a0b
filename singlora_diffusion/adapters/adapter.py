"""An adapter: deltas in named layers of frozen networks, whoever trains them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.network import NetworkSpec
from ..models.quantized import dequantized, is_quantized
from . import inject, targets
from .config import AdapterConfig
from .delta import Delta, Factors
from .dropout import Dropout


class Layer(NamedTuple):
    """One adapted layer."""

    network: NetworkSpec
    path: str
    """Inside the network's module."""
    base: nn.Linear
    delta: Delta

    @property
    def name(self) -> str:
        """As in files: `unet.….attn1.to_q`, `text_encoder.text_model.….q_proj`."""
        return self.network.layer(self.path)


class Adapter:
    """Trained deltas inside frozen networks, put in when made.

    Args:
        config: what it takes to make it again; targets and ramp resolved.
        adapted: the layers, network by network.
        put_in: makes the networks compute with the deltas, and returns what takes them out again, exactly.

    Attributes:
        config: as given.
        networks: those it is attached to, by name.
    """

    def __init__(
        self, config: AdapterConfig, adapted: Sequence[Layer], put_in: Callable[[], Callable[[], None]]
    ) -> None:
        self.config = config
        self.networks: Mapping[str, NetworkSpec] = {layer.network.name: layer.network for layer in adapted}
        self._adapted = {layer.name: layer for layer in adapted}
        self._originals: dict[str, Tensor] | None = None  # the base weights, while merged
        self._put_in = put_in
        self._take_out: Callable[[], None] = put_in()
        self.set_step(0)

    @property
    def u(self) -> float:
        """The ramp's value now; 1.0 for methods without one."""
        return next(iter(self._adapted.values())).delta.u

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, float32, in the order of `layers`."""
        return [p for layer in self._adapted.values() for p in layer.delta.trained().values()]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, lr: float, text_lr: float | None = None) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, one per network and learning rate.

        Args:
            lr: of the denoiser. Some tensors of a method learn faster or slower than others: `Delta.rate`.
            text_lr: of the text encoders; None: as `lr`.
        """
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        narrowest = min(max(layer.base.out_features, layer.base.in_features) for layer in self._adapted.values())
        for network, _, _, delta in self._adapted.values():
            rate = lr if text_lr is None or network.role == "denoiser" else text_lr
            for key, parameter in delta.trained().items():
                factor = delta.rate(key, narrowest)
                group = groups.setdefault((network.name, factor), {"params": [], "lr": rate * factor})
                group["params"].append(parameter)
        return list(groups.values())

    def set_step(self, step: int) -> None:
        """Tell the clock: the loop calls it before each optimizer step's forward passes, with 1 for the first."""
        self.set_ramp(ramp(step, self.config.ramp_steps or 0))

    def set_ramp(self, u: float) -> None:
        """Set the ramp's value itself, as a file that was saved in mid-ramp asks for."""
        with self._unmerged():
            for layer in self._adapted.values():
                layer.delta.set_ramp(u)

    def settle(self) -> None:
        """Put back what an optimizer step moved out of its range (a magnitude below zero); called after each step."""
        with torch.no_grad():
            for layer in self._adapted.values():
                layer.delta.settle()

    def set_scale(self, scale: float) -> None:
        """Strength at inference: 1.0 is as trained, 0.0 the base model.

        For one call of a denoiser, `cross_attention_kwargs={"scale": s}`, or `joint_attention_kwargs`, multiplies it. A
        pipeline passes that on to its denoiser alone: text encoders follow `set_scale` only.
        """
        with self._unmerged():
            for layer in self._adapted.values():
                layer.delta.set_scale(scale)

    @contextmanager
    def dropping(self, rows: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Inside, there is dropout; outside, there never is. Backward passes belong inside.

        Args:
            rows: by role of network, a number of 32 bits for each row of what it is called with: equal numbers give
                equal masks.
        """
        device = next(iter(self.parameters())).device
        numbers = {role: torch.tensor(some, device=device) for role, some in rows.items()}
        try:
            for layer in self._adapted.values():
                layer.delta.number_rows(numbers[layer.network.role])
            yield
        finally:
            for layer in self._adapted.values():
                layer.delta.number_rows(None)

    def layers(self) -> dict[str, nn.Linear]:
        """The adapted base layers by name."""
        return {name: layer.base for name, layer in self._adapted.items()}

    @torch.no_grad()
    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, W' - W0), (out, in) float32."""
        for name, layer in self._adapted.items():
            original = dequantized(layer.base) if self._originals is None else self._originals[name]
            yield name, layer.delta.delta_weight(original.detach())

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, up (out, k), down (k, in)) with W' - W0 = up @ down, at the present scale.

        Raises:
            UserError: the method has no such form.
        """
        for name, (up, down, magnitude) in self.pairs():
            if magnitude is not None:
                raise UserError(f"{self._said()} has a magnitude, so its change is no low-rank pair: merge it instead")
            yield name, up, down

    def pairs(self) -> Iterator[tuple[str, Factors]]:
        """(name, the change as other programs know it): as `factors`, or with a magnitude beside the pair.

        Raises:
            UserError: the method has no such form.
        """
        for name, layer in self._adapted.items():
            found = layer.delta.factors()
            if found is None:
                raise UserError(f"{self._said()} has no low-rank form: merge it into a full model")
            yield name, found

    def _said(self) -> str:
        return f"{self.config.method} with dora" if self.config.dora else self.config.method

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is stored, by layer and key; the live tensors."""
        return {
            f"{name}.{key}": tensor.detach()
            for name, layer in self._adapted.items()
            for key, tensor in layer.delta.tensors().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Strict: a missing, foreign or mis-shaped tensor is a UserError, and nothing is changed."""
        own = self.state_dict()
        check_state(own, state)
        with self._unmerged(), torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    @torch.no_grad()
    def merge(self) -> None:
        """Write W' into the base layers; the networks are then plain ones, at the base's own speed.

        Raises:
            UserError: the base layers are quantized.
        """
        if self._originals is not None:
            return
        if any(is_quantized(base) for base in self.layers().values()):
            raise UserError(
                "the base model is quantized, and nothing can be merged into it: load it without --quantize"
            )
        changes = dict(self.delta_weights())
        self._originals = {name: base.weight.detach().clone() for name, base in self.layers().items()}
        self._take_out()
        for name, base in self.layers().items():
            base.weight.copy_(base.weight.float() + changes[name])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge` bit for bit."""
        if self._originals is None:
            return
        for name, base in self.layers().items():
            base.weight.copy_(self._originals[name])
        self._originals = None
        self._take_out = self._put_in()

    def detach(self) -> None:
        """Leave the networks bit for bit as they were before `attach`."""
        self.unmerge()
        self._take_out()

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """What is changed inside is in effect afterwards, merged or not."""
        merged = self._originals is not None
        self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()


def ramp(step: int, ramp_steps: int) -> float:
    """u(t) = min(t / T, 1), the paper's warm-up (section 4.1); T = 0 means u = 1 throughout."""
    return min(step / ramp_steps, 1.0) if ramp_steps > 0 else 1.0


def of_deltas(
    networks: Mapping[str, NetworkSpec], config: AdapterConfig, seed: int, form: Callable[..., Any]
) -> Adapter:
    """Attach a fresh delta, made by `form` as `methods.by_delta` says, to each of the chosen layers."""
    adapted = []
    for name, layers in targets.chosen(networks, config).items():
        rank, alpha, _ = config.for_role(networks[name].role)
        for path, base in layers.items():
            # A layer's start depends on its name and the seed alone, not on which other layers are adapted.
            generator = torch.Generator().manual_seed(start_seed(seed, networks[name].layer(path)))
            delta = form(base, rank, alpha, config, generator)
            if config.lora_dropout:
                delta.dropout = dropout_of(config, networks[name].layer(path))
            adapted.append(Layer(networks[name], path, base, delta))

    def put_in() -> Callable[[], None]:
        with ExitStack() as undo:
            for network in {layer.network.name: layer.network for layer in adapted}.values():
                deltas: dict[str, Any] = {layer.path: layer.delta for layer in adapted if layer.network is network}
                undo.callback(inject.attach(network.module, deltas))
            return undo.pop_all().close

    return Adapter(config, adapted, put_in)


def dropout_of(config: AdapterConfig, name: str) -> Dropout | None:
    """The dropout of a layer; None: there is none."""
    return Dropout(config.lora_dropout, zlib.crc32(name.encode())) if config.lora_dropout else None


def start_seed(seed: int, name: str) -> int:
    """What a CPU generator is started with, which keeps 32 bits; all 64 of `seed` count."""
    return (seed * 0x9E3779B1 + (seed >> 32) * 0x85EBCA77 + zlib.crc32(name.encode())) % (1 << 32)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Whether tensors from outside fit an adapter: asked before any of them is copied in.

    Raises:
        UserError: the first tensor of `state` that does not fit `own`.
    """
    for key, tensor in own.items():
        if key not in state:
            raise UserError(f"the adapter has no tensor {key}: it was made for another model or other targets")
        if state[key].shape != tensor.shape:
            found, wanted = tuple(state[key].shape), tuple(tensor.shape)
            raise UserError(f"{key} has shape {found}, not {wanted}: it was made for another model or another rank")
    for key in state:
        if key not in own:
            raise UserError(f"the adapter has a tensor {key} that this model has no place for")
