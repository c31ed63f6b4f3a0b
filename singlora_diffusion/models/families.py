"""The table of families, and loading by it: a model folder says itself which family it is of."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..terminal import escaped
from . import hub, parts
from .family import Family

if TYPE_CHECKING:
    from .network import NetworkSpec

FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl",  # what the refiner names itself
    "FluxPipeline": "flux",
}
"""The file of this package for each pipeline class that a folder's model_index.json may name.

It has `load(path, source, dtype, device) -> Family`, `NETWORKS` with the class of each network that a `NetworkSpec` is
about, and `specs(modules) -> dict[str, NetworkSpec]`.
"""

DTYPES = ("float32", "bfloat16", "float16")


def load(name_or_path: str, dtype: str = "float32", device: str = "cpu") -> Family:
    """Load a base model, frozen and in eval mode.

    Args:
        name_or_path: `toyworld`, a diffusers folder, or a hub id.
        dtype: float32, bfloat16 or float16: what the frozen networks compute in.
        device: a torch device.

    Raises:
        UserError: not a model, an unsupported pipeline, or damaged files.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown precision {dtype!r}: give one of {', '.join(DTYPES)}")
    path = hub.folder(name_or_path)
    family: Family = _home(path).load(path, name_or_path, dtype, device)
    return family


def meta_networks(name_or_path: str | Path) -> dict[str, NetworkSpec]:
    """The networks of a base model without weights, on torch's meta device, from its config files alone.

    Raises:
        UserError: as `load`.
    """
    path = hub.configs(str(name_or_path))
    home = _home(path)
    modules = {name: parts.without_weights(kind, path / name) for name, kind in home.NETWORKS.items()}
    specs: dict[str, NetworkSpec] = home.specs(modules)
    return specs


def _home(path: Path) -> Any:
    """The file of the family that a folder is of."""
    pipeline = str(parts.index(path)["_class_name"])
    if pipeline not in FAMILIES:
        raise UserError(f"{path} is a {escaped(pipeline)}; supported: {', '.join(FAMILIES)}")
    return import_module(f".{FAMILIES[pipeline]}", __package__)
