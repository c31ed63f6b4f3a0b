"""The metadata of an exported file, under the names that kohya's sd-scripts write and other programs show.

`ss_*` are kohya's, `modelspec.*` those of Stability's model metadata standard 1.0.1. All values are texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
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
    """How other programs call a base model."""

    version: str
    """`ss_base_model_version`."""
    architecture: str
    """`modelspec.architecture`, without what follows for a LoRA."""
    v2: bool = False
    side: int = 1024
    """The resolution where the header names none."""
    module: str = "networks.lora"
    """What trains it in kohya's sd-scripts."""
    implementation: str = "diffusers"
    """Whose names of layers kohya's form has."""


def _sdxl(config: Any) -> Base:
    implementation = "https://github.com/Stability-AI/generative-models"
    return Base("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", implementation=implementation)


def _stable_diffusion_3(config: Any) -> Base:
    """3 medium normalises no queries and keys; 3.5 large has no block with a second attention."""
    architecture = "stable-diffusion-3"
    if config is not None:
        newer = "stable-diffusion-3.5-medium" if config.dual_attention_layers else "stable-diffusion-3.5-large"
        architecture = newer if config.qk_norm else "stable-diffusion-3-medium"
    return Base("sd3", architecture, module="networks.lora_sd3")


def _flux(config: Any) -> Base:
    """dev is told the guidance that it was distilled with, schnell is not."""
    variant = "" if config is None else "-dev" if config.guidance_embeds else "-schnell"
    implementation = "https://github.com/black-forest-labs/flux"
    return Base("flux1", f"flux-1{variant}", module="networks.lora_flux", implementation=implementation)


def _flux_2(config: Any) -> Base:
    """klein 4B has 24 heads, 9B 32."""
    variant = "" if config is None else "-klein-4b" if config.num_attention_heads == 24 else "-klein-9b"
    return Base("flux2", f"flux-2{variant}")


FAMILIES: Mapping[str, Callable[[Any], Base]] = {
    "stable_diffusion_xl": _sdxl,
    "stable_diffusion_3": _stable_diffusion_3,
    "flux": _flux,
    "flux_2": _flux_2,
}
"""By family, of the denoiser's config; None: an adapter of text encoders alone does not come with it."""
CLASSES = {
    "SD3Transformer2DModel": "stable_diffusion_3",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux_2",
}
"""The family by the denoiser's class, where the header names none."""
WIDTHS = {
    768: Base("sd_v1", "stable-diffusion-v1", side=512),
    1024: Base("sd_v2", "stable-diffusion-v2-512", v2=True, side=512),
    2048: _sdxl(None),
}
"""By the width of the text that a UNet attends to: Stable Diffusion 1 and 2, and wherever no family is named."""
V2_768 = Base("sd_v2", "stable-diffusion-v2-768-v", v2=True, side=768)
OTHER = Base("", "stable-diffusion-v1", side=512)
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


def of(path: Path, header: Header, adapter: Adapter, pairs: Mapping[str, Pair], form: str = "kohya") -> dict[str, str]:
    """The metadata of the file `path`; a function of the adapter, its header, the form and the file's name.

    A1111 knows a file by `ss_output_name`, so that is the file's own name.
    """
    base = _base(header, adapter)
    side, trigger = header.resolution or base.side, header.trigger()
    alphas = {network: _alpha(header, adapter, network, form) for network in keys.by_network(pairs)}
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": base.implementation if form == "kohya" else "diffusers",
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
        "ss_network_module": base.module,
        "ss_network_dim": _common(pair.rank for pair in pairs.values()),
        "ss_network_alpha": _common(
            alphas[network] * pairs[names[0]].rank for network, names in keys.by_network(pairs).items()
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
    other = recipe.get("optimizer", "adamw") != "adamw"
    facts["ss_optimizer"] = str(recipe["optimizer"]) if other else f"torch.optim.adamw.AdamW({','.join(arguments)})"
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
    denoiser = next((one.module for one in adapter.networks.values() if one.role == "denoiser"), None)
    family = header.family if header.family in FAMILIES else CLASSES.get(type(denoiser).__name__)
    if family is not None:
        return FAMILIES[family](getattr(denoiser, "config", None))
    for network in adapter.networks.values():
        config: Any = getattr(network.module, "config", None)
        name = "cross_attention_dim" if network.role == "denoiser" else "hidden_size"
        found = WIDTHS.get(getattr(config, name, 0))
        if found is not None:
            if network.prefix("kohya").startswith(("lora_te1", "lora_te2")):
                return _sdxl(None)
            return V2_768 if found.v2 and header.prediction_type == "v_prediction" else found
    return OTHER


def _alpha(header: Header, adapter: Adapter, network: str, form: str) -> float:
    """alpha / rank as the file has it: with the ramp in kohya's form, 1 where the factors have all of it in them."""
    if form != "kohya":
        return 1.0
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
