"""Whole pipelines with an adapter merged into their weights, for what has no LoRA form or no program to load it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import UserError
from ..files import reason
from ..models import Family
from ..terminal import escaped
from . import diffusers_loader

if TYPE_CHECKING:
    from ..adapters.registry import Adapter


def merge_into(family: Family, adapter: Adapter, folder: str | Path) -> Path:
    """Write the whole pipeline with the adapter merged into its weights: a diffusers folder that needs nothing of ours.

    Args:
        family: the base model the adapter is attached to; it is left as it was.
        folder: new, or empty.

    Raises:
        UserError: the folder holds something, cannot be written, or what was written does not read back the same.
            Nothing half-written stays.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not empty; name a new folder")
    part = folder.with_name(f".{folder.name[:100]}.part-{os.getpid()}")
    adapter.merge()
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with diffusers_loader.quiet():
            family.pipeline().save_pretrained(part, safe_serialization=True)
            for name, network in adapter.networks.items():
                _check_weights(part / name, network.module)
        part.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {escaped(reason(error))}") from error
    except SafetensorError as error:  # its way to say that the disk is full
        raise UserError(f"{folder}: cannot be written: {escaped(error)}") from error
    finally:
        adapter.unmerge()
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _check_weights(folder: Path, network: nn.Module) -> None:
    here = network.state_dict()
    dtype = next(network.parameters()).dtype
    there = type(network).from_pretrained(folder, torch_dtype=dtype).state_dict()  # type: ignore[attr-defined]
    for name, tensor in here.items():
        if name not in there or not torch.equal(tensor.cpu(), there[name]):
            raise UserError(f"{folder.name}: not written: {name} reads back differently")
