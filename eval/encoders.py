"""Frozen encoders: pictures or texts -> unit vectors, remembered by content.

An encoder is a pair of plain functions, `images(list[PIL.Image]) -> (N, D)` and `texts(list[str]) -> (N, D)`, float32
rows of unit length. It is loaded when first called, so a run that finds all its vectors in the cache loads none.

The protocols say which encoder stands behind "clip" and "dino" and how a picture gets to it:

- `dreambooth-v1`: OpenAI's CLIP ViT-B/32 (with QuickGELU, as it was trained) and DINO ViT-S/16. Pictures: shorter side
  to 224 pixels for CLIP and 256 for DINO, bicubic with antialiasing, centre 224 x 224.
- `toyworld`: the small encoders that come with the embedded model.
- `custom`: whatever folders are named; preprocessing as their own configuration says.

Nothing is fetched but `dreambooth-v1`'s own weights and hub names that the user gave, and nothing stands in for what is
missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from singlora_diffusion.errors import UserError

from .encoder_files import Role, encoder_folder, packaged, read_json, sha256, weights_file

Vectors = NDArray[np.float32]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to an encoder's input."""

    resize: int  # pixels of the shorter side
    crop: int  # pixels, the centre square
    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """RGB picture -> (3, crop, crop) float32. Rounds as torchvision's Resize and CenterCrop do on PIL pictures."""
        width, height = picture.size
        if width > height:
            size = (int(self.resize * width / height), self.resize)
        else:
            size = (self.resize, int(self.resize * height / width))
        if size != picture.size:
            picture = picture.resize(size, _RESAMPLING[self.interpolation])  # Pillow antialiases
        left, top = (round((side - self.crop) / 2) for side in size)
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        pixels: NDArray[np.float32] = np.asarray(picture, dtype=np.float32) / np.float32(255)
        mean, std = np.array([self.mean, self.std], dtype=np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder. `about` holds all that changes a vector, and nothing else."""

    images: Callable[[list[Image.Image]], Vectors]
    texts: Callable[[list[str]], Vectors] | None
    preprocessing: Preprocessing
    about: dict[str, Any]
    source: str  # where the weights were found

    @property
    def fingerprint(self) -> str:
        """sha256 of `about`: two encoders with the same one give the same vectors."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Model:
    """A loaded encoder: tensors in, tensors out, not yet normalised."""

    images: Callable[[Any], Any]  # (N, 3, H, W) -> (N, D)
    texts: Callable[[list[str]], Any] | None = None


# --- the encoders ----------------------------------------------------------------------------------------------------


def openai_vit_b32(source: str | None, device: str, batch_size: int) -> Encoder:
    """OpenAI's CLIP ViT-B/32: weights from the hub, a folder or a safetensors file; the architecture is fixed."""
    weights = weights_file(source, "clip", "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")

    def load() -> _Model:
        import open_clip
        from torch import nn

        from .skip_init import ZeroStart

        name = "ViT-B-32-quickgelu"  # the plain name runs GELU with these weights, and says nothing for a local file
        with ZeroStart():
            model = open_clip.create_model(name, pretrained=str(weights), precision="fp32")
        activations = {type(module) for module in model.modules() if "GELU" in type(module).__name__}
        if nn.GELU in activations or len(activations) != 1:
            raise RuntimeError(f"OpenAI's CLIP needs QuickGELU, not {activations}")
        where = torch_device(device)
        model.to(where).eval()
        return _Model(model.encode_image, _texts_without_padding(model, open_clip.get_tokenizer(name), where))

    preprocessing = Preprocessing(224, 224, CLIP_MEAN, CLIP_STD)
    about = {
        "architecture": "ViT-B-32-quickgelu",
        "files": {"weights": sha256(weights)},
        "preprocessing": asdict(preprocessing),
    }
    return _encoder(load, preprocessing, about, weights, device, batch_size, has_texts=True)


def dino_vit_s16(source: str | None, device: str, batch_size: int) -> Encoder:
    """DINO ViT-S/16, the normalised class token: weights from the hub, a folder or a safetensors file."""
    weights = weights_file(source, "dino", "timm/vit_small_patch16_224.dino", "model.safetensors")

    def load() -> _Model:
        import timm
        from safetensors.torch import load_file

        from .skip_init import ZeroStart

        with ZeroStart():
            model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
        model.load_state_dict(load_file(weights), strict=True)
        return _Model(model.to(torch_device(device)).eval())

    # timm's own configuration crops 0.9 (resize to 248); DINO's authors resize to 256.
    preprocessing = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD)
    about = {
        "architecture": "vit_small_patch16_224.dino",
        "files": {"weights": sha256(weights)},
        "preprocessing": asdict(preprocessing),
    }
    return _encoder(load, preprocessing, about, weights, device, batch_size)


def clip_folder(source: str, device: str, batch_size: int) -> Encoder:
    """Any open_clip model: a folder or hub repository with open_clip_config.json, safetensors and its tokenizer."""
    folder = encoder_folder(source, "clip", ["open_clip_config.json", *_CLIP_WEIGHTS, *_TOKENIZER_FILES])
    config = read_json(folder / "open_clip_config.json")
    weights = next((folder / name for name in _CLIP_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(
            f"{folder}: has no {_CLIP_WEIGHTS[0]}, the weights of the CLIP encoder; pickled ones are not read"
        )
    try:
        size, width = config["model_cfg"]["vision_cfg"]["image_size"], config["model_cfg"]["embed_dim"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'open_clip_config.json'}: describes no open_clip model ({error} is missing)"
        ) from error
    picture = config.get("preprocess_cfg", {})
    if picture.get("resize_mode", "shortest") != "shortest":
        raise UserError(f"{folder}: resize_mode {picture['resize_mode']} is not supported, only shortest")

    def load() -> _Model:
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}", precision="fp32")
        return _clip_model(model, open_clip.get_tokenizer(f"local-dir:{folder}"), device)

    preprocessing = _preprocessing(folder, picture, size, 1.0, CLIP_MEAN, CLIP_STD)
    described_by = [name for name in ("open_clip_config.json", *_TOKENIZER_FILES) if (folder / name).is_file()]
    files = {"weights": sha256(weights), **{name: sha256(folder / name) for name in described_by}}
    about = {"architecture": f"CLIP of {width} dimensions", "files": files, "preprocessing": asdict(preprocessing)}
    return _encoder(load, preprocessing, about, folder, device, batch_size, has_texts=True)


def timm_folder(source: str, device: str, batch_size: int) -> Encoder:
    """Any timm model, its pooled features: a folder or hub repository with config.json and model.safetensors."""
    folder = encoder_folder(source, "dino", ["config.json", "model.safetensors"])
    config = read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{folder}: has no model.safetensors, the weights of the DINO encoder; pickled ones are not read"
        )
    if "architecture" not in config:
        raise UserError(f"{folder / 'config.json'}: describes no timm model (architecture is missing)")

    def load() -> _Model:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        return _Model(model.to(torch_device(device)).eval())

    picture = config.get("pretrained_cfg", config)
    size = picture.get("input_size", (3, 224, 224))[-1]
    preprocessing = _preprocessing(folder, picture, size, picture.get("crop_pct", 1.0), IMAGENET_MEAN, IMAGENET_STD)
    files = {"weights": sha256(weights), "config.json": sha256(folder / "config.json")}
    about = {"architecture": config["architecture"], "files": files, "preprocessing": asdict(preprocessing)}
    return _encoder(load, preprocessing, about, folder, device, batch_size)


@dataclass(frozen=True)
class Protocol:
    """One row of `PROTOCOLS`: makers of the two encoders. They are given a source, None for the protocol's own."""

    about: str
    clip: Callable[[str | None, str, int], Encoder]
    dino: Callable[[str | None, str, int], Encoder]


def _or_else(
    make: Callable[[str, str, int], Encoder], own: Callable[[], str]
) -> Callable[[str | None, str, int], Encoder]:
    return lambda source, device, batch_size: make(own() if source is None else source, device, batch_size)


def _unnamed(role: Role) -> str:
    raise UserError(f"protocol custom has no {role} encoder of its own; name one with --{role}")


PROTOCOLS: dict[str, Protocol] = {
    "dreambooth-v1": Protocol("OpenAI CLIP ViT-B/32 and DINO ViT-S/16", openai_vit_b32, dino_vit_s16),
    "toyworld": Protocol(
        "the small encoders of the embedded model: comparable among themselves only",
        clip=_or_else(clip_folder, functools.partial(packaged, "clip")),
        dino=_or_else(timm_folder, functools.partial(packaged, "dino")),
    ),
    "custom": Protocol(
        "encoders as named: comparable where they are the same",
        clip=_or_else(clip_folder, functools.partial(_unnamed, "clip")),
        dino=_or_else(timm_folder, functools.partial(_unnamed, "dino")),
    ),
}


def encoder(
    protocol: str, role: Role, source: str | None = None, *, device: str = "cpu", batch_size: int = 32
) -> Encoder:
    """The "clip" or "dino" encoder of a protocol. Finds and hashes its files; nothing is loaded yet.

    Args:
        protocol: a row of `PROTOCOLS`.
        source: a local path or a hub name, instead of where the protocol looks by itself.
        device: as for `torch_device`.
        batch_size: pictures or texts per forward pass; changes no vector beyond rounding.

    Raises:
        UserError: files that are missing or fit no encoder; it names them and where to get them.
    """
    row = PROTOCOLS[protocol]
    return (row.clip if role == "clip" else row.dino)(source, device, batch_size)


def _encoder(
    load: Callable[[], _Model],
    preprocessing: Preprocessing,
    about: dict[str, Any],
    source: Path,
    device: str,
    batch_size: int,
    has_texts: bool = False,
) -> Encoder:
    @functools.cache
    def model() -> _Model:
        try:
            return load()
        except (MemoryError, UserError):
            raise
        except Exception as error:  # the libraries raise many kinds on files that fit no model
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{source}: cannot be loaded as {about['architecture']} ({reason})") from error

    def images(pictures: list[Image.Image]) -> Vectors:
        import torch

        def tensors() -> Iterator[Any]:
            for batch in _batches(pictures, batch_size):
                inputs = np.stack([preprocessing(picture) for picture in batch])
                yield torch.from_numpy(inputs).to(torch_device(device))

        return _unit_vectors(model().images, tensors())

    def texts(lines: list[str]) -> Vectors:
        encode = model().texts
        assert encode is not None  # has_texts says so
        return _unit_vectors(encode, _batches(lines, batch_size))

    return Encoder(images, texts if has_texts else None, preprocessing, about, str(source))


def torch_device(name: str) -> str:
    """The device by its name in torch; "auto" is cuda where there is one, else cpu.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        raise UserError(f"device {name} is not to be had here; leave out --device to take what there is") from error
    return name


def _clip_model(model: Any, tokenizer: Callable[[list[str]], Any], device: str) -> _Model:
    where = torch_device(device)
    model.to(where).eval()
    # The evaluator's own tokenizer: a token that training added would move the end mark that CLIP reads at.
    return _Model(model.encode_image, lambda lines: model.encode_text(tokenizer(lines).to(where)))


def _texts_without_padding(model: Any, tokenizer: Callable[[list[str]], Any], where: str) -> Callable[[list[str]], Any]:
    """A causal CLIP's text encoder, as far as the longest line reaches: a fifth of the work for prompts of 14 tokens.

    CLIP reads a text at its end mark, and what is computed there depends on nothing that follows.
    """
    from torch.func import functional_call

    def encode(lines: list[str]) -> Any:
        tokens = tokenizer(lines).to(where)
        length = int(tokens.argmax(dim=-1).max()) + 1  # the end mark has the highest id
        shorter = {
            "positional_embedding": model.positional_embedding[:length],
            "attn_mask": model.attn_mask[:length, :length],
        }
        return functional_call(model, shorter, (), {"text": tokens[:, :length]})[1]  # of images, texts and their scale

    return encode


def _unit_vectors(encode: Callable[[Any], Any], batches: Iterable[Any]) -> Vectors:
    import torch

    with torch.inference_mode(), _exact_float32():
        parts = [torch.nn.functional.normalize(encode(batch).float(), dim=-1).cpu().numpy() for batch in batches]
    vectors: Vectors = np.concatenate(parts)
    if not np.isfinite(vectors).all():
        raise UserError("an encoder gives vectors that are not numbers; its weights are damaged")
    return vectors


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Convolutions on a GPU round to 10 bits by default, which moves the fourth decimal of a score."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _preprocessing(
    folder: Path,
    config: dict[str, Any],
    size: int | Sequence[int],
    crop_fraction: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Preprocessing:
    sides = {size} if isinstance(size, int) else set(size)
    interpolation = config.get("interpolation", "bicubic")
    if len(sides) != 1 or interpolation not in _RESAMPLING:
        raise UserError(f"{folder}: input size {size} with {interpolation} interpolation is not supported")
    crop = sides.pop()
    return Preprocessing(
        resize=int(crop / crop_fraction),
        crop=crop,
        mean=tuple(config.get("mean", mean)),
        std=tuple(config.get("std", std)),
        interpolation=interpolation,
    )
