"""`--learning_rate auto`: short trainings from one start, each at a rate of its own, and which of the rates is taken.

A rate is judged by what it costs: the loss on fixed noise, of held-out images where there are any, and how far the
predictions for the class prompt have left the base model's. Nothing of a trial is left but its figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator

from .. import adapters, settings
from ..data.latents import EncodedImage
from ..errors import UserError
from ..models import Family
from . import held_out
from .diagnosis import NotFinite
from .events import Event, Progress, Remark
from .examples import Batch, Streams
from .preparation import usual_rate, with_class
from .recipe import Recipe, adapter_config
from .step import Stepper

SHARE, AT_LEAST = 0.1, 10
"""A trial takes this share of the training's steps, and so many at least: a longer training likes a lower rate."""
FACTOR = 10**0.5
"""Between neighbouring rates."""
LEAST, MOST = 3, 7
"""Trials."""


class Cost(NamedTuple):
    """Of a rate, after its trial; infinite where the numbers did not stay finite."""

    subject: float
    """The loss on images of the subject."""
    prior: float
    """The mean squared change of the predictions for the class."""

    @property
    def total(self) -> float:
        return self.subject + self.prior


Trial = Generator[Event, None, Cost]


def settled(
    recipe: Recipe,
    accelerator: Accelerator,
    family: Family,
    streams: Streams,
    class_prompt: str,
    others: Sequence[EncodedImage] | None,
) -> Generator[Event, None, Recipe]:
    """The recipe with a number for its learning rate: with `auto`, that which was found.

    Args:
        others: held-out images of the subject.

    Raises:
        UserError: the numbers stayed finite at none of the rates.
    """
    if recipe.optimization.learning_rate != "auto":
        return recipe
    streams = with_class(recipe, family, streams, class_prompt)
    images = streams.instance.images if others is None else others

    def trial(rate: float) -> Trial:
        return _trial(_of_trial(recipe, rate), accelerator, family, streams, images)

    costs = yield from climb(trial, usual_rate(recipe, family))
    best = cheapest(costs)
    if not math.isfinite(costs[best].total):
        raise UserError("--learning_rate auto: the numbers stayed finite at no rate: give one")
    yield Remark(reason(best, costs, steps(recipe), "training" if others is None else "held-out"))
    return settings.replaced(recipe, learning_rate=best)


def steps(recipe: Recipe) -> int:
    """Of a trial."""
    return max(AT_LEAST, round(SHARE * recipe.optimization.max_train_steps))


def climb(trial: Callable[[float], Trial], start: float) -> Generator[Event, None, dict[float, Cost]]:
    """Costs by rate: of `start`, and of the rates above it, else those below, until one costs more than the last."""
    costs = {start: (yield from trial(start))}
    for direction in (1, -1):
        for place in itertools.count(1):
            rate = float(f"{start * FACTOR ** (direction * place):.3g}")
            if len(costs) == MOST:
                return costs
            costs[rate] = yield from trial(rate)
            if cheapest(costs) != rate:
                break
        if cheapest(costs) != start:
            break
    return costs


def cheapest(costs: Mapping[float, Cost]) -> float:
    """Of equal ones, the lowest rate."""
    return min(costs, key=lambda rate: (costs[rate].total, rate))


def reason(best: float, costs: Mapping[float, Cost], steps: int, images: str) -> str:
    """The choice in a line."""
    told = ", ".join(f"{rate:g}: {cost.subject:.4g} + {cost.prior:.4g}" for rate, cost in sorted(costs.items()))
    return (
        f"learning rate {best:g}: after {steps} steps it has the lowest loss on {images} images + change of the class "
        f"({told})"
    )


def _of_trial(recipe: Recipe, rate: float) -> Recipe:
    """At its peak rate from the first step on; too short to be worth compiling for."""
    return settings.replaced(recipe, learning_rate=rate, lr_scheduler="constant", lr_warmup_steps=0, compile=False)


def _trial(
    recipe: Recipe,
    accelerator: Accelerator,
    family: Family,
    streams: Streams,
    images: Sequence[EncodedImage],
) -> Trial:
    config, last = adapter_config(recipe), steps(recipe)
    if config.ramp_steps:
        config = replace(config, ramp_steps=min(config.ramp_steps, last // 2))  # a trial ends at its full strength
    scaler = accelerator.scaler
    scaling = scaler.state_dict() if scaler is not None else {}
    adapter = adapters.attach(family.networks, config, recipe.optimization.seed)
    try:
        stepper = Stepper(accelerator, family, adapter, recipe, streams)
        stepper.prepare()
        try:
            what = f"trying the learning rate {recipe.optimization.learning_rate:g}"
            for step in range(1, last + 1):
                yield Progress(what, step - 1, last)
                stepper.advance(step)
            yield Progress(what, last, last)
            size = recipe.optimization.train_batch_size
            return _cost(stepper, list(held_out.batches(stepper.examples, images, size)))
        except NotFinite:
            yield Progress(what, last, last)
            return Cost(math.inf, math.inf)
        finally:
            stepper.release()
    finally:
        adapter.detach()
        accelerator.free_memory()  # it would keep every model and optimizer that it was given
        if scaler is not None:
            scaler.load_state_dict(scaling)


def _cost(stepper: Stepper, batches: list[Batch]) -> Cost:
    """The same in all processes, or they would go on at different rates."""
    found = [stepper.loss_on(batches), stepper.loss_on(map(stepper.lesson, batches))]
    if stepper.accelerator.num_processes > 1:
        found = stepper.accelerator.reduce(torch.tensor(found, device=stepper.accelerator.device), "mean").tolist()
    return Cost(*(value if math.isfinite(value) else math.inf for value in found))
