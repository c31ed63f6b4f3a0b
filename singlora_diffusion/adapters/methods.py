"""The table of methods: what a method is called, what it offers, and the closed forms of the tensors it keeps.

Loads no torch: help, budgets and the checks of files read it. To add an update rule W0 + dW: a `delta.Delta` in a
module of its own and a row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.network import NetworkSpec
    from .adapter import Adapter
    from .config import AdapterConfig

    Attach = Callable[[Mapping[str, NetworkSpec], AdapterConfig, int], Adapter]

Shape = tuple[int, ...]

LOKR_FACTOR = 4
"""PEFT's default, -1 (about the square root), saturates at a tenth of LoRA 8's parameters on Stable Diffusion 1.5."""


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`."""

    label: str
    """Its name in tables and figures."""
    attach: Attach
    """Attaches a fresh adapter: networks, config, seed."""
    tensors: Callable[[AdapterConfig, int, int, int], Mapping[str, Shape]]
    """What is kept of a layer, by key: config, rank, out, in -> shapes."""
    options: frozenset[str] = frozenset()
    """Fields of `AdapterConfig` that not every method takes, and this one does."""
    fixed: frozenset[str] = frozenset()
    """Keys of `tensors` that are not trained."""
    magnitude: str = ""
    """The key of the learned norm per output row, where there is one."""
    low_rank: bool = True
    """Whether its direction is an ordinary pair up @ down, which other programs load."""
    rate: float = 1.0
    """Its usual learning rate, as a multiple of the base model's: docs/methods.md says what of it was measured."""
    takes: Callable[[int, int], bool] = lambda rank, into: True
    """Whether a rank is used as it is at a layer with `in` features; else the nearest that fits is."""

    def count(self, config: AdapterConfig, rank: int, out: int, into: int) -> int:
        """Trained numbers of one layer."""
        shapes = self.tensors(config, rank, out, into)
        return sum(math.prod(shape) for key, shape in shapes.items() if key not in self.fixed)

    def has_magnitude(self, config: AdapterConfig) -> bool:
        """Whether there is a learned norm per output row beside the direction."""
        return bool(self.magnitude) and self.magnitude in self.tensors(config, 2, 2, 2)


def by_delta(form: str | Callable[..., Any]) -> Attach:
    """`Method.attach` of a rule whose layers are deltas.

    Args:
        form: makes the `Delta` of a layer: (base, rank, alpha, config, generator); or where to find it, as
            `.module:name`, so that it is imported only when it is used.
    """

    def attach(networks: Mapping[str, NetworkSpec], config: AdapterConfig, seed: int) -> Adapter:
        from .adapter import of_deltas

        return of_deltas(networks, config, seed, _found(form) if isinstance(form, str) else form)

    return attach


def _found(form: str) -> Callable[..., Any]:
    module, _, name = form.partition(":")
    made: Callable[..., Any] = getattr(import_module(module, __package__), name)
    return made


def _peft(networks: Mapping[str, NetworkSpec], config: AdapterConfig, seed: int) -> Adapter:
    from .peft_baselines import attach

    return attach(networks, config, seed)


def _singlora(config: AdapterConfig, rank: int, out: int, into: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"A": (max(out, into), rank)}
    if config.dora:
        shapes["magnitude"] = (out,)
    if config.init == "offset":
        shapes["A0"] = shapes["A"]
    return shapes


def _lora(config: AdapterConfig, rank: int, out: int, into: int) -> dict[str, Shape]:
    return {"lora_A": (rank, into), "lora_B": (out, rank)}


def _dora(config: AdapterConfig, rank: int, out: int, into: int) -> dict[str, Shape]:
    return {**_lora(config, rank, out, into), "lora_magnitude_vector": (out,)}


def _oft(config: AdapterConfig, rank: int, out: int, into: int) -> dict[str, Shape]:
    """In / b skew-symmetric blocks, b the divisor of `in` nearest to `rank`, the smaller one of two."""
    block = min(_divisors(into), key=lambda b: (abs(b - rank), b))
    return {"oft_R": (into // block, block * (block - 1) // 2)}


@cache
def _divisors(size: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, size + 1) if size % d == 0)


def _lokr(config: AdapterConfig, rank: int, out: int, into: int) -> dict[str, Shape]:
    """W1 in full, W2 as a pair of rank `rank` or, once that is half its larger side, in full too."""
    (out1, out2), (in1, in2) = _split(out), _split(into)
    first: dict[str, Shape] = {"lokr_w1": (out1, in1)}
    if 2 * rank < max(out2, in2):
        return {**first, "lokr_w2_a": (out2, rank), "lokr_w2_b": (rank, in2)}
    return {**first, "lokr_w2": (out2, in2)}


def _split(size: int) -> tuple[int, int]:
    if size % LOKR_FACTOR == 0:
        return LOKR_FACTOR, size // LOKR_FACTOR
    first = max(d for d in _divisors(size) if d < LOKR_FACTOR and d * d <= size)
    return first, size // first


SINGLORA_OPTIONS = frozenset(
    {"init", "signature", "dora", "ramp_steps", "magnitude_lr_ratio", "rate_by_width", "lora_dropout"}
)

METHODS: dict[str, Method] = {
    "singlora": Method(
        "SingLoRA",
        by_delta(".singlora_dora:delta"),
        _singlora,
        options=SINGLORA_OPTIONS,
        fixed=frozenset({"A0"}),
        magnitude="magnitude",
    ),
    "lora": Method("LoRA", _peft, _lora, options=frozenset({"lora_dropout"})),
    "lora+": Method("LoRA+", _peft, _lora, options=frozenset({"loraplus_ratio", "lora_dropout"}), rate=0.2),
    "dora": Method("DoRA", _peft, _dora, options=frozenset({"lora_dropout"}), magnitude="lora_magnitude_vector"),
    "oft": Method("OFT", _peft, _oft, low_rank=False, takes=lambda rank, into: into % rank == 0, rate=0.5),
    "lokr": Method("LoKr", _peft, _lokr, low_rank=False),
}
