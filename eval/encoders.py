"""Frozen encoders: images or texts -> unit vectors. Two tables say which there are and which a protocol uses.

An encoder is a pair of plain functions, `images(list[PIL.Image]) -> (N, D)` and `texts(list[str]) -> (N, D)`, float32
rows of unit length. It is loaded when first called, so a run that finds all its vectors in the store loads none.

A row of `ENCODERS` says an encoder's role, where its files come from, how images get to it and how it is loaded. A row
of `PROTOCOLS` names an encoder for each role:

- `dreambooth-v1`: OpenAI's CLIP ViT-B/32 (with QuickGELU, as it was trained), DINO ViT-S/16 and DINOv2 ViT-S/14.
  Images: shorter side to 224 pixels for CLIP and 256 for the others, bicubic with antialiasing, centre 224 x 224.
- `dreambench++`, `customconcept101`, `oft`, `peft-image-gen`: the encoders of other people's evaluations; what they do
  otherwise than `eval.metrics` stands in the row, for those who set the numbers beside theirs.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from singlora_diffusion import device as devices
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import sha256
from singlora_diffusion.models.hub import WEIGHTS
from singlora_diffusion.terminal import escaped

from . import encoder_models
from .encoder_files import Files, OpenClipFolder, Published, TimmFolder
from .encoder_models import Model
from .preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocessing

Vectors = NDArray[np.float32]

ROLES = {"clip": "CLIP", "dino": "DINO", "dinov2": "DINOv2"}
"""What an encoder is to the metrics, each with its label; also the flag that names another one for it."""


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
class EncoderRow:
    """One row of `ENCODERS`."""

    role: str  # of ROLES
    files: Files
    load: Callable[[Path, str, str], Model]  # path, architecture, device
    reads_texts: bool = False


ENCODERS: dict[str, EncoderRow] = {
    "openai-clip-vit-b32": EncoderRow(
        "clip",
        Published(
            "timm/vit_base_patch32_clip_224.openai",
            "open_clip_model.safetensors",
            "ViT-B-32-quickgelu",
            Preprocessing(224, 224, CLIP_MEAN, CLIP_STD),
        ),
        encoder_models.openai_clip,
        reads_texts=True,
    ),
    "dino-vit-s16": EncoderRow(
        "dino",
        Published(
            "timm/vit_small_patch16_224.dino",
            "model.safetensors",
            "vit_small_patch16_224.dino",
            # timm's own configuration crops 0.9 (resize to 248); DINO's authors resize to 256.
            Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD),
        ),
        encoder_models.timm_weights,
    ),
    "dinov2-vit-s14": EncoderRow(
        "dinov2",
        Published(
            "timm/vit_small_patch14_dinov2.lvd142m",
            "model.safetensors",
            "vit_small_patch14_dinov2.lvd142m",
            # timm's own configuration takes 518 pixels; DINOv2's authors evaluate at 224, resized to 256.
            Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD),
        ),
        functools.partial(encoder_models.timm_weights, img_size=224),
    ),
    "openai-clip-vit-l14": EncoderRow(
        "clip",
        Published(
            "timm/vit_large_patch14_clip_224.openai",
            "open_clip_model.safetensors",
            "ViT-L-14-quickgelu",
            Preprocessing(224, 224, CLIP_MEAN, CLIP_STD),
        ),
        encoder_models.openai_clip,
        reads_texts=True,
    ),
    "dino-vit-s8": EncoderRow(
        "dino",
        Published(
            "timm/vit_small_patch8_224.dino",
            "model.safetensors",
            "vit_small_patch8_224.dino",
            Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD),
        ),
        encoder_models.timm_weights,
    ),
    "dino-vit-s16-squashed": EncoderRow(
        "dino",
        Published(
            "timm/vit_small_patch16_224.dino",
            "model.safetensors",
            "vit_small_patch16_224.dino",
            Preprocessing(224, 224, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),  # transformers' old default: no crop
        ),
        encoder_models.timm_weights,
    ),
    "dinov2-vit-b14": EncoderRow(
        "dinov2",
        Published(
            "timm/vit_base_patch14_dinov2.lvd142m",
            "model.safetensors",
            "vit_base_patch14_dinov2.lvd142m",
            Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD),
        ),
        functools.partial(encoder_models.timm_weights, img_size=224),
    ),
    "clip-folder": EncoderRow("clip", OpenClipFolder(), encoder_models.open_clip_folder, reads_texts=True),
    "dino-folder": EncoderRow("dino", TimmFolder(), encoder_models.timm_folder),
    "dinov2-folder": EncoderRow("dinov2", TimmFolder(), encoder_models.timm_folder),
}


@dataclass(frozen=True)
class ProtocolRow:
    """One row of `PROTOCOLS`."""

    description: str
    encoders: Sequence[str]  # rows of ENCODERS, one for each role
    sources: Mapping[str, str] = field(default_factory=dict)
    """By role: where the protocol finds its encoders, if not where their own rows say."""
    pairs: str = "each generated image with each reference; means over images, then prompts, then subjects"
    """What is compared with what, and how it is averaged."""
    text: str = "the prompt without the identifier"
    """What CLIP-T reads."""
    scale: str = "cosine"
    """Of its published numbers; those here are cosines always."""
    differs: str = ""
    """What else moves its published numbers and is not done here."""

    @property
    def about(self) -> dict[str, str]:
        """All that is said of it in words."""
        words = ("description", "pairs", "text", "scale", "differs")
        return {name: getattr(self, name) for name in words}


_FOLDERS = ("clip-folder", "dino-folder", "dinov2-folder")

PROTOCOLS: dict[str, ProtocolRow] = {
    "dreambooth-v1": ProtocolRow(
        "OpenAI CLIP ViT-B/32, DINO ViT-S/16, DINOv2 ViT-S/14",
        ("openai-clip-vit-b32", "dino-vit-s16", "dinov2-vit-s14"),
    ),
    "dreambench++": ProtocolRow(
        "OpenAI CLIP ViT-B/32, DINO ViT-S/8, DINOv2 ViT-S/14",
        ("openai-clip-vit-b32", "dino-vit-s8", "dinov2-vit-s14"),
        pairs="each generated image with the one reference of its subject",
        text="the caption as it stands",
        scale="cosine x 100",
        differs="Its main scores are a language model's ratings; this is the automatic part.",
    ),
    "customconcept101": ProtocolRow(
        "OpenAI CLIP ViT-B/32, DINO ViT-S/16, DINOv2 ViT-S/14",
        ("openai-clip-vit-b32", "dino-vit-s16", "dinov2-vit-s14"),
        pairs="each generated image with each reference, all of a concept in one mean",
        text="the prompt as it stands",
        scale="cosine for images, 2.5 max(cosine, 0) for texts (the score clipscore here)",
        differs="On a GPU it computes in float16, which moves the third decimal.",
    ),
    "oft": ProtocolRow(
        "OpenAI CLIP ViT-L/14, DINO ViT-S/16 without a crop, DINOv2 ViT-S/14",
        ("openai-clip-vit-l14", "dino-vit-s16-squashed", "dinov2-vit-s14"),
        pairs="all pairs of all subjects in one mean, so that subjects with more references weigh more",
        text="the prompt with the identifier",
        differs="It drops images that are all black, and squashes images that are not square; here they are cropped.",
    ),
    "peft-image-gen": ProtocolRow(
        "OpenAI CLIP ViT-B/32, DINO ViT-S/16, DINOv2 ViT-B/14",
        ("openai-clip-vit-b32", "dino-vit-s16", "dinov2-vit-b14"),
        pairs="the i-th generated image with the i-th held-out one, of one subject",
        text="none",
        scale="cosine; drift (1 - cosine) / 2",
        differs="Its likeness is DINOv2's (the score dinov2 here).",
    ),
    "toyworld": ProtocolRow(
        "the small encoders of the embedded model: comparable among themselves only",
        _FOLDERS,
        {role: str(WEIGHTS / role) for role in ("clip", "dino")},
    ),
    "custom": ProtocolRow("encoders as named: comparable where they are the same", _FOLDERS),
}


def encoder(
    protocol: str, role: str, source: str | None = None, *, device: str | None = "cpu", batch_size: int = 32
) -> Encoder:
    """The encoder of a protocol for a role. Finds and hashes its files; nothing is loaded yet.

    Args:
        protocol: a row of `PROTOCOLS`.
        role: one of `ROLES`.
        source: a local path or a hub name, instead of where the protocol looks by itself.
        device: as `singlora_diffusion.device.choose` takes it; asked for when the encoder is loaded.
        batch_size: images or texts per forward pass; changes no vector beyond rounding.

    Raises:
        UserError: files that are missing or fit no encoder; it names them and where to get them.
    """
    chosen = PROTOCOLS[protocol]
    row = next(row for row in map(ENCODERS.__getitem__, chosen.encoders) if row.role == role)
    found = row.files.find(source or chosen.sources.get(role), role)
    about = {
        "architecture": found.architecture,
        "files": {name: sha256(path) for name, path in found.hashed.items()},
        "preprocessing": asdict(found.preprocessing),
    }

    where = functools.cache(lambda: devices.choose(device))  # imports torch

    @functools.cache
    def model() -> Model:
        try:
            return row.load(found.path, found.architecture, where())
        except (MemoryError, UserError):
            raise
        except Exception as error:  # the libraries raise many kinds on files that fit no model
            why = escaped(" ".join(str(error).split()), 200)
            raise UserError(f"{found.path}: cannot be loaded as {escaped(found.architecture)} ({why})") from error

    def images(batch: list[Image.Image]) -> Vectors:
        import torch

        def tensors() -> Iterator[Any]:
            for part in _batches(batch, batch_size):
                inputs = np.stack([found.preprocessing(image) for image in part])
                yield torch.from_numpy(inputs).to(where())

        return _unit_vectors(model().images, tensors())

    def texts(lines: list[str]) -> Vectors:
        encode = model().texts
        assert encode is not None  # reads_texts says so
        return _unit_vectors(encode, _batches(lines, batch_size))

    return Encoder(images, texts if row.reads_texts else None, found.preprocessing, about, str(found.path))


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
