"""The scores that a comparison knows: those of `singlora score`, and on toyworld those of its reader."""

from __future__ import annotations

from ..metrics import METRICS
from . import oracle

SCORES = {**METRICS, **oracle.ROWS}
