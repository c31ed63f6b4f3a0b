"""The networks of published models as the config files of their folders describe them: shapes, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

Config = Mapping[str, Any]


class Model(NamedTuple):
    """A published model."""

    family: str
    pipeline: str
    parts: Mapping[str, Config]
    """Network by network, the denoiser first."""
    parameters: int
    """The denoiser's."""


def _clip(width: int, layers: int, heads: int, act: str = "gelu") -> Config:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
        "hidden_act": act,
    }


def _vae(channels: int, scale: float, shift: float | None = None, side: int = 1024) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "sample_size": side,
        "scaling_factor": scale,
        "shift_factor": shift,
        "use_quant_conv": shift is None,
        "use_post_quant_conv": shift is None,
    }


def _klein(double: int, single: int, heads: int, width: int, mlp: int) -> Mapping[str, Config]:
    return {
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "num_layers": double,
            "num_single_layers": single,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * width,
            "guidance_embeds": False,
        },
        "text_encoder": {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "vae": {"_class_name": "AutoencoderKLFlux2"},
    }


CLIP_L, CLIP_BIG_G = _clip(768, 12, 12, "quick_gelu"), _clip(1280, 32, 20)
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
MODELS: Mapping[str, Model] = {
    "sd15": Model(
        "stable_diffusion",
        "StableDiffusionPipeline",
        {
            "unet": {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
                "layers_per_block": 2,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,  # diffusers' name for the number of heads
            },
            "text_encoder": CLIP_L,
            "vae": _vae(4, 0.18215, side=512),
        },
        859_520_964,
    ),
    "sdxl": Model(
        "stable_diffusion_xl",
        "StableDiffusionXLPipeline",
        {
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
            "vae": _vae(4, 0.13025),
        },
        2_567_463_684,
    ),
    "sd35-medium": Model(
        "stable_diffusion_3",
        "StableDiffusion3Pipeline",
        {
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
            "vae": _vae(16, 1.5305, 0.0609),
        },
        2_243_171_520,
    ),
    "flux-dev": Model(
        "flux",
        "FluxPipeline",
        {
            "transformer": {
                "_class_name": "FluxTransformer2DModel",
                "num_layers": 19,
                "num_single_layers": 38,
                "guidance_embeds": True,
            },
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
            "vae": _vae(16, 0.3611, 0.1159),
        },
        11_901_408_320,
    ),
    "klein-4b": Model("flux_2", "Flux2KleinPipeline", _klein(5, 20, 24, 2560, 9728), 3_875_544_576),
    "klein-9b": Model("flux_2", "Flux2KleinPipeline", _klein(8, 24, 32, 4096, 12288), 9_078_581_248),
}
DEPTHS = ("num_layers", "num_single_layers")
"""How many blocks a transformer or T5 has; what FLUX.2 reads of Qwen3 lies too deep for fewer."""


def built(config: Config, dtype: Any, kind: Any = None, blocks: int | None = None, **changes: Any) -> Any:
    """A network of diffusers or transformers with random weights in `dtype`.

    Args:
        kind: its class; None: that of diffusers which the config names.
        blocks: at most so many of each kind of block.
        changes: to the config.
    """
    import diffusers

    wanted = {**config, **changes}
    if blocks is not None:
        wanted |= {name: min(blocks, wanted[name]) for name in DEPTHS if name in wanted}
    with made_as(dtype):
        if "_class_name" in wanted:
            return getattr(diffusers, wanted["_class_name"]).from_config(wanted)
        return kind(kind.config_class.from_dict(wanted))


@contextmanager
def made_as(dtype: Any) -> Iterator[None]:
    """Networks built inside have their weights in `dtype` from the start, so none is ever held in float32 besides."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
