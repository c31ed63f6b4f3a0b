"""The baselines out of PEFT behind the `Adapter` contract; the only file that imports peft.

PEFT's own layers do the work, on the bare diffusers UNet and transformers text encoder. This file says which layers,
puts them in and takes them out exactly, names their tensors as files do, and reads W' - W0 off them. To add something
PEFT has: one row in `ROWS` here and one in `adapters.METHODS`.

What `rank` means beyond the LoRA family:
    oft    the block size of the rotation, PEFT's `oft_block_size`: a layer trains in_features (rank - 1) / 2 numbers.
           Where it does not divide in_features, PEFT takes the nearest divisor and warns. There is no alpha.
    lokr   the rank of the second Kronecker factor: W1 is `LOKR_FACTOR` on each side where that divides; once rank
           reaches half of W2's larger side, PEFT trains W2 in full and a larger rank changes nothing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks, NetworkSpec, specs
from . import inject
from .check_state_dict import check_state
from .config import AdapterConfig

LOKR_FACTOR = 4
"""PEFT's default, -1 (about the square root), saturates at a tenth of LoRA 8's parameters on Stable Diffusion 1.5."""

NAME = "default"  # PEFT's name for the one adapter of a layer; files do not carry it

Layer = Any  # PEFT's layer: annotations of its dynamic attributes would say nothing


def _lora(rank: int, alpha: float, layers: str) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)  # type: ignore[arg-type]  # alpha may be a fraction


def _dora(rank: int, alpha: float, layers: str) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, use_dora=True)  # type: ignore[arg-type]


def _oft(rank: int, alpha: float, layers: str) -> PeftConfig:
    if rank < 2:
        raise UserError("oft: rank is the rotation's block size, and a block of 1 has nothing to learn: use 2 or more")
    if alpha != rank:
        raise UserError("oft has no alpha: leave it out")
    return OFTConfig(oft_block_size=rank, target_modules=layers)


def _lokr(rank: int, alpha: float, layers: str) -> PeftConfig:
    return LoKrConfig(r=rank, alpha=alpha, decompose_factor=LOKR_FACTOR, target_modules=layers)  # type: ignore[arg-type]


def _added(layer: Layer, weight: Tensor) -> Tensor:
    return layer.get_delta_weight(NAME)


def _dora_change(layer: Layer, weight: Tensor) -> Tensor:
    """W' - W0 = (g - 1) W0 + g dW with g = m / ||W0 + dW|| per output row (DoRA, arXiv 2402.09353, equation 5)."""
    direction = layer.get_delta_weight(NAME)
    gain = layer.lora_magnitude_vector[NAME].weight / torch.linalg.norm(weight + direction, dim=1)
    return (gain - 1)[:, None] * weight + gain[:, None] * direction


def _rotated(layer: Layer, weight: Tensor) -> Tensor:
    """W' - W0 = W0 (R - I)^T: PEFT turns the layer's input, x R."""
    rotation = layer.get_delta_weight(NAME)
    return weight @ (rotation - torch.eye(len(rotation), device=rotation.device)).T


def _pair(layer: Layer) -> tuple[Tensor, Tensor]:
    up, down = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
    return up.detach() * layer.scaling[NAME], down.detach().clone()


def _one_rate(layers: Sequence[Layer], lr: float, ratio: float) -> list[dict[str, Any]]:
    return [{"params": [p for layer in layers for p in _tensors(layer).values()], "lr": lr}]


def _loraplus(layers: Sequence[Layer], lr: float, ratio: float) -> list[dict[str, Any]]:
    """PEFT's own grouping: B learns `ratio` times faster than A. Weight decay is left to the caller's optimizer."""
    tuned: Any = nn.ModuleList(layers)  # PEFT asks for its PeftModel, and needs no more than a module
    optimizer = create_loraplus_optimizer(tuned, torch.optim.SGD, lr=lr, loraplus_lr_ratio=ratio)
    return [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups if group["params"]]


class Row(NamedTuple):
    """What PEFT needs to know to build a method, and what we need to know to read it."""

    config: Callable[[int, float, str], PeftConfig]  # rank, alpha, regular expression of the layers' paths
    change: Callable[[Layer, Tensor], Tensor]  # layer, W0 (out, in) float32 -> W' - W0 (out, in) float32
    scales: bool = True  # PEFT can scale the update itself
    factors: Callable[[Layer], tuple[Tensor, Tensor]] | None = None  # up (out, k), down (k, in), where such a pair is
    groups: Callable[[Sequence[Layer], float, float], list[dict[str, Any]]] = _one_rate  # layers, lr, ratio -> groups


ROWS: dict[str, Row] = {
    "lora": Row(_lora, _added, factors=_pair),
    "lora+": Row(_lora, _added, factors=_pair, groups=_loraplus),
    "dora": Row(_dora, _dora_change, scales=False),
    "oft": Row(_oft, _rotated, scales=False),
    "lokr": Row(_lokr, _added),
}


class PeftAdapter:
    """A method of PEFT on the attention projections of a UNet and of text encoders; see `adapters.Adapter`.

    Trained tensors are float32 whatever the base's dtype. PEFT freezes the networks it enters; `detach` thaws what it
    froze. While merged, the networks are plain ones; `detach` from there restores the original weights too.
    """

    u = 1.0  # no ramp

    def __init__(self, networks: Networks, config: AdapterConfig, seed: int = 0) -> None:
        if config.dora or config.init != "kaiming" or config.signature != "positive":
            raise UserError(f"init, signature and dora are options of singlora, not of {config.method}: leave them out")
        self.config = config
        self.networks: dict[str, NetworkSpec] = {}
        self._row = ROWS[config.method]
        self._bases: dict[str, dict[str, nn.Linear]] = {}  # by network, then by path inside it
        self._layers: dict[str, dict[str, Layer]] = {}
        self._originals: dict[str, Tensor] | None = None  # the base weights, while merged
        self._scale = 1.0
        plans: dict[str, PeftConfig] = {}
        for name, network in specs(networks).items():
            rank, alpha, targets = config.for_role(network.role)
            if targets:
                self.networks[name] = network
                self._bases[name] = inject.projections(network.module, targets)
                plans[name] = self._row.config(rank, alpha, "|".join(map(re.escape, self._bases[name])))
        if not plans:
            raise UserError("nothing to adapt: no targets are named for any of the networks")
        self._thaw = [p for network in self.networks.values() for p in network.module.parameters() if p.requires_grad]
        for name, network in self.networks.items():
            start = seed * 0x9E3779B1 + zlib.crc32(name.encode())
            self._layers[name] = _enter(network.module, self._bases[name], plans[name], start)
        if not self._row.scales:
            for _, _, layer in self._named():
                layer.register_forward_hook(self._blend)

    def _blend(self, layer: Layer, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Strength for layers that PEFT cannot scale: W0 + scale (W' - W0), read off the output."""
        return None if self._scale == 1.0 else torch.lerp(layer.base_layer(*args), output, self._scale)

    def _named(self) -> Iterator[tuple[str, nn.Linear, Layer]]:
        for name, layers in self._layers.items():
            for path, layer in layers.items():
                yield self.networks[name].layer(path), self._bases[name][path], layer

    def _put(self, modules: Mapping[str, Mapping[str, nn.Module]]) -> None:
        for name, by_path in modules.items():
            for path, module in by_path.items():
                parent, _, child = path.rpartition(".")
                setattr(self.networks[name].module.get_submodule(parent), child, module)

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, _, layer in self._named() for p in _tensors(layer).values()]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def param_groups(self, lr: float, text_lr: float | None = None) -> list[dict[str, Any]]:
        """One group per network; lora+ has two, A at the network's rate and B at `loraplus_ratio` times that."""
        groups: list[dict[str, Any]] = []
        for name, layers in self._layers.items():
            rate = lr if text_lr is None or self.networks[name].role == "denoiser" else text_lr
            groups += self._row.groups(list(layers.values()), rate, self.config.loraplus_ratio)
        return groups

    def set_step(self, step: int) -> None:
        """Nothing to do: PEFT's methods have no ramp."""

    def set_scale(self, scale: float) -> None:
        self._scale = float(scale)
        if self._row.scales:
            for _, _, layer in self._named():
                layer.set_scale(NAME, self._scale)

    def layers(self) -> dict[str, nn.Linear]:
        return {name: base for name, base, _ in self._named()}

    @torch.no_grad()
    def _change(self, name: str, base: nn.Linear, layer: Layer) -> Tensor:
        original = base.weight if self._originals is None else self._originals[name]
        change = self._row.change(layer, original.detach().float())
        return change if self._row.scales else change * self._scale

    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, base, layer in self._named():
            yield name, self._change(name, base, layer)

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self._row.factors is None:
            raise UserError(f"{self.config.method} has no low-rank form: merge it into a full model")
        for name, _, layer in self._named():
            yield name, *self._row.factors(layer)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": t.detach() for name, _, layer in self._named() for key, t in _tensors(layer).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        check_state(own, state)
        for key, tensor in own.items():
            tensor.copy_(state[key])

    @torch.no_grad()
    def merge(self) -> None:
        if self._originals is not None:
            return
        merged = {name: base.weight.float() + self._change(name, base, layer) for name, base, layer in self._named()}
        self._originals = {name: base.weight.detach().clone() for name, base, _ in self._named()}
        self._put(self._bases)
        for name, base, _ in self._named():
            base.weight.copy_(merged[name])

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._originals is None:
            return
        for name, base, _ in self._named():
            base.weight.copy_(self._originals[name])
        self._originals = None
        self._put(self._layers)

    def detach(self) -> None:
        self.unmerge()
        self._put(self._bases)
        for parameter in self._thaw:
            parameter.requires_grad_(True)
        self._thaw = []


def attach(networks: Networks, config: AdapterConfig, seed: int = 0) -> PeftAdapter:
    """Attach a fresh adapter of `config.method`, a row of `ROWS`; arguments and errors as `adapters.attach`."""
    return PeftAdapter(networks, config, seed)


def _enter(network: nn.Module, bases: Mapping[str, nn.Linear], config: PeftConfig, seed: int) -> dict[str, Layer]:
    """Let PEFT wrap exactly the layers `bases`, with a start that depends on `seed` alone."""
    with _as_float32(bases.values()), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        inject_adapter_in_model(config, network, adapter_name=NAME)
    del network.peft_config
    layers = {path: network.get_submodule(path) for path in bases}
    for path, base in bases.items():
        layers[path].train(base.training)
    return layers


@contextmanager
def _as_float32(bases: Iterable[nn.Linear]) -> Iterator[None]:
    """Show PEFT float32 weights while it starts an adapter.

    It makes everything at the base's dtype: in bfloat16, DoRA's magnitudes would be rounded and W' not start at W0.
    """
    stored = [(base.weight, base.weight.data) for base in bases]
    try:
        for weight, data in stored:
            weight.data = data.float()
        yield
    finally:
        for weight, data in stored:
            weight.data = data


def _tensors(layer: Layer) -> dict[str, nn.Parameter]:
    """What a PEFT layer trains, by its name without PEFT's adapter name: lora_A, lokr_w1, oft_R, ..."""
    named = layer.named_parameters()
    return {key.partition(".")[0]: tensor for key, tensor in named if not key.startswith("base_layer.")}
