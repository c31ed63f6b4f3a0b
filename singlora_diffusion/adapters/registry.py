"""What an adapter is, whoever trains it, and the table of methods by name."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks, NetworkSpec, specs
from . import inject, peft_baselines
from .check_state_dict import check_state
from .config import AdapterConfig
from .singlora import INITS, SIGNATURES, SingLoRA, ramp
from .singlora_dora import DoraSingLoRA


class Adapter(Protocol):
    """Trained modules inside frozen networks.

    Layers are named as in files: `unet.….attn1.to_q`, `text_encoder.text_model.….q_proj`.
    """

    config: AdapterConfig

    @property
    def networks(self) -> Mapping[str, NetworkSpec]:
        """Those it is attached to, by name."""
        ...

    @property
    def u(self) -> float:
        """The ramp's value now; 1.0 for methods without one."""
        ...

    def parameters(self) -> list[nn.Parameter]: ...
    def num_parameters(self) -> int: ...

    def param_groups(self, lr: float, text_lr: float | None = None) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; `text_lr` (None: as `lr`) is the text encoder's rate."""
        ...

    def set_step(self, step: int) -> None:
        """Tell the clock: called by the loop once per optimizer step."""
        ...

    def set_scale(self, scale: float) -> None:
        """Strength at inference: 1.0 is as trained, 0.0 the base model.

        For one call of a UNet, `cross_attention_kwargs={"scale": s}` multiplies it. A pipeline passes that on to its
        UNet alone: text encoders follow `set_scale` only.
        """
        ...

    def layers(self) -> dict[str, nn.Linear]:
        """The adapted base layers by name."""
        ...

    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, W' - W0), (out, in) float32."""
        ...

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, up (out, k), down (k, in)) with W' - W0 = up @ down; UserError where the method has no such form."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Strict: a missing, foreign or mis-shaped tensor is a UserError, and nothing is changed."""
        ...

    def merge(self) -> None:
        """Write W' into the base layers; the networks are then plain ones, at the base's own speed."""
        ...

    def unmerge(self) -> None:
        """Undo `merge` bit for bit."""
        ...

    def detach(self) -> None:
        """Leave the networks bit for bit as they were before `attach`."""
        ...


class SingLoRAAdapter:
    """SingLoRA, with or without magnitudes, on the attention projections of a UNet and of text encoders."""

    def __init__(self, networks: Mapping[str, NetworkSpec], config: AdapterConfig, seed: int = 0) -> None:
        self.config = config
        self.networks: dict[str, NetworkSpec] = {}
        self._deltas: dict[str, dict[str, SingLoRA]] = {}  # by network, then by path inside it
        self._bases: dict[str, dict[str, nn.Linear]] = {}
        self._originals: dict[str, Tensor] | None = None  # the base weights, while merged
        self._undo: list[Callable[[], None]] = []
        form = DoraSingLoRA if config.dora else SingLoRA
        for name, network in networks.items():
            rank, alpha, targets = config.for_role(network.role)
            if not targets:
                continue
            self.networks[name] = network
            self._bases[name] = inject.projections(network.module, targets)
            self._deltas[name] = {}
            for path, base in self._bases[name].items():
                # A layer's start depends on its name and the seed alone, not on which other layers are adapted.
                key = zlib.crc32(network.layer(path).encode())
                start = torch.Generator().manual_seed(seed * 0x9E3779B1 + key)
                self._deltas[name][path] = form(
                    base, rank, alpha, init=config.init, signature=config.signature, generator=start
                )
        if not self.networks:
            raise UserError("nothing to adapt: no targets are named for any of the networks")
        self._put_in()
        self.set_step(0)

    def _put_in(self) -> None:
        try:
            for name, network in self.networks.items():
                self._undo.append(inject.attach(network.module, self._deltas[name]))
        except UserError:
            self._take_out()
            raise

    def _take_out(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _named(self) -> Iterator[tuple[str, nn.Linear, SingLoRA]]:
        for name, deltas in self._deltas.items():
            for path, delta in deltas.items():
                yield self.networks[name].layer(path), self._bases[name][path], delta

    @property
    def u(self) -> float:
        return next(delta.u for _, _, delta in self._named())

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, _, delta in self._named() for p in delta.parameters()]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, lr: float, text_lr: float | None = None) -> list[dict[str, Any]]:
        """One group per network and kind of tensor, and per width with `rate_by_width`.

        The paper's analysis asks for a rate proportional to n^-1/2 (section 4.2; it holds for Adam); `rate_by_width`
        gives the narrowest layers `lr` and wider ones less. Magnitudes learn `loraplus_ratio` times faster.
        """
        groups: dict[tuple[str, int, bool], dict[str, Any]] = {}
        narrowest = min(delta.A.shape[0] for _, _, delta in self._named())
        for name, deltas in self._deltas.items():
            rate = lr if text_lr is None or self.networks[name].role == "denoiser" else text_lr
            for delta in deltas.values():
                width = delta.A.shape[0] if self.config.rate_by_width else narrowest
                for key, parameter in delta.named_parameters():
                    fast = key != "A"
                    factor = self.config.loraplus_ratio if fast else math.sqrt(narrowest / width)
                    group = groups.setdefault((name, width, fast), {"params": [], "lr": rate * factor})
                    group["params"].append(parameter)
        return list(groups.values())

    def set_step(self, step: int) -> None:
        self.set_ramp(ramp(step, self.config.ramp_steps))

    def set_ramp(self, u: float) -> None:
        """Set u directly, as a file that was saved in mid-ramp asks for."""
        with self._unmerged():
            for _, _, delta in self._named():
                delta.set_ramp(u)

    def set_scale(self, scale: float) -> None:
        with self._unmerged():
            for _, _, delta in self._named():
                delta.set_scale(scale)

    def layers(self) -> dict[str, nn.Linear]:
        return {name: base for name, base, _ in self._named()}

    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, base, delta in self._named():
            original = base.weight if self._originals is None else self._originals[name]
            yield name, delta.delta_weight(original)

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.config.dora:
            raise UserError("a magnitude on top of the direction has no low-rank form: merge it into a full model")
        for name, _, delta in self._named():
            yield name, *delta.factors()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": t.detach() for name, _, d in self._named() for key, t in d.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        check_state(own, state)
        with self._unmerged(), torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def merge(self) -> None:
        if self._originals is not None:
            return
        merged = dict(self.delta_weights())
        self._originals = {name: base.weight.detach().clone() for name, base in self.layers().items()}
        self._take_out()
        with torch.no_grad():
            for name, base in self.layers().items():
                base.weight.copy_(base.weight.float() + merged[name])

    def unmerge(self) -> None:
        if self._originals is None:
            return
        with torch.no_grad():
            for name, base in self.layers().items():
                base.weight.copy_(self._originals[name])
        self._originals = None
        self._put_in()

    def detach(self) -> None:
        self.unmerge()
        self._take_out()

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """What is changed inside is in effect afterwards, merged or not."""
        merged = self._originals is not None
        self.unmerge()
        yield
        if merged:
            self.merge()


METHODS: dict[str, Callable[[Mapping[str, NetworkSpec], AdapterConfig, int], Adapter]] = {
    "singlora": SingLoRAAdapter,
    "lora": peft_baselines.attach,
    "lora+": peft_baselines.attach,
    "dora": peft_baselines.attach,
    "oft": peft_baselines.attach,
    "lokr": peft_baselines.attach,
}


def attach(networks: Networks, config: AdapterConfig, seed: int = 0) -> Adapter:
    """Attach a fresh adapter of `config.method` to the networks that the configuration names targets for.

    Args:
        networks: by name, as a family has them, or bare modules (`unet`, `text_encoder`). They are left frozen as the
            caller made them.
        seed: the same seed gives the same start.

    Raises:
        UserError: unknown method, a target that matches nothing, or an adapter attached already.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}; there are {', '.join(METHODS)}")
    rank = min(config.rank, config.rank if config.text_rank is None else config.text_rank)
    if rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    if config.init not in INITS or config.signature not in SIGNATURES:
        raise UserError(
            f"init {config.init!r}, signature {config.signature!r}: "
            f"there are {', '.join(INITS)} and {', '.join(SIGNATURES)}"
        )
    known = {name: network for name, network in specs(networks).items() if network.adapted}
    if config.targets is None:
        denoisers = [network.targets for network in known.values() if network.role == "denoiser"]
        config = replace(config, targets=denoisers[0] if denoisers else ())
    return METHODS[config.method](known, config, seed)
