"""The table of optimizers, each out of a library, and the learning rate's schedules, diffusers' own.

Help reads the table, so nothing heavy is loaded before one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from .recipe import OptimizationSettings

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Optimizer:
    """A row of `OPTIMIZERS`."""

    place: str
    """module:class."""
    options: Callable[[OptimizationSettings, bool], Mapping[str, Any]]
    """Its arguments beside groups and rate, of the settings and whether all is on a CUDA GPU."""
    package: str = ""
    """What has to be installed, and the name of our extra that does; empty: it is there."""
    rate: float = 1.0
    """Its usual learning rate, as a multiple of AdamW's."""
    finds_rate: bool = False
    """Whether it finds the rate by itself and --learning_rate is a factor of that, best 1."""
    averages: bool = False
    """Whether the weights to use differ from those that are trained, and `eval` and `train` change between them."""


def _adam(settings: OptimizationSettings) -> dict[str, Any]:
    return {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer("torch.optim:AdamW", lambda s, cuda: {**_adam(s), "fused": True if cuda else None}),
    "adamw8bit": Optimizer("bitsandbytes.optim:AdamW8bit", lambda s, cuda: _adam(s), package="bitsandbytes"),
    "prodigy": Optimizer(
        "prodigyopt:Prodigy",
        lambda s, cuda: {**_adam(s), "decouple": True, "use_bias_correction": True, "safeguard_warmup": True},
        package="prodigyopt",
        finds_rate=True,
    ),
    "adafactor": Optimizer(
        "transformers.optimization:Adafactor",
        lambda s, cuda: {"scale_parameter": False, "relative_step": False, "weight_decay": s.adam_weight_decay},
    ),
    "lion": Optimizer(
        "timm.optim:Lion",
        lambda s, cuda: {"betas": (s.adam_beta1, s.adam_beta2), "weight_decay": s.adam_weight_decay},
        rate=0.1,  # its steps are all of one size: 3 to 10 times less (arXiv 2302.06675, section 5)
    ),
    "schedule_free": Optimizer(
        "schedulefree:AdamWScheduleFree", lambda s, cuda: _adam(s), package="schedulefree", averages=True
    ),
}


def make(groups: Groups, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for an adapter's groups of parameters, each with a rate of its own.

    Raises:
        UserError: its library is not installed, or it takes but one rate.
    """
    row = OPTIMIZERS[settings.optimizer]
    module, _, name = row.place.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"--optimizer {settings.optimizer} needs {row.package}: pip install 'singlora-diffusion[{row.package}]'"
        ) from error
    if row.finds_rate and len({group["lr"] for group in groups}) > 1:
        raise UserError(
            f"--optimizer {settings.optimizer} takes one learning rate for all: leave out --text_encoder_lr, and with "
            f"dora or lora+ set their ratio to 1"
        )
    cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    # the polynomial schedule reads `lr`, to end at `recipe.POLYNOMIAL_END`
    with redirect_stdout(StringIO()):  # some tell of their settings
        optimizer: torch.optim.Optimizer = kind(groups, lr=settings.learning_rate, **row.options(settings, cuda))
    if row.averages:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def rate(optimizer: torch.optim.Optimizer) -> float:
    """What the first group of parameters learns with: the rate given, times what the optimizer finds by itself."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def schedule(optimizer: torch.optim.Optimizer, settings: OptimizationSettings) -> Callable[[int], float]:
    """The factor of the peak rate by the number of steps done; a function, so there is no state to keep."""
    from diffusers.optimization import get_scheduler

    found = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
    factor: Callable[[int], float] = found.lr_lambdas[0]
    return factor
