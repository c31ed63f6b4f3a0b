"""How much memory a training takes beside the base model, found out before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

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
SAMPLES = (0, 1)
"""What `NetworkSpec.sample_inputs` holds: two examples."""
CHECKPOINTED = 8
"""How many times less a step keeps with gradient checkpointing: the inputs of the blocks, and all of one block. Stable
Diffusion 1.5's widest block holds a sixth of the whole; meant to let pass what might fit."""


class Need(NamedTuple):
    """Memory that a training takes beside the base model."""

    flags: str
    """What asks for it."""
    size: int
    """Bytes."""


def needs(family: Family, config: AdapterConfig, recipe: Recipe, resolution: int) -> Iterator[Need]:
    """What the adapter takes, sampling previews or class images, and a step: each is safe to ask for if the last fits.

    An adapter is attached on the way, and taken out again.

    Raises:
        UserError: the adapter cannot be attached.
    """
    settings = recipe.optimization
    yield Need(f"--rank {config.rank}", of_adapter(family, config))
    together = _sampled_at_once(recipe)
    also = f" and --sample_batch_size {recipe.prior.sample_batch_size}" if together > 1 else ""
    sampling = sampling_memory.of_sampling(family, resolution, resolution, together)
    yield Need(f"--resolution {resolution}{also}", sampling)
    examples = settings.train_batch_size * (2 if recipe.prior.with_prior_preservation else 1)
    adapter = adapters.attach(family.networks, config)
    with adapter.dropping({"denoiser": SAMPLES, "text": SAMPLES}):
        step = of_step(family, resolution, examples) // (CHECKPOINTED if settings.gradient_checkpointing else 1)
    adapter.detach()
    yield Need(f"--resolution {resolution} and --train_batch_size {settings.train_batch_size}", step)


def require(family: Family, config: AdapterConfig, recipe: Recipe, resolution: int) -> None:
    """Refuse what cannot fit.

    Raises:
        UserError: the adapter, a batch, or a batch of previews or class images needs more than is free; or the adapter
            cannot be attached.
    """
    for need in needs(family, config, recipe, resolution):
        device.require(need.size, str(family.device), need.flags)


def of_base(family: Family) -> int:
    """Bytes of the base model's weights, all parts of it."""
    from torch import nn

    parts = (part for part in family.pipeline().components.values() if isinstance(part, nn.Module))
    tensors = {tensor.data_ptr(): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def of_adapter(family: Family, config: AdapterConfig) -> int:
    """Bytes of an adapter in training.

    Raises:
        UserError: targets that the model does not have.
    """
    return BYTES_PER_PARAMETER * sum(sum(layers.values()) for layers in parameters(family, config).values())


def parameters(family: Family, config: AdapterConfig) -> dict[str, dict[str, int]]:
    """Network -> adapted layer -> trained numbers, before anything is attached.

    Raises:
        UserError: targets that the model does not have.
    """
    method, resolved = METHODS[config.method], targets.resolved(config, family.networks)
    counts: dict[str, dict[str, int]] = {}
    for name, layers in targets.chosen(family.networks, resolved).items():
        rank = resolved.for_role(family.networks[name].role)[0]
        counts[name] = {
            path: method.count(resolved, rank, layer.out_features, layer.in_features) for path, layer in layers.items()
        }
    return counts


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
