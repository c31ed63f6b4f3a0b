"""Single-file checkpoints of Stable Diffusion 1, 2 and XL: all weights in one file, under the names of the first code.

diffusers loads them part by part. The configs and tokenizers that it would download are written from what the file and
the installed packages hold, so that no network is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..terminal import escaped
from . import clip_vocabulary
from . import single_file_configs as configs
from .hub import INDEX
from .single_file_configs import Config, Shapes

UNET, VAE, TEXT, TEXT_2 = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders."
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": (TEXT, f"{TEXT_2}0."),
    "text_encoder_2": (f"{TEXT_2}1.",),
}
"""How the names of a part's tensors begin, by its name in diffusers."""
EARLY = tuple(f"{TEXT}transformer.{part}." for part in ("embeddings", "encoder", "final_layer_norm"))
"""How the names of CLIP's tensors begin in early files: one level higher than in others."""
ASK = "unknown"
"""Stands for the prediction type of a model whose file does not say it: `asked` finds out."""
NOISE: Config = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""The noise schedule that all of them were trained with."""
DIFFUSERS_SAYS = "convert it with diffusers (from_single_file, save_pretrained) and give the folder"


class Contents(NamedTuple):
    """What the head of a safetensors file tells."""

    shapes: Shapes
    metadata: Mapping[str, str]


class Layout(NamedTuple):
    """A kind of checkpoint: the tensor that tells it from others, its pipeline, and the configs of its parts."""

    mark: str
    pipeline: str
    parts: Callable[[Contents], dict[str, Config]]


def _stable_diffusion_1(contents: Contents) -> dict[str, Config]:
    shapes = contents.shapes
    return {
        "unet": configs.unet(shapes, UNET, 64, heads=8),
        "vae": configs.autoencoder(shapes, VAE, 0.18215, 512),
        "text_encoder": configs.clip(shapes, f"{TEXT}transformer."),
        "scheduler": {"_class_name": "PNDMScheduler", **_prediction(contents, "epsilon")},
    }


def _stable_diffusion_2(contents: Contents) -> dict[str, Config]:
    shapes = contents.shapes
    prediction = _prediction(contents, ASK)
    side = 64 if prediction["prediction_type"] == "epsilon" else 96
    return {
        "unet": configs.unet(shapes, UNET, side),
        "vae": configs.autoencoder(shapes, VAE, 0.18215, 8 * side),
        "text_encoder": configs.open_clip(shapes, f"{TEXT}model.", last_but_one=True),
        "scheduler": {"_class_name": "DDIMScheduler", **prediction},
    }


def _stable_diffusion_xl(contents: Contents) -> dict[str, Config]:
    shapes = contents.shapes
    zero = {"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}
    return {
        "unet": configs.unet(shapes, UNET, 128),
        "vae": configs.autoencoder(shapes, VAE, 0.13025, 1024),
        "text_encoder": configs.clip(shapes, f"{TEXT_2}0.transformer."),
        "text_encoder_2": configs.open_clip(shapes, f"{TEXT_2}1.model.", last_but_one=False),
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler",
            "timestep_spacing": "trailing" if zero else "leading",
            **_prediction(contents, "epsilon"),
            **zero,
        },
    }


LAYOUTS = (
    Layout(f"{TEXT_2}1.model.positional_embedding", "StableDiffusionXLPipeline", _stable_diffusion_xl),
    Layout(
        f"{TEXT}transformer.text_model.embeddings.position_embedding.weight",
        "StableDiffusionPipeline",
        _stable_diffusion_1,
    ),
    Layout(f"{TEXT}model.positional_embedding", "StableDiffusionPipeline", _stable_diffusion_2),
)
OTHERS = {
    "lora_": "is a LoRA: give its base model here, and the LoRA to --adapter of singlora generate",
    "conditioner.embedders.0.model.": "is a Stable Diffusion XL refiner: adapters are for the base model",
    "double_blocks.": "holds a FLUX transformer, without its text encoders: give the diffusers folder of the model",
    "joint_blocks.": f"is a Stable Diffusion 3, whose text encoders are not all in single files: {DIFFUSERS_SAYS}",
    UNET: f"lacks the text encoders of a Stable Diffusion 1, 2 or XL: {DIFFUSERS_SAYS}",
    "down_blocks.": "is one network of a diffusers folder: give the folder that holds model_index.json",
}
"""What a part of a tensor's name says about a file that is none of these, in this order."""


@cache
def described(file: Path) -> Path:
    """A temporary folder with what diffusers' folders hold beside the weights, for as long as the program runs.

    Raises:
        UserError: the file is damaged, no checkpoint, or of a model that is not supported as a single file.
    """
    contents = read(file)
    if any(name.startswith("edm_") for name in contents.shapes):
        raise UserError(
            f"{escaped(file, 1000)} is of EDM's noise schedule (Playground 2.5, CosXL), which is not supported"
        )
    layout = next((one for one in LAYOUTS if one.mark in contents.shapes), None)
    if layout is None:
        raise UserError(f"{escaped(file, 1000)} {_what_it_is(contents)}")
    try:
        parts = layout.parts(contents)
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise UserError(
            f"{escaped(file, 1000)} is no complete checkpoint: it lacks {escaped(error, 100) or 'an attention'}"
        ) from error
    if parts["unet"]["in_channels"] != parts["vae"]["latent_channels"]:
        raise UserError(
            f"{escaped(file, 1000)} is an inpainting or editing model: its UNet takes "
            f"{parts['unet']['in_channels']} channels; give a text-to-image model"
        )
    return _written(layout.pipeline, parts)


def _usual(name: str) -> str:
    """A tensor's name as most files have it."""
    clip = f"{TEXT}transformer."
    return f"{clip}text_model.{name[len(clip) :]}" if name.startswith(EARLY) else name


def _what_it_is(contents: Contents) -> str:
    if "singlora" in contents.metadata:
        return "is an adapter: give its base model here, and the adapter to --adapter of singlora generate"
    said = (words for part, words in OTHERS.items() if any(part in name for name in contents.shapes))
    return next(said, "is no checkpoint of a Stable Diffusion 1, 2 or XL")


def _prediction(contents: Contents, otherwise: str) -> Config:
    """The noise schedule with what the denoiser predicts, as the file tells it in one of the usual ways."""
    said = contents.metadata.get("modelspec.prediction_type", "")
    kind = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(said, otherwise)
    return {**NOISE, "prediction_type": "v_prediction" if "v_pred" in contents.shapes else kind}


def read(file: Path) -> Contents:
    """
    Raises:
        UserError: no sound safetensors file.
    """
    shown = escaped(file, 1000)
    if file.suffix != ".safetensors":
        raise UserError(
            f"{shown} is no .safetensors file, and others are not read, as a .ckpt can run any code: where you trust "
            f"it, {DIFFUSERS_SAYS}"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {_usual(name): tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return Contents(shapes, dict(opened.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shown} is damaged or no safetensors file: {escaped(error, 160)}") from error


def _written(pipeline: str, parts: Mapping[str, Config]) -> Path:
    kept = TemporaryDirectory(prefix="singlora-")
    _KEPT.append(kept)
    folder = Path(kept.name)
    index: dict[str, Any] = {"_class_name": pipeline, "force_zeros_for_empty_prompt": True}
    for name, config in parts.items():
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        file.parent.mkdir()
        file.write_text(json.dumps(config), encoding="utf-8")
        index[name] = ["diffusers" if "_class_name" in config else "transformers", config.get("_class_name", "CLIP")]
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            padding = clip_vocabulary.END if parts[name]["hidden_act"] == "quick_gelu" else "!"
            tokenizer = name.replace("text_encoder", "tokenizer")
            clip_vocabulary.write(folder / tokenizer, parts[name]["max_position_embeddings"], padding)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder


_KEPT: list[TemporaryDirectory[str]] = []  # removed when the program ends


def network(kind: Any, file: Path, name: str, dtype: torch.dtype) -> Any:
    """One network out of a file, by diffusers' own conversion.

    Raises:
        ValueError: the file lacks tensors of it.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    config = str(described(file))
    with safe_open(file, framework="pt") as opened:
        names = [one for one in opened.keys() if one.startswith(PREFIXES[name])]  # noqa: SIM118
        tensors: dict[str, Tensor] = {_usual(one): opened.get_tensor(one) for one in names}
    options = {"config": config, "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    try:
        if issubclass(kind, diffusers.ModelMixin):
            module: Any = kind.from_single_file(tensors, **options)
        else:
            module = create_diffusers_clip_model_from_ldm(kind, tensors, **options)
    except (KeyError, NotImplementedError) as error:  # a layer that stayed without data cannot be moved
        raise ValueError(f"it lacks tensors of its {name}") from error
    missing = [one for one, tensor in module.named_parameters() if tensor.is_meta]
    if missing:
        raise ValueError(f"its {name} lacks {len(missing)} tensors, {missing[0]} for one")
    return module


def autoencoder(kind: Any, file: Path, described: Path) -> Any:
    """An autoencoder out of a file of its own or of a whole model, in float32.

    Args:
        described: a folder whose vae/config.json holds for it.

    Raises:
        ValueError: the file lacks tensors of it.
    """
    with safe_open(file, framework="pt") as opened:
        names = [*opened.keys()]
        inside = [name for name in names if name.startswith(PREFIXES["vae"])]
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in inside or names}
    options = {"config": str(described), "subfolder": "vae", "torch_dtype": torch.float32, "local_files_only": True}
    try:
        return kind.from_single_file(tensors, **options)
    except (KeyError, NotImplementedError) as error:
        raise ValueError("it lacks tensors of an autoencoder") from error


def numbers(file: Path) -> dict[str, int]:
    """How many numbers each part has, by its name in diffusers; moving averages and the like aside."""
    shapes = read(file).shapes.items()
    return {
        name: sum(math.prod(shape) for one, shape in shapes if one.startswith(prefixes))
        for name, prefixes in PREFIXES.items()
    }


@torch.no_grad()
def asked(unet: Any, scheduler: Any) -> Any:
    """The scheduler with the UNet's prediction type, where its file does not say it.

    At the last timestep there is hardly more than noise. A UNet that predicts noise gives its input back; one that
    predicts velocity gives the image, of which it sees nothing.
    """
    if scheduler.config.get("prediction_type") != ASK:
        return scheduler
    draw = torch.Generator().manual_seed(0)
    side, width = unet.config.sample_size // 2, unet.config.cross_attention_dim
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=draw).to(unet.device, unet.dtype)
    text = torch.zeros(1, 77, width, device=unet.device, dtype=unet.dtype)
    found = unet(noise, scheduler.config.num_train_timesteps - 1, text).sample
    likeness = torch.cosine_similarity(found.float().flatten(), noise.float().flatten(), dim=0)
    predicts_noise = bool(likeness > 0.5)
    unet.register_to_config(sample_size=64 if predicts_noise else 96)  # 2.0 and 2.1 come as 512-base and as 768-v
    kind = "epsilon" if predicts_noise else "v_prediction"
    return type(scheduler).from_config(scheduler.config, prediction_type=kind)
