"""Attaching an adapter by its configuration: the one way in."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UserError
from ..models.network import Networks, specs
from ..settings import check
from . import targets
from .adapter import Adapter
from .config import AdapterConfig
from .methods import METHODS

__all__ = ["METHODS", "Adapter", "attach"]


def attach(networks: Networks, config: AdapterConfig, seed: int = 0) -> Adapter:
    """Attach a fresh adapter of `config.method` to the networks that the configuration names targets for.

    Args:
        networks: by name, as a family has them, or bare modules (`unet`, `text_encoder`). They are left frozen as the
            caller made them.
        config: what is trained. The adapter's own has the targets spelled out, and 0 for a ramp that is None.
        seed: the same seed gives the same start.

    Raises:
        UserError: a value out of its range, an option of another method, a target that matches nothing or comes twice,
            or an adapter attached already.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}; there are {', '.join(METHODS)}")
    method = METHODS[config.method]
    check(replace(config, method=AdapterConfig.method))  # a row may be newer than the choices of the flag
    for name in _set_options(config):
        if name not in method.options:
            takers = ", ".join(row for row, one in METHODS.items() if name in one.options)
            raise UserError(f"{name} is an option of {takers}, not of {config.method}: leave it out")
    if config.magnitude_lr_ratio != AdapterConfig.magnitude_lr_ratio and not method.has_magnitude(config):
        raise UserError("magnitude_lr_ratio: there are no magnitudes without dora: leave it out")
    known = specs(networks)
    ramp_steps = (config.ramp_steps or 0) if "ramp_steps" in method.options else 0
    return method.attach(known, targets.resolved(replace(config, ramp_steps=ramp_steps), known), seed)


def _set_options(config: AdapterConfig) -> list[str]:
    """The options that not every method takes and that are not as they are by default; a ramp means nothing to some."""
    special = {name for method in METHODS.values() for name in method.options} - {"ramp_steps"}
    return sorted(name for name in special if getattr(config, name) != getattr(AdapterConfig, name))
