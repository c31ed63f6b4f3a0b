"""How much memory a training takes beside the base model, estimated before anything is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import device
from ..adapters import METHODS, targets
from ..sampling import memory
from .recipe import Recipe

if TYPE_CHECKING:
    from ..adapters.config import AdapterConfig
    from ..models import Family

BYTES_PER_PARAMETER = 16  # float32: itself, its gradient, AdamW's two moments
KEPT = 320
"""Feature maps of the denoiser's full size and first width that wait for the backward pass. Counted on Stable Diffusion
1.5 without the attention's weights, which are not kept."""
KEPT_CHECKPOINTED = 64
"""The same with gradient checkpointing."""


def require(family: Family, config: AdapterConfig, recipe: Recipe, resolution: int) -> None:
    """Refuse what cannot fit.

    Raises:
        UserError: an adapter, a batch, or a batch of previews or class images needs more than is free.
    """
    where, settings = str(family.device), recipe.optimization
    device.require(of_adapter(family, config), where, f"--rank {config.rank}")
    examples = settings.train_batch_size * (2 if recipe.prior.with_prior_preservation else 1)
    device.require(
        of_step(family, resolution, examples, checkpointed=settings.gradient_checkpointing),
        where,
        f"--resolution {resolution} and --train_batch_size {settings.train_batch_size}",
    )
    together = max(
        min(recipe.prior.num_class_images, recipe.prior.sample_batch_size) * recipe.prior.with_prior_preservation,
        min(recipe.validation.num_validation_images, recipe.prior.sample_batch_size)
        * (0 < recipe.validation.validation_steps <= settings.max_train_steps),
        1,  # images are encoded one by one
    )
    device.require(
        memory.of_sampling(family, resolution, resolution, together),
        where,
        f"--resolution {resolution} and --sample_batch_size {together}",
    )


def of_adapter(family: Family, config: AdapterConfig) -> int:
    """Bytes of an adapter in training.

    Raises:
        UserError: targets that the model does not have.
    """
    method, resolved = METHODS[config.method], targets.resolved(config, family.networks)
    count = 0
    for name, layers in targets.chosen(family.networks, resolved).items():
        rank = resolved.for_role(family.networks[name].role)[0]
        count += sum(method.count(resolved, rank, *layer.weight.shape) for layer in layers.values())
    return count * BYTES_PER_PARAMETER


def of_step(family: Family, resolution: int, examples: int, *, checkpointed: bool) -> int:
    """Bytes that a forward pass keeps for its backward pass, and the latents of the batch."""
    maps = KEPT_CHECKPOINTED if checkpointed else KEPT
    return maps * memory.feature_map(family, resolution, resolution) * examples
