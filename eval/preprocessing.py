"""From an image to an encoder's input, as the encoder was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, normalise."""

    resize: int  # pixels of the shorter side
    crop: int  # pixels, the centre square
    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """RGB image -> (3, crop, crop) float32. Rounds as torchvision's Resize and CenterCrop do on PIL images."""
        width, height = image.size
        if width > height:
            size = (int(self.resize * width / height), self.resize)
        else:
            size = (self.resize, int(self.resize * height / width))
        if size != image.size:
            image = image.resize(size, _RESAMPLING[self.interpolation])  # Pillow antialiases
        left, top = (round((side - self.crop) / 2) for side in size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels: NDArray[np.float32] = np.asarray(image, dtype=np.float32) / np.float32(255)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def of_open_clip(config: Mapping[str, Any], path: Path) -> Preprocessing:
    """What an open_clip_config.json says.

    Args:
        path: of the file, for messages.

    Raises:
        UserError: it describes no model, or a way that is not supported.
    """
    try:
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        image = config.get("preprocess_cfg", {})
        mode = image.get("resize_mode", "shortest")
        return _checked(image, size, 1.0, CLIP_MEAN, CLIP_STD, {"resize_mode": (mode, ("shortest",))}, path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: describes no open_clip model ({escaped(repr(error), 60)})") from error


def of_timm(config: Mapping[str, Any], path: Path) -> Preprocessing:
    """What a timm model's config.json says; `path` and errors as `of_open_clip`."""
    try:
        image = config.get("pretrained_cfg", config)
        size, crop = image.get("input_size", (3, 224, 224))[-1], image.get("crop_pct", 1.0)
        return _checked(image, size, crop, IMAGENET_MEAN, IMAGENET_STD, {}, path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: describes no timm model ({escaped(repr(error), 60)})") from error


def _checked(
    config: Mapping[str, Any],
    size: Any,
    crop_fraction: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    only: dict[str, tuple[Any, tuple[str, ...]]],
    path: Path,
) -> Preprocessing:
    """Of the entries in a configuration, each with its default; `only`: entries and the values that are supported."""
    interpolation = config.get("interpolation", "bicubic")
    for name, (value, supported) in {**only, "interpolation": (interpolation, tuple(_RESAMPLING))}.items():
        if value not in supported:
            raise UserError(f"{path}: {name} {escaped(value, 40)} is not supported, only {' or '.join(supported)}")
    sides = {int(side) for side in ([size] if isinstance(size, int) else size)}
    if len(sides) != 1 or not 1 <= (crop := sides.pop()) <= 4096:
        raise UserError(f"{path}: an input size of {escaped(size, 40)} is not supported")
    if not 0.1 <= crop_fraction <= 1:
        raise ValueError("crop_pct")
    mean, std = (tuple(float(value) for value in config.get(name, own)) for name, own in (("mean", mean), ("std", std)))
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError("mean or std")
    return Preprocessing(int(crop / crop_fraction), crop, mean, std, interpolation)
