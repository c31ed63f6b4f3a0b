"""A whole model of a family, small enough for every test: random weights, saved as diffusers saves a real one.

    python -m benchmarks.make_tiny stable_diffusion_xl runs/tiny-xl

Widths of text and image differ, so that weights are square, wide and tall.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from singlora_diffusion.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer, Qwen2TokenizerFast, T5Config, T5TokenizerFast

WORDS = """a an photo picture of sks zwx dog cat toy bear teapot the in on with red blue green snow beach grass house"""
CONTEXT = 24  # tokens
RESOLUTION = 32


@dataclass(frozen=True)
class Settings:
    """Write a tiny model of a family, with random weights, as a diffusers folder."""

    family: Positional[str]
    """stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux or flux_2."""
    output_dir: Positional[Path]
    """A folder that does not exist yet."""
    seed: int = 0
    """Of the weights."""


def stable_diffusion() -> DiffusionPipeline:
    """Images (3, 32, 32), latents (4, 8, 8), noise-predicting, hidden states (24, 48)."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    words = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config(words, 48)),
        tokenizer=words,
        unet=UNet2DConditionModel(
            sample_size=RESOLUTION // 4,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=48,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    """As `stable_diffusion`, with hidden states (24, 16 + 32), pooled (32,) and six sizes."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config(words, 16)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(words, 32)),
        tokenizer=words,
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=UNet2DConditionModel(
            sample_size=RESOLUTION // 4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            norm_num_groups=8,
        ),
        scheduler=noise_schedule(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> DiffusionPipeline:
    """As 3.5 medium, with a block of two attentions: hidden states (24 + 24, 64), pooled (16 + 24,)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    words, pieces = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(words, 16)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(words, 24)),
        text_encoder_3=T5EncoderModel(t5_config(pieces, 64)),
        tokenizer=words,
        tokenizer_2=clip_tokenizer(pad_token="!"),
        tokenizer_3=pieces,
        transformer=SD3Transformer2DModel(
            sample_size=RESOLUTION // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            dual_attention_layers=(0,),
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> DiffusionPipeline:
    """As FLUX.1 dev: images (3, 32, 32), latents (4, 8, 8), 16 patches, hidden states (24, 40), pooled (24,)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    words, pieces = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(words, 24)),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5_config(pieces, 40)),
        tokenizer_2=pieces,
        transformer=FluxTransformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=40,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def flux_2() -> DiffusionPipeline:
    """As FLUX.2 klein base: images (3, 32, 32), latents (16, 4, 4), hidden states (48, 3 * 16)."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=28,  # the pipeline reads the 9th, 18th and 27th
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=64,
                pad_token_id=words.pad_token_id,
                eos_token_id=words.eos_token_id,
            )
        ),
        tokenizer=words,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "flux_2": flux_2,
}


def build(family: str, seed: int = 0) -> Any:
    """The stock pipeline of a family with random weights, in eval mode; torch's own generator stays where it was.

    Raises:
        UserError: no such family.
    """
    import torch

    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}: there are {', '.join(FAMILIES)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FAMILIES[family]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # T5 has dropout
    return pipeline


def autoencoder(**settings: Any) -> AutoencoderKL:
    """Images (3, 32, 32) to latents (4, 8, 8)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
        **settings,
    )


def noise_schedule() -> Any:
    """Stable Diffusion's, noise-predicting."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def clip_tokenizer(**special: str) -> CLIPTokenizer:
    """CLIP's kind; `WORDS` are one token each, others fall back to their letters."""
    from singlora_diffusion.toyworld.architecture import tokenizer

    made = tokenizer(WORDS.split())
    made.model_max_length = CONTEXT
    for name, token in special.items():
        setattr(made, name, token)
    return made


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Two layers of a text encoder that reads the tokens of `tokenizer`."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """T5's kind, a unigram model: `WORDS` are one token each, others fall back to their letters."""
    from transformers import T5TokenizerFast

    letters = [(letter, -4.0) for letter in ("▁", *"abcdefghijklmnopqrstuvwxyz")]
    words = [(f"▁{word}", -2.0) for word in WORDS.split()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=[*special, *letters, *words], extra_ids=0, model_max_length=CONTEXT)


def t5_config(tokenizer: T5TokenizerFast, width: int) -> T5Config:
    """Two layers of a text encoder that reads the tokens of `tokenizer`."""
    from transformers import T5Config

    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
    )


def qwen_tokenizer() -> Qwen2TokenizerFast:
    """Qwen's kind: bytes, with `WORDS` as further tokens and a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2TokenizerFast(vocab=vocabulary, merges=[], model_max_length=2 * CONTEXT)
    made.add_special_tokens({"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens([text for word in WORDS.split() if len(word) > 1 for text in (word, f" {word}")])
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if not enable_thinking %}<|im_start|>{% endif %}"
    )
    return made


def make(settings: Settings) -> Path:
    """Write the folder.

    Raises:
        UserError: no such family, or `output_dir` exists.
    """
    if settings.output_dir.exists():
        raise UserError(f"{settings.output_dir} exists: choose another folder")
    pipeline = build(settings.family, settings.seed)
    from singlora_diffusion.models.quiet import quiet

    with quiet():
        pipeline.save_pretrained(settings.output_dir, safe_serialization=True)
    return settings.output_dir


def main() -> int:
    """The program; exit code 2 with one line for what the user can mend."""
    import tyro

    settings = tyro.cli(Settings, prog="python -m benchmarks.make_tiny", use_underscores=True)
    try:
        out = make(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: a tiny {settings.family}, {sum(file.stat().st_size for file in out.rglob('*.*')) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
