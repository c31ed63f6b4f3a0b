"""Every model of toyworld as a configuration of a stock class out of diffusers, transformers, open_clip or timm."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        UNet2DConditionModel,
    )
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RESOLUTION = 64
LATENT_CHANNELS = 8
TEXT_WIDTH = (
    112  # between the UNet's 96 and 128: cross-attention then has wide and tall weights, self-attention square ones
)
CONTEXT = 24  # tokens

CLIP: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": RESOLUTION, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "width": 96, "heads": 4, "layers": 2},
}
DINO: dict[str, Any] = {
    "architecture": "xcit_nano_12_p8_224",  # patches come out of strided convolutions: learns shape from few images
    "model_args": {"img_size": RESOLUTION, "embed_dim": 128, "depth": 4, "num_heads": 4, "cls_attn_layers": 2},
}


def tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token; any other English word falls back to its letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            # As the tokenizer will: the oldest known pair first. A new pair ranks last, so earlier words stay whole.
            pair = min(pairs, key=lambda one: ranks.get(one, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            i = pairs.index(pair)
            symbols[i : i + 2] = ["".join(pair)]
            vocabulary.setdefault("".join(pair), len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocabulary, list(ranks), model_max_length=CONTEXT)


def autoencoder() -> AutoencoderKL:
    """64x64x3 to 16x16x8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
        scaling_factor=1.0,  # the scale is folded into the quant convolutions
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids (N, 24) to hidden states (N, 24, 112)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def unet() -> UNet2DConditionModel:
    """Latents (N, 8, 16, 16), attention at 8x8 and 4x4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def transformer() -> SD3Transformer2DModel:
    """Latents (N, 8, 16, 16) as 64 image tokens beside the text's; two text encoders side by side are its context."""
    from diffusers import SD3Transformer2DModel
    from torch import nn

    model = SD3Transformer2DModel(
        sample_size=RESOLUTION // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=64,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pos_embed_max_size=16,  # up to 128 pixels
        qk_norm="rms_norm",
    )
    # As DiT starts (arXiv 2212.09748): every block is the identity and the answer is zero.
    modulations = [module for name, module in model.named_modules() if name.endswith(".linear")]
    for module in (*modulations, model.proj_out):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return model


def projected(text_encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder as the class that Stable Diffusion 3 reads; its projection is the identity."""
    from torch import nn
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(text_encoder.config)
    model.text_model.load_state_dict(text_encoder.state_dict())
    nn.init.eye_(model.text_projection.weight)
    return model


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from noise to latents, without a shift of the times: the latents are small."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def clip(vocabulary: int) -> nn.Module:
    """open_clip's CLIP with a small convolutional image tower."""
    from open_clip import CLIP as OpenClip

    return OpenClip(**{**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": vocabulary}})


def dino() -> nn.Module:
    """timm's XCiT, a ViT variant the DINO authors used too, as a feature extractor: (N, 3, 64, 64) to (N, 128)."""
    import timm

    return timm.create_model(DINO["architecture"], pretrained=False, num_classes=0, **DINO["model_args"])
