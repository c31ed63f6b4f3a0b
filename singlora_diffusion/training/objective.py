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
) -> Tensor:
    """Mean squared error, plus `prior_weight` times that of the last `prior` examples, which show the class.

    DreamBooth (Ruiz et al. 2022, arXiv 2208.12242), equation 2.

    Args:
        prediction, target: (N, C, h, w); the difference is taken in float32.
        weights: (N,) per-example weights, such as `min_snr`.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    if weights is not None:
        error = error * weights
    if not prior:
        return error.mean()
    return error[:-prior].mean() + prior_weight * error[-prior:].mean()


def min_snr(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weights min(SNR, gamma) / SNR for noise and / (SNR + 1) for velocity prediction (arXiv 2303.09556), (N,)."""
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)
