"""The baselines out of PEFT behind the `Adapter` contract; the only file that imports peft.

PEFT's own layers do the work, inside the bare networks. This file says which layers, names their tensors as files do,
and reads W' - W0 off them. To add something PEFT has: one row in `ROWS` here and one in `methods.METHODS`.

What `rank` means beyond the LoRA family:
    oft    the block size of the rotation, PEFT's `oft_block_size`: a layer trains in_features (rank - 1) / 2 numbers.
           Where it does not divide in_features, PEFT takes the nearest divisor. There is no alpha.
    lokr   the rank of the second Kronecker factor: W1 is `LOKR_FACTOR` on each side where that divides; once rank
           reaches half of W2's larger side, PEFT trains W2 in full and a larger rank changes nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from ..errors import UserError
from ..models.linear_view import inside
from ..models.network import NetworkSpec
from . import inject, targets
from .adapter import Adapter, dropout_of, start_seed
from .adapter import Layer as AdaptedLayer
from .config import AdapterConfig
from .delta import Factors
from .dropout import Dropout
from .methods import LOKR_FACTOR

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


def _pair(layer: Layer) -> Factors:
    up, down = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
    return Factors(up.detach() * layer.scaling[NAME], down.detach().clone())


def _pair_at_scale_one(layer: Layer) -> Factors:
    """Of a layer that PEFT does not scale; its scaling is alpha / rank."""
    up, down, _ = _pair(layer)
    return Factors(up, down, layer.lora_magnitude_vector[NAME].weight.detach())


class Row(NamedTuple):
    """What PEFT needs to know to build a method, and what we need to know to read it."""

    config: Callable[[int, float, str], PeftConfig]  # rank, alpha, regular expression of the layers' paths
    change: Callable[[Layer, Tensor], Tensor]  # layer, W0 (out, in) float32 -> W' - W0 (out, in) float32
    scales: bool = True  # PEFT can scale the update itself
    factors: Callable[[Layer], Factors] | None = None  # where there is a pair
    fast: str = ""  # the tensor that learns `loraplus_ratio` times faster than the others


ROWS: dict[str, Row] = {
    "lora": Row(_lora, _added, factors=_pair),
    "lora+": Row(_lora, _added, factors=_pair, fast="lora_B"),
    "dora": Row(_dora, _dora_change, scales=False, factors=_pair_at_scale_one),
    "oft": Row(_oft, _rotated, scales=False),
    "lokr": Row(_lokr, _added),
}


class PeftDelta:
    """A layer of PEFT's behind the contract of `delta.Delta`. There is no ramp, and every number is allowed."""

    u = 1.0

    def __init__(self, layer: Layer, row: Row, ratio: float, dropout: Dropout | None) -> None:
        self.layer, self.scale = layer, 1.0
        self._row, self._ratio, self._dropout = row, ratio, dropout
        if not row.scales:
            layer.register_forward_hook(self._blend)

    def _blend(self, layer: Layer, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Strength for layers that PEFT cannot scale: W0 + scale (W' - W0), read off the output."""
        return None if self.scale == 1.0 else torch.lerp(layer.base_layer(*args), output, self.scale)

    def set_ramp(self, u: float) -> None:
        if u != 1.0:
            raise UserError(f"u = {u:g}: this method has no ramp")

    def set_scale(self, scale: float) -> None:
        self.scale = float(scale)
        if self._row.scales:
            self.layer.set_scale(NAME, self.scale)

    def settle(self) -> None: ...

    def number_rows(self, rows: Tensor | None) -> None:
        """PEFT's DoRA lets its base term read the same as the update where there is a dropout and the layer trains."""
        if self._dropout is not None:
            self._dropout.rows = rows
            self.layer.lora_dropout[NAME] = nn.Identity() if rows is None else self._dropout  # not PEFT's own, whose
            self.layer.training = rows is not None  # masks follow from what was drawn before

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.trained())

    def trained(self) -> dict[str, nn.Parameter]:
        """By PEFT's names without its name of the adapter: lora_A, lokr_w1, oft_R, ..."""
        named = self.layer.named_parameters()
        return {key.partition(".")[0]: tensor for key, tensor in named if not key.startswith("base_layer.")}

    def rate(self, key: str, narrowest: int) -> float:
        return self._ratio if key == self._row.fast else 1.0

    def delta_weight(self, weight: Tensor) -> Tensor:
        change = self._row.change(self.layer, weight.float())
        return change if self._row.scales else change * self.scale

    def factors(self) -> Factors | None:
        return self._row.factors(self.layer) if self._row.factors is not None else None


def attach(networks: Mapping[str, NetworkSpec], config: AdapterConfig, seed: int) -> Adapter:
    """Attach a fresh adapter of `config.method`, a row of `ROWS`; arguments and errors as `registry.attach`.

    Trained tensors are float32 whatever the base's dtype. PEFT freezes the networks it enters, until they are taken out
    or merged.
    """
    row, chosen, plans = ROWS[config.method], targets.chosen(networks, config), {}
    for name, bases in chosen.items():
        rank, alpha, _ = config.for_role(networks[name].role)
        plans[name] = row.config(rank, alpha, "|".join(map(re.escape, bases)))
    free = {name: [p for p in networks[name].module.parameters() if p.requires_grad] for name in chosen}
    layers: dict[str, dict[str, Layer]] = {}
    for name, bases in chosen.items():
        as_it_was = inject.replace(networks[name].module, bases)  # PEFT is to find linear layers, views included
        layers[name] = _enter(networks[name].module, bases, plans[name], start_seed(seed, name))
        as_it_was()

    def put_in() -> Callable[[], None]:
        with ExitStack() as undo:
            for name, wrapped in layers.items():
                module = networks[name].module
                undo.callback(inject.replace(module, wrapped))
                inner = {path: inside(base, "base_layer") for path, base in chosen[name].items()}
                undo.callback(inject.keep_keys(module, inner))
                undo.callback(_freeze(free[name]))
            return undo.pop_all().close

    adapted = []
    for name, bases in chosen.items():
        for path, base in bases.items():
            dropout = dropout_of(config, networks[name].layer(path))
            delta = PeftDelta(layers[name][path], row, config.loraplus_ratio, dropout)
            adapted.append(AdaptedLayer(networks[name], path, base, delta))
    return Adapter(config, adapted, put_in)


def _freeze(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Freeze parameters; returns what thaws them."""
    for parameter in parameters:
        parameter.requires_grad_(False)

    def thaw() -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)

    return thaw


def _enter(network: nn.Module, bases: Mapping[str, nn.Linear], config: PeftConfig, seed: int) -> dict[str, Layer]:
    """Let PEFT wrap exactly the layers `bases`, with a start that depends on `seed` alone."""
    with _as_float32(bases.values()), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`")  # the nearest size that divides is what is meant
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
    stored = [(weight, weight.data) for base in bases for weight in base.parameters()]
    try:
        for weight, data in stored:
            weight.data = data.float()
        yield
    finally:
        for weight, data in stored:
            weight.data = data
