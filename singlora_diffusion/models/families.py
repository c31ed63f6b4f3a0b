"""The table of families, and loading by it: a model folder says itself which family it is of."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..terminal import escaped
from . import parts, quantized
from .family import Family
from .stored import described, find

if TYPE_CHECKING:
    from .network import NetworkSpec, Part

FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl",  # what the refiner names itself
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux_2",
}
"""The file of this package for each pipeline class that a folder's model_index.json may name.

It has `load(stored, dtype, device, quantization) -> Family` and `NETWORKS`, the networks by name, the denoiser
first.
"""

DTYPES = ("float32", "bfloat16", "float16")


def load(
    name_or_path: str,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str | None = None,
    vae: str | None = None,
) -> Family:
    """Load a base model, frozen and in eval mode.

    Args:
        name_or_path: `toyworld`, `toyworld-flow`, a diffusers folder, a hub id, or a single-file checkpoint.
        dtype: float32, bfloat16 or float16: what the frozen networks compute in.
        device: a torch device.
        quantization: how to pack the weights of the large networks, a name of `quantized.QUANTIZATIONS`; None: not at
            all.
        vae: another autoencoder, as `stored.find` takes it; None: the model's own.

    Raises:
        UserError: not a model, an unsupported pipeline, or damaged files.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown precision {dtype!r}: give one of {', '.join(DTYPES)}")
    if quantization is not None:
        quantized.check(quantization)
    stored = find(name_or_path, vae)
    family: Family = _home(stored.path, parts.index(stored.path)).load(stored, dtype, device, quantization)
    return family


def meta_networks(name_or_path: str | Path) -> dict[str, NetworkSpec]:
    """The networks of a base model without weights, on torch's meta device, from its config files alone.

    Raises:
        UserError: as `load`.
    """
    path = described(str(name_or_path))
    index = parts.index(path)
    table: dict[str, Part] = _home(path, index).NETWORKS
    return {
        name: part.spec(name, parts.without_weights(part.kind, path / name))
        for name, part in table.items()
        if parts.listed(index, name)
    }


def family_of(name_or_path: str) -> str:
    """The family of a base model, one of the values of `FAMILIES`, from its config files alone.

    Raises:
        UserError: as `load`.
    """
    path = described(name_or_path)
    return _family(path, parts.index(path))


def _home(path: Path, index: Mapping[str, Any]) -> Any:
    """The file of the family that a folder is of."""
    return import_module(f".{_family(path, index)}", __package__)


def _family(path: Path, index: Mapping[str, Any]) -> str:
    pipeline = str(index["_class_name"])
    if pipeline not in FAMILIES:
        raise UserError(f"{escaped(path, 1000)} is a {escaped(pipeline)}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]
