"""Encoders in memory: how open_clip and timm load each kind. Tensors in, tensors out, not yet of unit length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """A loaded encoder."""

    images: Callable[[Any], Any]  # (N, 3, H, W) -> (N, D)
    texts: Callable[[list[str]], Any] | None = None  # N texts -> (N, D)


def openai_clip(weights: Path, architecture: str, device: str) -> Model:
    """OpenAI's CLIP from a safetensors file.

    Args:
        architecture: by open_clip's name, with -quickgelu: the plain name runs GELU with these weights, and says
            nothing about it for a local file.
    """
    import open_clip
    from torch import nn

    from .skip_init import SkipInit

    with SkipInit():
        model = open_clip.create_model(architecture, pretrained=str(weights), precision="fp32")
    activations = {type(module) for module in model.modules() if "GELU" in type(module).__name__}
    if nn.GELU in activations or len(activations) != 1:
        raise RuntimeError(f"OpenAI's CLIP needs QuickGELU, not {activations}")
    model.to(device).eval()
    return Model(model.encode_image, _texts_without_padding(model, open_clip.get_tokenizer(architecture), device))


def open_clip_folder(folder: Path, architecture: str, device: str) -> Model:
    """Any CLIP as its folder describes it. The evaluator's own tokenizer: a token that training added would move the
    end mark that CLIP reads at."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", precision="fp32").to(device).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return Model(model.encode_image, lambda lines: model.encode_text(tokenizer(lines).to(device)))


def timm_weights(weights: Path, architecture: str, device: str, **arguments: Any) -> Model:
    """A vision transformer of timm from a safetensors file: the class token after the last norm.

    Args:
        arguments: of `timm.create_model`. With an `img_size` that is not the one it was trained at, timm resamples the
            position embeddings, bicubic with antialiasing, once.
    """
    import timm

    from .skip_init import SkipInit

    with SkipInit():
        model = timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, num_classes=0, **arguments
        )
    return Model(model.to(device).eval())


def timm_folder(folder: Path, architecture: str, device: str) -> Model:
    """Any timm model as its folder describes it: its pooled features."""
    import timm

    return Model(timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).to(device).eval())


def _texts_without_padding(
    model: Any, tokenizer: Callable[[list[str]], Any], device: str
) -> Callable[[list[str]], Any]:
    """A causal CLIP's text encoder, as far as the longest line reaches: a fifth of the work for prompts of 14 tokens.

    CLIP reads a text at its end mark, and what is computed there depends on nothing that follows.
    """
    from torch.func import functional_call

    def encode(lines: list[str]) -> Any:
        tokens = tokenizer(lines).to(device)
        length = int(tokens.argmax(dim=-1).max()) + 1  # the end mark has the highest id
        shorter = {
            "positional_embedding": model.positional_embedding[:length],
            "attn_mask": model.attn_mask[:length, :length],
        }
        return functional_call(model, shorter, (), {"text": tokens[:, :length]})[1]  # of images, texts and their scale

    return encode
