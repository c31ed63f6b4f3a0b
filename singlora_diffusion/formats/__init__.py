"""Adapter files, in and out. Importing this package loads no torch: each function brings what it needs when first used.

What users ask for:
    native          our own file: save, load, verify, read_header
    exporting       LoRA files for other programs
    peft_folder     an adapter of one network as a folder of PEFT's
    merging         whole pipelines with an adapter merged in
    importing       SingLoRAs of other programs converted to ours; any readable file attached for generation
    inspecting      what is in a file, layer by layer
    arithmetic      exact sums of SingLoRAs
    settings        the flags of the commands; commands runs them

What these use:
    header          the header of our file
    safetensors_io  safetensors files, checked by the library and written whole or not at all
    keys            how programs spell layers and tensors
    original_names  layers as the implementations that models were first published in name them
    forms           the forms for each base model, and the programs that read them
    file_kinds      what a file is
    signed_factors  a SingLoRA as columns with signs: sums, tied LoRA pairs
    lora_pairs      any adapter as ordinary LoRA pairs
    metadata        the metadata of an exported file
    verify_export   an exported file loaded back through diffusers and compared
    hollow          networks without weights, for models that do not fit into memory
    diffusers_loader  LoRA files through diffusers' own loader
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import AddSettings, ExportSettings, ImportSettings, InspectSettings

if TYPE_CHECKING:
    from .arithmetic import add
    from .exporting import export
    from .file_kinds import recognise
    from .header import Header
    from .importing import attach_files, import_
    from .inspecting import inspect, show
    from .merging import merge_into
    from .native import load, read_header, save, verify
    from .peft_folder import export_peft

_HOMES = {
    "add": "arithmetic",
    "attach_files": "importing",
    "export": "exporting",
    "export_peft": "peft_folder",
    "Header": "header",
    "import_": "importing",
    "inspect": "inspecting",
    "load": "native",
    "merge_into": "merging",
    "read_header": "native",
    "recognise": "file_kinds",
    "save": "native",
    "show": "inspecting",
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
    "export_peft",
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
