"""Adapter files, in and out. Importing this package loads no torch: each verb brings what it needs when first used.

What users ask for:
    native       our own file: save, load, verify, read_header
    outward      export to kohya, diffusers, PEFT; merge_into a full pipeline
    inward       import other programs' SingLoRAs; attach anything readable for generation
    inspection   what is in a file, layer by layer
    arithmetic   exact sums of SingLoRAs
    settings     the flags of the verbs; verbs runs them

What they stand on:
    container    safetensors files, read with suspicion and written whole or not at all
    names        how the outside world spells layers and tensors
    recognition  what a file is
    columns      a SingLoRA as signed columns: sums, disguises
    pairs        any adapter as ordinary LoRA pairs
    proof        an exported file loaded back through diffusers and compared
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import AddSettings, ExportSettings, ImportSettings, InspectSettings

if TYPE_CHECKING:
    from .arithmetic import add
    from .inspection import inspect, show
    from .inward import attach_files, import_, recognise
    from .native import Header, load, read_header, save, verify
    from .outward import export, merge_into

_HOMES = {
    "add": "arithmetic",
    "attach_files": "inward",
    "export": "outward",
    "Header": "native",
    "import_": "inward",
    "inspect": "inspection",
    "load": "native",
    "merge_into": "outward",
    "read_header": "native",
    "recognise": "inward",
    "save": "native",
    "show": "inspection",
    "verify": "native",
}

__all__ = [
    "AddSettings",
    "ExportSettings",
    "Header",
    "ImportSettings",
    "InspectSettings",
    "add",
    "attach_files",
    "export",
    "import_",
    "inspect",
    "load",
    "merge_into",
    "read_header",
    "recognise",
    "save",
    "show",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES.values():
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
