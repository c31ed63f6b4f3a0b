"""Which noise levels a flow-matching model is trained at, and how they count: flags, a group of a recipe.

Loads no torch. The formulas stand in `flow_matching`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .. import settings
from ..errors import UserError
from ..settings import Number, Positive

AUTO = "auto"


@dataclass(frozen=True)
class TimeSettings:
    """Noise levels in training, for base models that are trained by flow matching (FLUX, Stable Diffusion 3)."""

    timestep_shift: Positive | Literal["auto"] | None = None
    """Shift n of the noise levels s to n s / (1 + (n - 1) s): above 1 trains more at high noise. auto: the shift that
    the model samples with at the size of the training images. None: as in diffusers' script for the model."""
    weighting_scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] | None = None
    """Which levels are drawn more often (logit_normal, mode) or count more in the loss (sigma_sqrt, cosmap), as in
    diffusers' scripts. None: as in the script for the model."""
    logit_mean: Number | None = None
    """logit_normal: the mean; above 0 trains more at low noise, as in diffusers' scripts. None: 0."""
    logit_std: Positive | None = None
    """logit_normal: the standard deviation. None: 1."""
    mode_scale: Annotated[float, Interval(ge=-1, le=1.75)] | None = None
    """mode: above 0 trains more in the middle, below 0 more at the ends. None: 1.29."""


SCHEME = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
"""An option -> the weighting scheme that it belongs to."""


def check(chosen: TimeSettings) -> None:
    """
    Raises:
        UserError: an option of another weighting scheme.
    """
    for name in settings.changed(chosen):
        if SCHEME.get(name, chosen.weighting_scheme) != chosen.weighting_scheme:
            raise UserError(f"--{name}: only with --weighting_scheme {SCHEME[name]}")
