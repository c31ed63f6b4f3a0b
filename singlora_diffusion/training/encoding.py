"""Images and prompts as the base model encodes them, or as a cache has them from an earlier run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data.encoding_cache import EncodingCache
from ..models.family import Conditioning, Family, Latents
from .events import Remark
from .recipe import Recipe


class Encoder:
    """A base model's autoencoder and text encoders, asked for what the cache does not have.

    What comes out is the same bits either way: latents are kept as distributions, and prompts are encoded one by one.

    Args:
        recipe: names the cache's folder, or none.
    """

    def __init__(self, family: Family, recipe: Recipe) -> None:
        self.family, self.quantize = family, recipe.model.quantize
        self.cache = EncodingCache(recipe.data.encodings_dir)

    def encode_images(self, pixels: Tensor) -> Latents:
        """As `Family.encode_images`, on the CPU. Known by the pixels, so by whatever was done to the image before."""
        key = {
            "pixels": hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(),
            "shape": list(pixels.shape),
            "vae": self.family.vae_fingerprint,
            "device": self.family.device.type,  # others round otherwise
        }

        def make() -> dict[str, Tensor]:
            mean, std = self.family.encode_images(pixels)
            return {"mean": mean.cpu().contiguous(), "std": std.cpu().contiguous()}

        return Latents(**self.cache.get("latents", key, make))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """As `Family.encode_prompts`, on the family's device, for text encoders that are not trained."""
        each = [self._prompt(prompt) for prompt in prompts]
        together = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        return Conditioning(together).to(self.family.device)

    def remarks(self) -> Iterator[Remark]:
        """What is to be said of the cache so far."""
        for line in self.cache.remarks():
            yield Remark(line)

    def _prompt(self, prompt: str) -> dict[str, Tensor]:
        key = {
            "prompt": prompt,
            "text_encoders": self.family.text_fingerprint,
            "quantize": self.quantize,
            "dtype": str(self.family.dtype),
            "device": self.family.device.type,
        }

        @torch.no_grad()
        def make() -> dict[str, Tensor]:
            encoded = self.family.encode_prompts([prompt])
            return {name: tensor.cpu().contiguous() for name, tensor in encoded.tensors.items()}

        return self.cache.get("prompt", key, make)
