"""The denoising loss."""

from __future__ import annotations

from torch import Tensor


def loss(
    prediction: Tensor,
    target: Tensor,
    *,
    prior: int = 0,
    prior_weight: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error, plus `prior_weight` times that of the last `prior` examples, which show the class.

    DreamBooth (Ruiz et al. 2022, arXiv 2208.12242), equation 2.

    Args:
        prediction, target: (N, C, h, w); the difference is taken in float32.
        weights: (N,) per-example weights, as `Family.loss_weights` has them.
        mask: (N, 1, h, w), how much each place counts in the mean of its example; its scale does not matter.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        error = error.flatten(1).mean(dim=1)
    else:
        error = (error * mask).flatten(1).mean(dim=1) / mask.flatten(1).mean(dim=1)
    if weights is not None:
        error = error * weights
    if not prior:
        return error.mean()
    return error[:-prior].mean() + prior_weight * error[-prior:].mean()
