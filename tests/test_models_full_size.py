"""The published models at full size, from their configurations alone: parameters, adapted layers, trained numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from singlora_diffusion import models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.targets import chosen, resolved

T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def clip(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


CLIP_L, CLIP_BIG_G = clip(768, 12, 12), clip(1280, 32, 20)

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 32}


def klein(double: int, single: int, heads: int, width: int, mlp: int) -> dict[str, dict[str, Any]]:
    return {
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "num_layers": double,
            "num_single_layers": single,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * width,
            "guidance_embeds": False,
        },
        "text_encoder": {**QWEN3, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 36},
    }


CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "StableDiffusionXLPipeline": {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_BIG_G,
    },
    "StableDiffusion3Pipeline": {  # 3.5 medium
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_BIG_G,
        "text_encoder_3": T5_XXL,
    },
    "FluxPipeline": {  # dev
        "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
    },
    "Flux2KleinPipeline 4B": klein(5, 20, 24, 2560, 9728),
    "Flux2KleinPipeline 9B": klein(8, 24, 32, 4096, 12288),
}
"""By the pipeline's class, and what tells two of one class apart."""

PARAMETERS = {  # the denoisers'
    "StableDiffusionXLPipeline": 2_567_463_684,
    "StableDiffusion3Pipeline": 2_243_171_520,
    "FluxPipeline": 11_901_408_320,
    "Flux2KleinPipeline 4B": 3_875_544_576,
    "Flux2KleinPipeline 9B": 9_078_581_248,
}

ADAPTED = [  # targets; layers, LoRA's and SingLoRA's trained parameters at rank 8, all in the denoiser
    ("StableDiffusionXLPipeline", None, 560, 11_612_160, 6_287_360),
    ("StableDiffusion3Pipeline", None, 191, 4_694_016, 2_347_008),
    ("StableDiffusion3Pipeline", ("attention+attn2",), 243, 5_971_968, 2_985_984),
    ("FluxPipeline", ("to_q", "to_k", "to_v", "to_out.0"), 190, 9_338_880, 4_669_440),
    ("FluxPipeline", ("attention+mlp",), 342, 22_413_312, 14_008_320),  # the targets of diffusers' script
    ("Flux2KleinPipeline 4B", None, 60, 8_355_840, 6_881_280),
    ("Flux2KleinPipeline 9B", None, 80, 13_893_632, 11_272_192),
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for pipeline, parts in CONFIGS.items():
        folder = Path(tmp_path_factory.mktemp(pipeline.split()[0]))
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline.split()[0]}))
        for name, config in parts.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(config))
        found[pipeline] = models.meta_networks(folder)
    return found


@pytest.mark.parametrize("pipeline", PARAMETERS)
def test_parameters(pipeline: str, networks: dict[str, Any]) -> None:
    denoiser = next(iter(networks[pipeline].values()))
    assert sum(p.numel() for p in denoiser.module.parameters()) == PARAMETERS[pipeline]


@pytest.mark.parametrize(("pipeline", "targets", "count", "lora", "singlora"), ADAPTED)
def test_adapted_layers(
    pipeline: str,
    targets: tuple[str, ...] | None,
    count: int,
    lora: int,
    singlora: int,
    networks: dict[str, Any],
) -> None:
    config = resolved(AdapterConfig(targets=targets), networks[pipeline])
    (layers,) = chosen(networks[pipeline], config).values()
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    assert (len(shapes), 8 * sum(map(sum, shapes)), 8 * sum(map(max, shapes))) == (count, lora, singlora)


@pytest.mark.parametrize("pipeline", CONFIGS)
def test_text_encoders(pipeline: str, networks: dict[str, Any]) -> None:
    """`text_targets` None: both CLIPs, neither T5 nor Qwen3."""
    adapted = chosen(networks[pipeline], resolved(AdapterConfig(text_targets=None), networks[pipeline]))
    text = {name: len(layers) for name, layers in adapted.items() if name.startswith("text")}
    large = {} if pipeline == "FluxPipeline" else {"text_encoder_2": 128}
    assert text == ({} if pipeline.startswith("Flux2") else {"text_encoder": 48} | large)
