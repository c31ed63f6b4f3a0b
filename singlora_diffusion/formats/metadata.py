"""What an exported file says about itself: the names that kohya's sd-scripts write and other programs show.

`ss_*` are kohya's, `modelspec.*` those of Stability's model metadata standard 1.0.1. All values are texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import __version__
from . import keys, safetensors_io
from .header import Header
from .lora_pairs import Pair

if TYPE_CHECKING:
    from ..adapters.registry import Adapter


class Base(NamedTuple):
    """How other programs call a base model: `ss_base_model_version` and `modelspec.architecture`."""

    version: str
    architecture: str
    v2: bool = False


SDXL = Base("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")
FAMILIES = {
    "stable_diffusion_xl": SDXL,
    "stable_diffusion_3": Base("sd3", "stable-diffusion-3/lora"),
    "flux": Base("flux1", "flux-1-dev/lora"),
}
WIDTHS = {
    768: Base("sd_v1", "stable-diffusion-v1/lora"),
    1024: Base("sd_v2", "stable-diffusion-v2-512/lora", v2=True),
    2048: SDXL,
}
"""By the width of the text that a UNet attends to, where no family is named."""
OTHER = Base("", "stable-diffusion-v1/lora")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
SETTINGS = {
    "ss_seed": "seed",
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "learning_rate",
    "ss_text_encoder_lr": "text_encoder_lr",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_train_steps": "max_train_steps",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_mixed_precision": "mixed_precision",
    "ss_prior_loss_weight": "prior_loss_weight",
}
"""Kohya's names of what a recipe holds."""


def of(path: Path, header: Header, adapter: Adapter, pairs: Mapping[str, Pair]) -> dict[str, str]:
    """The metadata of the file `path`; a function of the adapter, its header and the file's name.

    A1111 knows a file by `ss_output_name`, so that is the file's own name.
    """
    base = _base(header, adapter)
    side, trigger = header.resolution or 512, header.trigger()
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": f"singlora-diffusion/{__version__}",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": PREDICTIONS.get(header.prediction_type, ""),
        "modelspec.trigger_phrase": trigger,
        "modelspec.date": _date(header.started_at),
        "ss_output_name": path.stem,
        "ss_v2": str(base.v2),
        "ss_base_model_version": base.version,
        "ss_sd_model_name": Path(header.base_model).name or header.base_model,
        "ss_sd_model_hash": header.base_hash,
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(pair.rank for pair in pairs.values()),
        "ss_network_alpha": _common(
            _alpha(header, adapter, network) * pairs[names[0]].rank for network, names in keys.by_network(pairs).items()
        ),
        "ss_network_args": json.dumps({"trained_as": header.config.method}),
        "ss_resolution": f"({side}, {side})",
        "ss_steps": str(header.step),
        "ss_tag_frequency": json.dumps({"subject": {trigger: 1}}) if trigger else "",
        "ss_training_started_at": str(header.started_at) if header.started_at else "",
        **_training(header, side),
    }
    return {key: value for key, value in facts.items() if value}


def _training(header: Header, side: int) -> dict[str, str]:
    """What the recipe says; nothing where there is none, as in sums and imports."""
    recipe = header.recipe
    if "instance_data_dir" not in recipe:
        return {}
    facts = {key: str(recipe[name]) for key, name in SETTINGS.items() if recipe.get(name) is not None}
    if recipe.get("train_text_encoder") and "ss_text_encoder_lr" not in facts:
        facts["ss_text_encoder_lr"] = facts.get("ss_learning_rate", "")
    adamw = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",), "weight_decay": ("adam_weight_decay",)}
    given = {name: [recipe[key] for key in names if key in recipe] for name, names in adamw.items()}
    arguments = [
        f"{name}={values[0] if len(values) == 1 else tuple(values)}" for name, values in given.items() if values
    ]
    facts["ss_optimizer"] = f"torch.optim.adamw.AdamW({','.join(arguments)})"
    facts["ss_clip_skip"] = "None"  # the text encoder's last layer, or what the family always takes
    if header.images:
        folder = Path(str(recipe["instance_data_dir"])).name
        facts["ss_num_train_images"] = str(header.images)
        facts["ss_dataset_dirs"] = json.dumps({folder: {"n_repeats": 1, "img_count": header.images}})
        facts["ss_bucket_info"] = json.dumps({"buckets": {"0": {"resolution": [side, side], "count": header.images}}})
    if recipe.get("with_prior_preservation"):
        facts["ss_num_reg_images"] = str(recipe.get("num_class_images", ""))
    return facts


def _base(header: Header, adapter: Adapter) -> Base:
    if header.family in FAMILIES:
        return FAMILIES[header.family]
    for network in adapter.networks.values():
        config: Any = getattr(network.module, "config", None)
        name = "cross_attention_dim" if network.role == "denoiser" else "hidden_size"
        found = WIDTHS.get(getattr(config, name, 0))
        if found is not None:
            return SDXL if network.prefix("kohya").startswith(("lora_te1", "lora_te2")) else found
    return OTHER


def _alpha(header: Header, adapter: Adapter, network: str) -> float:
    """alpha / rank with the ramp, as files of kohya's form store it for each layer, over their rank."""
    rank, alpha, _ = header.config.for_role(adapter.networks[network].role)
    return alpha / rank * adapter.u or 1.0


def _common(values: Any) -> str:
    found = {str(value) for value in values}
    return found.pop() if len(found) == 1 else "Dynamic"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds") if seconds else ""


def hashes(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, str]:
    """By what programs recognise a file whatever is written into its metadata later.

    sshs_model_hash and modelspec.hash_sha256: sha256 of all that comes after the header. sshs_legacy_hash: the first
    eight digits of the sha256 of bytes 0x100000 to 0x110000 of a file whose metadata are the `ss_` entries alone.
    """
    data = hashlib.sha256()
    for name in safetensors_io.order(tensors):
        data.update(safetensors_io.tensor_bytes(tensors[name]))
    legacy = hashlib.sha256()
    place, start, stop = 0, 0x100000, 0x110000
    for part in safetensors_io.serialized(tensors, {key: facts[key] for key in facts if key.startswith("ss_")}):
        legacy.update(part[max(start - place, 0) : max(stop - place, 0)])
        place += len(part)
    return {
        "sshs_model_hash": data.hexdigest(),
        "sshs_legacy_hash": legacy.hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{data.hexdigest()}",
    }
