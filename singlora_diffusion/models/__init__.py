"""What is trained on: base-model families behind one contract. Loads no torch until it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .families import FAMILIES, family_of, load, meta_networks
    from .family import Conditioning, Family
    from .network import NetworkSpec
    from .stock import sample
    from .stored import find

_HOMES = {
    "FAMILIES": "families",
    "Conditioning": "family",
    "Family": "family",
    "NetworkSpec": "network",
    "family_of": "families",
    "find": "stored",
    "load": "families",
    "meta_networks": "families",
    "sample": "stock",
}

__all__ = ["FAMILIES", "Conditioning", "Family", "NetworkSpec", "family_of", "find", "load", "meta_networks", "sample"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
