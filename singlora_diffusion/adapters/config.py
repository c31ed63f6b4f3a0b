"""What it takes to rebuild an adapter on a base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval
from tyro.conf import arg

from ..settings import CountOrZero, Positive

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal["singlora", "lora", "lora+", "dora", "oft", "lokr"]
Rank = Annotated[int, Interval(ge=1, le=4096)]


@dataclass(frozen=True)
class AdapterConfig:
    """What it takes to rebuild an adapter's modules on a base model; stored in every adapter file."""

    method: MethodName = "singlora"
    """A row of `adapters.METHODS`: singlora, lora, lora+, dora, oft, lokr."""
    rank: Annotated[Rank, arg(aliases=["--network_dim", "--lora_rank"])] = 16
    """Rank r in the UNet."""
    alpha: Annotated[Positive | None, arg(aliases=["--network_alpha", "--lora_alpha"])] = None
    """The update is scaled by alpha / rank. None: equal to rank."""
    targets: tuple[str, ...] | None = None
    """Layers of the denoiser that are adapted, by the ends of their paths. None: its attention projections."""
    text_rank: Rank | None = None
    """Rank in the text encoder. None: as in the UNet."""
    text_alpha: Positive | None = None
    """None: equal to the text encoder's rank."""
    text_targets: tuple[str, ...] | None = ()
    """Projections of the text encoder that are adapted: q_proj k_proj v_proj out_proj. Empty: none."""
    init: Literal["kaiming", "offset"] = "kaiming"
    """kaiming: entries of variance about 1/n. offset: the same, with its product subtracted, so dW starts at zero."""
    signature: Literal["positive", "balanced"] = "positive"
    """positive: A A^T, as in the paper. balanced: A S A^T with S = diag(+1, -1, ...), indefinite."""
    dora: bool = False
    """A learned magnitude per output row on top of the SingLoRA direction."""
    ramp_steps: CountOrZero | None = None
    """T in u(t) = min(t / T, 1). 0: u = 1 throughout."""
    loraplus_ratio: Annotated[Positive, arg(aliases=["--loraplus_lr_ratio"])] = 16.0
    """lora+: rate of B over rate of A. SingLoRA with dora: rate of the magnitudes over rate of A."""

    rate_by_width: bool = False
    """SingLoRA: lower the rate of wide layers as n^-1/2, the exponent of the paper's analysis."""

    def for_role(self, role: str) -> tuple[int, float, tuple[str, ...]]:
        """Rank, alpha and targets of the networks of a role: denoiser or text."""
        if role == "denoiser":
            return self.rank, float(self.rank if self.alpha is None else self.alpha), self.targets or ()
        rank = self.rank if self.text_rank is None else self.text_rank
        return rank, float(rank if self.text_alpha is None else self.text_alpha), self.text_targets or ()
