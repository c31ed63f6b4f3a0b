"""The settings of an adapter: flags, the group `adapter` of a recipe, the header of every adapter file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval
from tyro.conf import arg

from ..errors import UserError
from ..settings import CountOrZero, Positive
from ..terminal import escaped
from .methods import METHODS

MAX_RANK = 4096
"""More than any layer of a known model has rows, and little enough to allocate on a header's word."""

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
Rank = Annotated[int, Interval(ge=1, le=MAX_RANK)]
Init = Literal["kaiming", "offset"]
Signature = Literal["positive", "balanced"]


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter: what is trained of the model, and how much."""

    method: MethodName = "singlora"
    """singlora: one matrix per layer. lora, lora+, dora, oft, lokr: the baselines, out of PEFT."""
    rank: Annotated[Rank, arg(aliases=["--network_dim", "--lora_rank"])] = 16
    """Rank r in the denoiser. SingLoRA has one matrix per layer, so it fits twice the rank of LoRA into about the same
    size. oft: the block size of the rotation."""
    alpha: Annotated[Positive | None, arg(aliases=["--network_alpha", "--lora_alpha"])] = None
    """The update is scaled by alpha / rank. None: alpha = rank."""
    targets: tuple[str, ...] | None = None
    """Layers of the denoiser that are adapted, by the ends of their paths, as in `to_q attn2.to_k`, or the name of a
    preset of the model. None: the model's default."""
    text_rank: Rank | None = None
    """Rank in the text encoders. None: as in the denoiser."""
    text_alpha: Positive | None = None
    """Alpha in the text encoders. None: equal to their rank."""
    text_targets: tuple[str, ...] | None = ()
    """Layers of the text encoders that are adapted, as `targets`. Empty: none. None: the model's default."""
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout while training, as in PEFT: probability that a number of a layer's input is hidden from the update; 0.1
    is usual. Not for oft and lokr, which have none of this kind."""
    init: Init = "kaiming"
    """SingLoRA: the start. kaiming: entries of variance 1 / (3 n), n = max(out, in). offset: the same, with the initial
    product subtracted, so that the update starts at exactly zero."""
    signature: Signature = "positive"
    """SingLoRA: the signs. positive: A A^T, as in the paper. balanced: A S A^T with S = diag(+1, -1, ...), which may
    also subtract."""
    dora: bool = False
    """SingLoRA with DoRA's learned magnitude per output row on top."""
    ramp_steps: CountOrZero | None = None
    """SingLoRA: T of the ramp u(t) = min(t / T, 1). None: 1 % of the steps, as in the paper's appendix A.1. 0: no
    ramp."""
    loraplus_ratio: Annotated[Positive, arg(aliases=["--loraplus_lr_ratio"])] = 16.0
    """lora+: the learning rate of B over that of A."""
    magnitude_lr_ratio: Positive = 1.0
    """SingLoRA with dora: the learning rate of the magnitudes over that of A."""
    rate_by_width: bool = False
    """SingLoRA: lower the learning rate of wide layers as n^-1/2, the exponent of the paper's analysis."""

    def for_role(self, role: str) -> tuple[int, float, tuple[str, ...]]:
        """Rank, alpha and targets of the networks of a role: denoiser or text."""
        if role == "denoiser":
            return self.rank, float(self.rank if self.alpha is None else self.alpha), self.targets or ()
        rank = self.rank if self.text_rank is None else self.text_rank
        return rank, float(rank if self.text_alpha is None else self.text_alpha), self.text_targets or ()


def check_options(config: AdapterConfig) -> None:
    """Hold the options that not every method takes to the method. A ramp of 0 steps is none.

    Raises:
        UserError: an option of another method, or one that means nothing beside the others.
    """
    method = METHODS[config.method]
    for name in sorted({name for row in METHODS.values() for name in row.options}):
        value = getattr(config, name)
        is_set = bool(value) if name == "ramp_steps" else value != getattr(AdapterConfig, name)
        if is_set and name not in method.options:
            takers = ", ".join(row for row, one in METHODS.items() if name in one.options)
            raise UserError(f"{name} is an option of {takers}, not of {config.method}: leave it out")
    if config.magnitude_lr_ratio != AdapterConfig.magnitude_lr_ratio and not method.has_magnitude(config):
        raise UserError("magnitude_lr_ratio: there are no magnitudes without dora: leave it out")


def from_json(raw: object) -> AdapterConfig:
    """The settings in a file's header, every value of its declared type and range.

    Raises:
        ValueError: an unknown entry, or a value that cannot be.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(raw, Mapping):
        raise ValueError("the header lacks its configuration")
    for name in raw:
        if name not in {one.name for one in fields(AdapterConfig)}:
            entry = escaped(name, 80)
            raise ValueError(f"the configuration has the unknown entry {entry}: written by a newer version?")
    values = dict(raw)
    method = values.pop("method", AdapterConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"the configuration names the unknown method {escaped(method, 40)}")
    if "magnitude_lr_ratio" not in values:
        values = _before_magnitude_lr_ratio(values, method)
    try:
        checked = TypeAdapter(AdapterConfig).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first: Any = error.errors()[0]
        value, name = escaped(first["input"], 40), first["loc"][0]
        why = first["msg"].lower()
        raise ValueError(f"the configuration has the impossible value {value} for {name}: {why}") from None
    return AdapterConfig(**{**vars(checked), "method": method})


def _before_magnitude_lr_ratio(values: dict[str, Any], method: str) -> dict[str, Any]:
    """The settings of a file from before `magnitude_lr_ratio` was one, in today's names.

    `loraplus_ratio` was the magnitudes' rate as well then, and what a method does not take was ignored.
    """
    ratio = values.get("loraplus_ratio", AdapterConfig.loraplus_ratio)
    values["magnitude_lr_ratio"] = ratio if values.get("dora") else AdapterConfig.magnitude_lr_ratio
    ignored = {"loraplus_ratio", "rate_by_width", "ramp_steps"} - METHODS[method].options
    return {name: value for name, value in values.items() if name not in ignored}
