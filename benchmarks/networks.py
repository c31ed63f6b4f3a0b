"""What the benchmarks run on: networks of real shapes with random weights, and random inputs for them.

The frozen UNet stands there twice, over the same weights: `stock` as diffusers builds it, `prepared` as a model loaded
by this package has it. Off the CPU the two do the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from . import published

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

Model = Literal["sd15", "sdxl", "tiny"]
Precision = Literal["bfloat16", "float16", "float32"]


@dataclass
class Bench:
    """What all variants share."""

    stock: Any
    prepared: Any
    latents: Tensor  # (N, 4, h, w) float32, standing for cached ones
    text: Tensor  # (N, 77, D) in the compute dtype, standing for cached ones
    extra: dict[str, Any]  # further arguments of the UNet
    shapes: list[tuple[int, int]]  # (out, in) of the adapted layers
    encoders: tuple[Any, Any] | None = None  # autoencoder, and text encoder or None

    @property
    def device(self) -> torch.device:
        return self.latents.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype

    def rank(self, method: str, budget: int) -> int:
        """The rank at which a line of budget.rows trains as many parameters as LoRA does at rank `budget`."""
        from singlora_diffusion.adapters import budget as budgets

        return budgets.match(budgets.count("lora", budget, self.shapes), method, self.shapes).rank


def tiny() -> nn.Module:
    """For trying the benchmark itself."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _published(model: str, part: str, kind: Any = None) -> Any:
    import torch

    return published.built(published.MODELS[model].parts[part], torch.get_default_dtype(), kind)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sd15": partial(_published, "sd15", "unet"),
    "sdxl": partial(_published, "sdxl", "unet"),
    "tiny": tiny,
}


def random_weights(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> Any:
    """The network, frozen: built without memory, then filled in `dtype` at once."""
    import torch

    with torch.device("meta"), published.made_as(dtype):
        network = build()
    network = network.to_empty(device=device).requires_grad_(False).eval()
    pool = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(device, dtype)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            bound = parameter[0].numel() ** -0.5
            for part in parameter.data.view(-1).split(len(pool)):
                torch.mul(pool[: len(part)], bound, out=part)
    return network


def prepare(model: Model, resolution: int, batch: int, precision: Precision, *, encoders: bool = False) -> Bench:
    """Networks and inputs for `batch` images of `resolution` pixels per side, on the accelerator where there is one.

    Args:
        encoders: make what encodes images and prompts as well.
    """
    import torch

    from singlora_diffusion.adapters import budget
    from singlora_diffusion.models import cpu_layers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision)
    unet = random_weights(MODELS[model], dtype, device)
    side = resolution // 8
    width = unet.config.cross_attention_dim
    prepared = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})
    cpu_layers.prepare(prepared)
    extra: dict[str, Any] = {}
    if model == "sdxl":
        pooled = torch.randn(batch, 1280).to(device, dtype)
        size = torch.tensor([[resolution] * 2 + [0, 0] + [resolution] * 2] * batch)
        extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size.to(device)}
    return Bench(
        unet,
        prepared,
        torch.randn(batch, 4, side, side).to(device),
        torch.randn(batch, 77, width).to(device, dtype),
        extra,
        budget.shapes({"unet": unet}, TARGETS),
        ENCODERS[model](dtype, device) if encoders else None,
    )


def _sd15_encoders(dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from transformers import CLIPTextModel

    text_encoder = _published("sd15", "text_encoder", CLIPTextModel).to(device, dtype).requires_grad_(False).eval()
    return random_weights(partial(_published, "sd15", "vae"), dtype, device), text_encoder


def _sdxl_encoders(dtype: torch.dtype, device: str) -> tuple[Any, None]:
    """The autoencoder alone, which overflows in half precision: float32."""
    import torch

    return random_weights(partial(_published, "sdxl", "vae"), torch.float32, device), None


def _tiny_encoders(dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(text)
    for network in (vae, text_encoder):
        network.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return vae, text_encoder


ENCODERS: dict[str, Callable[[torch.dtype, str], tuple[Any, Any]]] = {
    "sd15": _sd15_encoders,
    "sdxl": _sdxl_encoders,
    "tiny": _tiny_encoders,
}
