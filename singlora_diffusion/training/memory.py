"""How much memory a training takes beside the base model, found out before it is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import adapters, device
from ..adapters import METHODS, targets
from ..models.family import denoiser
from ..sampling import memory as sampling_memory
from .recipe import Recipe

if TYPE_CHECKING:
    from ..adapters.config import AdapterConfig
    from ..models import Family

BYTES_PER_PARAMETER = 16  # float32: itself, its gradient, AdamW's two moments
CHECKPOINTED = 8
"""How many times less a step keeps with gradient checkpointing: the inputs of the blocks, and all of one block. Stable
Diffusion 1.5's widest block holds a sixth of the whole; meant to let pass what might fit."""


def require(family: Family, config: AdapterConfig, recipe: Recipe, resolution: int) -> None:
    """Refuse what cannot fit. An adapter is attached on the way, and taken out again.

    Raises:
        UserError: the adapter, a batch, or a batch of previews or class images needs more than is free; or the adapter
            cannot be attached.
    """
    where, settings = str(family.device), recipe.optimization
    device.require(of_adapter(family, config), where, f"--rank {config.rank}")
    together = _sampled_at_once(recipe)
    also = f" and --sample_batch_size {recipe.prior.sample_batch_size}" if together > 1 else ""
    needed = sampling_memory.of_sampling(family, resolution, resolution, together)
    device.require(needed, where, f"--resolution {resolution}{also}")
    examples = settings.train_batch_size * (2 if recipe.prior.with_prior_preservation else 1)
    adapter = adapters.attach(family.networks, config)
    needed = of_step(family, resolution, examples) // (CHECKPOINTED if settings.gradient_checkpointing else 1)
    adapter.detach()
    device.require(needed, where, f"--resolution {resolution} and --train_batch_size {settings.train_batch_size}")


def of_adapter(family: Family, config: AdapterConfig) -> int:
    """Bytes of an adapter in training.

    Raises:
        UserError: targets that the model does not have.
    """
    method, resolved = METHODS[config.method], targets.resolved(config, family.networks)
    count = 0
    for name, layers in targets.chosen(family.networks, resolved).items():
        rank = resolved.for_role(family.networks[name].role)[0]
        count += sum(method.count(resolved, rank, layer.out_features, layer.in_features) for layer in layers.values())
    return count * BYTES_PER_PARAMETER


def of_step(family: Family, resolution: int, examples: int) -> int:
    """Bytes that a forward pass keeps for its backward pass: counted on a small input, and grown with the area.

    The adapter must be attached: without it, nothing is kept.
    """
    network = denoiser(family)
    inputs = network.sample_inputs()
    own = {tensor.untyped_storage().data_ptr() for tensor in network.module.parameters() if _is_plain(tensor)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _is_plain(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = network.module(**inputs)[0]
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    return round(total * examples * _latents(family, resolution) / prediction.numel())


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own; torchao's packed weights consist of others."""
    return type(tensor.data) is Tensor


def _latents(family: Family, resolution: int) -> int:
    """Numbers in the latents of an image."""
    small = family.encode_images(torch.zeros(1, 3, family.multiple, family.multiple)).mean
    return small.numel() * (resolution // family.multiple) ** 2


def _sampled_at_once(recipe: Recipe) -> int:
    """Images that are sampled together, for previews or of the class; at least the one that is encoded."""
    counts = [1]
    if recipe.prior.with_prior_preservation and recipe.prior.num_class_images:
        counts.append(recipe.prior.num_class_images)
    if 0 < recipe.validation.validation_steps <= recipe.optimization.max_train_steps:
        counts.append(recipe.validation.num_validation_images)
    return min(recipe.prior.sample_batch_size, max(counts))
