"""CLIP scores against other people's code, given the same weights: transformers' CLIP and torchmetrics' CLIPScore."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from encoder_folders import clip_folder
from PIL import Image

from eval.encoders import encoder
from eval.metrics import clipscore, mean_cosine, paired_cosine

TEXTS = ["a dog in the snow", "a cat", "a red vase on the beach"]
AGREE = 1e-4


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One tiny CLIP of random weights, as a folder for us and as a folder of transformers; three images."""
    folder = tmp_path_factory.mktemp("clip")
    ours = clip_folder(folder / "ours", seed=3)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    return SimpleNamespace(ours=ours, theirs=transformers_folder(ours, folder / "theirs"), images=images)


def transformers_folder(source: Path, folder: Path) -> Path:
    """The model of an open_clip folder as transformers has it."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    told = json.loads((source / "open_clip_config.json").read_text())
    model, image = told["model_cfg"], told["preprocess_cfg"]
    text, vision = model["text_cfg"], model["vision_cfg"]
    tokenizer = CLIPTokenizer.from_pretrained(source)
    shared = {"hidden_act": "gelu", "projection_dim": model["embed_dim"]}
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **shared,
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        projection_dim=model["embed_dim"],
    )
    theirs = CLIPModel(config).eval()
    weights = dict(renamed(load_file(source / "open_clip_model.safetensors")))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    theirs.save_pretrained(folder)
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = CLIPImageProcessor(
        size={"shortest_edge": vision["image_size"]}, crop_size=side, image_mean=image["mean"], image_std=image["std"]
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


TOPS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """From open_clip's names to transformers'."""
    for name, tensor in weights.items():
        if name in TOPS:
            yield TOPS[name], tensor
        elif name == "text_projection":
            yield "text_projection.weight", tensor.T.contiguous()
        elif name == "visual.proj":
            yield "visual_projection.weight", tensor.T.contiguous()
        elif "resblocks." in name:
            before, _, after = name.partition("resblocks.")
            number, _, rest = after.partition(".")
            where = f"{'vision_model' if before.startswith('visual') else 'text_model'}.encoder.layers.{number}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{where}.self_attn.{letter}_proj.{kind}", part.contiguous()
            else:
                inside, _, kind = rest.rpartition(".")
                yield f"{where}.{INSIDE[inside]}.{kind}", tensor


def ours(same: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    made = encoder("custom", "clip", str(same.ours))
    assert made.texts is not None
    return made.images(same.images), made.texts(TEXTS)


@pytest.mark.numerical
def test_transformers_clip(same: SimpleNamespace) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(same.theirs).eval(), CLIPProcessor.from_pretrained(same.theirs)
    given = processor(text=TEXTS, images=same.images, return_tensors="pt", padding="max_length")
    with torch.inference_mode():
        found = model(**given)
    images, texts = ours(same)
    assert np.allclose(images, found.image_embeds.numpy(), atol=AGREE)
    assert np.allclose(texts, found.text_embeds.numpy(), atol=AGREE)
    logits = (found.logits_per_image / model.logit_scale.exp().item()).numpy()
    assert np.allclose(paired_cosine(images, texts), np.diag(logits), atol=AGREE)
    vectors = found.image_embeds.numpy()
    between = (vectors @ vectors.T).mean(axis=1)
    assert np.allclose(mean_cosine(images, images), between, atol=AGREE)


def plain(found: Any) -> Any:
    return getattr(found, "pooler_output", found)


@pytest.mark.numerical
def test_torchmetrics_clip_score(same: SimpleNamespace) -> None:
    multimodal = pytest.importorskip("torchmetrics.multimodal", reason="torchmetrics is not installed")
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(same.theirs).eval(), CLIPProcessor.from_pretrained(same.theirs)
    older = SimpleNamespace(  # transformers 5 wraps what torchmetrics 1.9 wants plain
        config=model.config,
        get_image_features=lambda *a, **k: plain(model.get_image_features(*a, **k)),
        get_text_features=lambda *a, **k: plain(model.get_text_features(*a, **k)),
        to=lambda device: older,
    )
    images, texts = ours(same)
    expected = 100 * np.maximum(paired_cosine(images, texts), 0)
    for image, text, score in zip(same.images, TEXTS, expected, strict=True):
        metric = multimodal.CLIPScore(lambda: (older, processor))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert float(metric(pixels, text)) == pytest.approx(score, abs=100 * AGREE)
    assert np.allclose(clipscore(images, texts), expected / 40, atol=AGREE)
