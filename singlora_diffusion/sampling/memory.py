"""How much memory sampling takes, estimated before anything is allocated. Meant to err on the large side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models import Family
    from ..models.stored import Stored

TENSORS_DECODING = 6
"""Feature maps at full size that live at once in the autoencoder's last block: input, normalised, activated, the
convolution's workspace and output, skip connection. Measured on Stable Diffusion 1.5: 4 to 5.5."""
TENSORS_DENOISING = 48
"""The same for the denoiser, in its first block's size and width: hidden states, skip connections that wait for the way
up, query, key, value and output of attention, the wide layers of its feed-forward part, workspaces. Measured: 43."""
BYTES_PER_RESULT = 32  # of a pixel: three channels as float32 twice over while a batch is put together, then as bytes


def of_sampling(family: Family, height: int, width: int, batch_size: int) -> int:
    """Bytes that sampling a batch takes beside the weights: its largest moment, of the denoiser or the autoencoder.

    Images of a batch are denoised together, each with and without its prompt, and decoded one by one in float32.
    """
    from ..models.family import denoiser

    pixels = height * width
    decoder = TENSORS_DECODING * _width(family.vae, 1) * pixels * 4
    latents = pixels // 4 ** (len(family.vae.config.block_out_channels) - 1)
    denoising = (
        TENSORS_DENOISING * _width(denoiser(family).module, 0) * latents * family.dtype.itemsize * 2 * batch_size
    )
    return max(decoder, denoising) + BYTES_PER_RESULT * pixels * batch_size


def of_weights(stored: Stored, itemsize: float) -> int:
    """Bytes of a base model's weights once they are loaded: numbers in `itemsize` bytes, the autoencoder's in 4.

    What cannot be read counts as nothing: loading says better what is wrong with it.
    """
    from ..models import hub, parts, single_file

    if stored.file is None:
        used = [part for part in stored.path.iterdir() if part.name not in hub.UNUSED]
        found = {part.name: sum(_numbers(file) for file in parts.weights(part)[0]) for part in used}
    else:
        found = single_file.numbers(stored.file)
    return sum(int(count * (4 if name == "vae" else itemsize)) for name, count in found.items())


def _numbers(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return 0


def _width(module: Any, level: int) -> int:
    """Channels of a network's feature maps, counted from its full size downwards; of a transformer its one width."""
    config = module.config
    channels = getattr(config, "block_out_channels", None)
    if channels is None:
        return int(config.num_attention_heads * config.attention_head_dim)
    return int(channels[min(level, len(channels) - 1)])
