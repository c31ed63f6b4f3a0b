"""An adapter of one network as PEFT keeps them: a folder with adapter_model.safetensors and adapter_config.json.

    PeftModel.from_pretrained(network, folder)

computes what the adapter does. PEFT's names are paths in the network, so it needs no form of diffusers: this is how
adapters of language models go to other programs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import files
from ..errors import UserError
from ..models.linear_view import LinearView
from ..terminal import escaped
from . import keys, lora_pairs, safetensors_io, verify_export

if TYPE_CHECKING:
    from ..adapters.registry import Adapter
    from ..models.network import NetworkSpec

MODEL, CONFIG = "adapter_model.safetensors", lora_pairs.CONFIG


def export_peft(
    adapter: Adapter, folder: str | Path, *, heads: Sequence[str] = (), base_model: str = "", overwrite: bool = False
) -> float:
    """Write an adapter as a PEFT folder, and verify it by loading it with PEFT into a copy of the network.

    Args:
        heads: submodules of the network that were trained as a whole beside it, such as a classifier.
        base_model: the network as PEFT's own loaders find it.

    Returns:
        The largest relative difference of the network's outputs, as PEFT computes them, from the adapter's.

    Raises:
        UserError: the adapter is of several networks, its method has no LoRA form, the folder holds a PEFT adapter
            already, or the outputs differ by more than rounding explains. Nothing is written then.
    """
    folder = Path(folder)
    if len(adapter.networks) != 1:
        raise UserError(f"a PEFT folder holds the adapter of one network, this is of {', '.join(adapter.networks)}")
    if not overwrite and any((folder / name).exists() for name in (MODEL, CONFIG)):
        raise UserError(f"{escaped(folder, 1000)}: holds a PEFT adapter already: name another folder")
    (spec,) = adapter.networks.values()
    tensors, config = _contents(adapter, spec, heads)
    config["base_model_name_or_path"] = base_model
    with tempfile.TemporaryDirectory() as trial:
        _write(Path(trial), tensors, config)
        difference = _tried(Path(trial), adapter, spec)
    _write(folder, tensors, config)
    return difference


def _contents(adapter: Adapter, spec: NetworkSpec, heads: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    paths = verify_export.paths(adapter, spec.name)
    pairs = {paths[name]: pair for name, pair in lora_pairs.of_adapter(adapter)}
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        at = f"{keys.PEFT_WRAPPER}{path}"
        tensors |= {f"{at}{keys.PEFT.up}": pair.up, f"{at}{keys.PEFT.down}": pair.down}
        if pair.magnitude is not None:
            tensors[f"{at}{keys.MAGNITUDE['denoiser']}"] = pair.magnitude
    for head in heads:
        for key, tensor in spec.module.get_submodule(head).state_dict().items():
            tensors[f"{keys.PEFT_WRAPPER}{head}.{key}"] = tensor
    rank = max(pair.rank for pair in pairs.values())
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # alpha, rank and ramp are in the factors
        "target_modules": list(pairs),
        "modules_to_save": list(heads) or None,
        "fan_in_fan_out": any(isinstance(base, LinearView) for base in adapter.layers().values()),
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, config


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    safetensors_io.write(folder / MODEL, tensors, {"format": "pt"})
    files.write_json(folder / CONFIG, config)


def _tried(folder: Path, adapter: Adapter, spec: NetworkSpec) -> float:
    """How far the network's outputs with this folder are from those with the adapter, without dropout."""
    from peft import PeftModel

    training = spec.module.training
    spec.module.eval()
    try:
        loaded = PeftModel.from_pretrained(verify_export.twin(spec.module, spec.name, adapter), str(folder)).eval()
        return verify_export.compare_outputs(spec, loaded, layers=0.0)[0]
    finally:
        spec.module.train(training)
