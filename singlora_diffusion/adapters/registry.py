"""Attaching an adapter by its configuration: the one way in."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UserError
from ..models.network import Networks, specs
from ..settings import check
from . import targets
from .adapter import Adapter
from .config import AdapterConfig, check_options
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
    check(replace(config, method=AdapterConfig.method))  # the flag knows no method that was added to METHODS later
    check_options(config)
    known = specs(networks)
    config = replace(config, ramp_steps=config.ramp_steps or 0)
    return METHODS[config.method].attach(known, targets.resolved(config, known), seed)
