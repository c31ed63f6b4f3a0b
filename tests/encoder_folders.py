"""Tiny encoders of random weights, in the folder layouts of open_clip and timm."""

from __future__ import annotations

import json
from pathlib import Path


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A CLIP of 32-pixel images, 24 tokens and 16 dimensions, with its own tokenizer."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 512)]]
    vocabulary = {letter: index for index, letter in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    for word in ("<|startoftext|>", "<|endoftext|>"):  # the end mark has the highest id: CLIP finds it so
        vocabulary[word] = len(vocabulary)
    folder.mkdir(parents=True)
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24).save_pretrained(folder)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": len(vocabulary),
            "width": 32,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "tokenizer",
        },
    }
    image = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": image}))
    torch.manual_seed(seed)
    save_file(CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")  # type: ignore[arg-type]
    return folder


def timm_folder(folder: Path, seed: int = 0) -> Path:
    """A vision transformer of 32-pixel images and 24 dimensions."""
    import timm
    import torch
    from safetensors.torch import save_file

    arguments = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "num_features": 24,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
