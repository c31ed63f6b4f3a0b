"""Where the randomness of training comes from: (seed, position in the stream of examples), nothing else.

Because an example's noise, timestep and place in the shuffle depend only on its position in the global stream, the same
run comes out of one process or two, of one big batch or several accumulated ones, unbroken or resumed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..randomness import seeded

INSTANCE, PRIOR, HELD_OUT = 0, 1, 2  # streams: images of the subject, of its class, and those not trained on
TEXT = 3  # and the texts that text encoders read


class Draw(NamedTuple):
    """The randomness of a few examples."""

    noise: Tensor
    """(N, C, h, w) float32, what the latents are corrupted with."""
    latent_noise: Tensor
    """(N, C, h, w) float32, picks the latent out of the autoencoder's posterior."""
    quantile: Tensor
    """(N,) float64 in [0, 1), for `Family.times`."""
    flip: Tensor
    """(N,) bool."""
    offset: Tensor
    """(N, C, 1, 1) float32, the same all over a channel."""


def examples(seed: int, positions: Sequence[int], repeats: Sequence[int], stream: int = INSTANCE) -> list[int]:
    """Which images stand at these positions: every epoch is a fresh shuffle of all of them.

    Args:
        repeats: of each image, how often an epoch has it.
    """
    entries = np.repeat(np.arange(len(repeats)), repeats)
    shuffles: dict[int, np.ndarray] = {}
    chosen = []
    for position in positions:
        epoch, place = divmod(position, len(entries))
        if epoch not in shuffles:
            shuffles[epoch] = entries[np.random.default_rng((seed, stream, epoch)).permutation(len(entries))]
        chosen.append(int(shuffles[epoch][place]))
    return chosen


def bucketed(
    seed: int,
    positions: Sequence[int],
    repeats: Sequence[int],
    buckets: Sequence[Hashable],
    together: int,
    stream: int = INSTANCE,
) -> list[int]:
    """As `examples`, but a step shows images of one bucket only, in that bucket's own order.

    In as many steps as an epoch has examples, each bucket has as many steps as it has of these, in a fresh shuffle: so
    all images are seen as often as without buckets. With one bucket this is `examples`.

    Args:
        buckets: of each image.
        together: positions of a step.
    """
    weights = np.array(repeats) // np.gcd.reduce(repeats)
    entries = [bucket for bucket, weight in zip(buckets, weights, strict=True) for _ in range(weight)]
    chosen = []
    for position in positions:
        step, place = divmod(position, together)
        epoch, number = divmod(step, len(entries))
        order = np.random.default_rng((seed, stream, epoch, 4)).permutation(len(entries))
        bucket = entries[order[number]]
        earlier = epoch * entries.count(bucket) + sum(entries[entry] == bucket for entry in order[:number])
        members = [image for image, its in enumerate(buckets) if its == bucket]
        own = examples(seed, [earlier * together + place], [repeats[image] for image in members], stream)
        chosen.append(members[own[0]])
    return chosen


def caption(seed: int, position: int, stream: int = INSTANCE) -> tuple[float, float]:
    """Of one example, both in [0, 1): whether its caption is dropped, and the order of its tags.

    They have a generator of their own, so that noise and times are the same with captions and without.
    """
    dropped, order = np.random.default_rng((seed, stream, position, 1)).random(2)
    return float(dropped), float(order)


def mask(seed: int, position: int, stream: int = INSTANCE) -> int:
    """Of one example: a number of 32 bits, from which its dropout masks follow."""
    return int(np.random.SeedSequence((seed, stream, position, 2)).generate_state(1)[0])


def text_mask(seed: int, step: int, text: int) -> int:
    """As `mask`, of a text that is encoded for all examples of a step that have it."""
    return int(np.random.SeedSequence((seed, TEXT, step, text)).generate_state(1)[0])


def crop(seed: int, position: int, stream: int = INSTANCE) -> float:
    """Which crop an example has, in [0, 1). It has a generator of its own, as captions do."""
    return float(np.random.default_rng((seed, stream, position, 3)).random())


def draw(seed: int, positions: Sequence[int], shape: tuple[int, ...], stream: int = INSTANCE) -> Draw:
    """Noise, quantiles of the time and flips for the examples at these positions.

    Args:
        shape: of one latent, (C, h, w).
    """
    parts: list[tuple[Tensor, ...]] = []
    for position in positions:
        generator = seeded(int(np.random.SeedSequence((seed, stream, position)).generate_state(1)[0]))
        parts.append(
            (
                torch.randn(shape, generator=generator),
                torch.randn(shape, generator=generator),
                torch.rand((), generator=generator, dtype=torch.float64),
                torch.rand((), generator=generator) < 0.5,
                torch.randn((shape[0], 1, 1), generator=generator),
            )
        )
    return Draw(*(torch.stack(column) for column in zip(*parts, strict=True)))
