"""What is trained: deltas of frozen layers, put into networks and taken out again. Loads no torch until it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import AdapterConfig
from .methods import METHODS

if TYPE_CHECKING:
    from .registry import Adapter, attach

__all__ = ["METHODS", "Adapter", "AdapterConfig", "attach"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".registry", __name__), name)
