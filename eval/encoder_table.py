"""The encoders there are, and the protocols that use them.

A row of `ENCODERS` says an encoder's role, where its files come from, how images get to it and how it is loaded. A row
of `PROTOCOLS` names an encoder for each role:

- `dreambooth-v1`: OpenAI's CLIP ViT-B/32 (with QuickGELU, as it was trained), DINO ViT-S/16 and DINOv2 ViT-S/14.
  Images: shorter side to 224 pixels for CLIP and 256 for the others, bicubic with antialiasing, centre 224 x 224.
- `dreambench++`, `customconcept101`, `oft`, `peft-image-gen`: the encoders of other people's evaluations; what they do
  otherwise than `eval.metrics` stands in the row, for those who set the numbers beside theirs.
- `toyworld`: the small encoders that come with the embedded model.
- `custom`: whatever folders are named; preprocessing as their own configuration says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from singlora_diffusion.models.hub import WEIGHTS

from . import encoder_models
from .encoder_files import Files, OpenClipFolder, Published, TimmFolder
from .encoder_models import Model
from .preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocessing

ROLES = {"clip": "CLIP", "dino": "DINO", "dinov2": "DINOv2"}
"""What an encoder is to the metrics, each with its label; also the flag that names another one for it."""


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
