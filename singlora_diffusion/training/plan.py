"""What a recipe comes to on this machine, found out before the training: one real step of it is measured."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import settings
from ..errors import UserError
from ..settings import replaced
from ..terminal import escaped
from . import material, run_folder
from .diagnosis import NotFinite, cause
from .events import Event, Images, Remark
from .recipe import Recipe, adapter_config, check, recorded

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..adapters.config import AdapterConfig
    from ..models import Family
    from .material import Material

QUICK = 5.0
"""A first step that took less seconds than this is measured again, without what only the first one does."""


@dataclass(frozen=True)
class Plan:
    """A training that has not been done."""

    recipe: dict[str, Any]
    """As recipe.json will have it."""
    base_model: str
    family: str
    device: str
    dtype: str
    """What the base model computes in."""
    resolution: int
    images: int
    """Instance images."""
    steps: int
    images_seen: int
    """Instance images, counted each time that one is learned from."""
    layers: int
    parameters: int
    """Trained numbers."""
    memory: int
    """Bytes that are needed at the most, by the base model, the adapter, and a step or previews. Where that is more
    than `free`, it may be even more."""
    free: int
    """Bytes that the device has for it."""
    seconds_per_step: float | None = None
    """None: it does not fit, so nothing was measured."""
    seconds: float | None = None
    """Of all steps, the search for a rate at its shortest, and encoding the images, without previews and class
    images."""
    remarks: tuple[str, ...] = ()
    """What the user should know, a line each."""

    @property
    def file_size(self) -> int:
        """Bytes of the adapter's file, its header aside."""
        return 4 * self.parameters

    @property
    def fits(self) -> bool:
        return self.memory <= self.free

    def __str__(self) -> str:
        """A YAML file of the recipe, which --config takes, with the figures as comments below it."""
        import yaml

        figures = "\n".join(f"# {line}" for line in _lines(self))
        return f"{yaml.safe_dump(self.recipe, sort_keys=False, width=100_000)}\n{figures}"


def make(recipe: Recipe) -> Plan:
    """Load the base model, attach the adapter, do a step, and throw the adapter away. No file is written.

    Raises:
        UserError: something in the recipe or its files must be mended first.
    """
    steps = _make(recipe)
    remarks: list[str] = []
    while True:
        try:
            event = next(steps)
        except StopIteration as end:
            return replace(end.value, remarks=tuple(remarks))
        match event:
            case Remark(text):
                remarks.append(text)
            case Images(report):
                remarks += str(report).splitlines()[1:]


def _make(recipe: Recipe) -> Generator[Event, None, Plan]:
    check(recipe)
    found = yield from material.read(recipe)
    try:
        run_folder.check(recipe.output)
    except UserError as error:
        yield Remark(f"the training would be refused: {error}")

    from .. import device
    from . import memory, preparation

    recipe = preparation.on_this_machine(recipe)
    accelerator, family, resolution = yield from preparation.load(recipe)
    recipe = preparation.for_model(recipe, family)
    planned = recorded(recipe)
    recipe, before = yield from _with_a_rate(recipe, family)
    config = adapter_config(recipe)
    yield from preparation.cut_prompts(recipe, family, found)
    free = device.free_memory(str(family.device))
    needs = yield from _needs(recipe, family, config, resolution, free)
    parameters = memory.parameters(family, config)
    base, optimization = memory.of_base(family), recipe.optimization
    batch = optimization.train_batch_size * optimization.gradient_accumulation_steps * accelerator.num_processes
    plan = Plan(
        recipe=planned,
        base_model=family.source,
        family=family.name,
        device=str(family.device),
        dtype=str(family.dtype).removeprefix("torch."),
        resolution=resolution,
        images=len(found.instance),
        steps=optimization.max_train_steps,
        images_seen=optimization.max_train_steps * batch,
        layers=sum(len(layers) for layers in parameters.values()),
        parameters=sum(sum(layers.values()) for layers in parameters.values()),
        memory=base + needs[0] + max(needs[1:], default=0),
        free=base + free,
    )
    if not plan.fits:
        return plan
    sample = found.sample(prior=recipe.prior.with_prior_preservation and recipe.prior.num_class_images > 0)
    encoding, step, peak = yield from _measured(recipe, accelerator, family, resolution, sample)
    return replace(
        plan,
        memory=plan.memory if peak is None else max(peak, base + sum(needs[:2])),
        seconds_per_step=step,
        seconds=encoding * plan.images + step * (plan.steps + before),
    )


def _with_a_rate(recipe: Recipe, family: Family) -> Generator[Event, None, tuple[Recipe, int]]:
    """The recipe with a number for a rate, and the steps that a search for a better one does at least."""
    from .preparation import usual_rate
    from .rate_search import LEAST, MOST, steps

    if recipe.optimization.learning_rate != "auto":
        return recipe, 0
    rate, each = usual_rate(recipe, family), steps(recipe)
    yield Remark(
        f"--learning_rate auto: {LEAST} to {MOST} short trainings of {each} steps go before the first step, the first "
        f"of them at {rate:g}"
    )
    return settings.replaced(recipe, learning_rate=rate), LEAST * each


def _needs(
    recipe: Recipe, family: Family, config: AdapterConfig, resolution: int, free: int
) -> Generator[Event, None, list[int]]:
    """Bytes of what a training takes beside the base model, up to the first that does not fit."""
    from .. import device
    from . import memory

    found: list[int] = []
    for need in memory.needs(family, config, recipe, resolution):
        found.append(need.size)
        if need.size > free:
            yield Remark(f"{need.flags}: would need about {device.size(need.size)}, {device.size(free)} are free")
            break
    return found


class Measured(NamedTuple):
    encoding: float
    """Seconds, of an image."""
    step: float
    """Seconds."""
    peak: int | None
    """Bytes that the step took of a GPU, the base model's among them. None: the device does not count."""


def _measured(
    recipe: Recipe,
    accelerator: Accelerator,
    family: Family,
    resolution: int,
    found: Material,
) -> Generator[Event, None, Measured]:
    """
    Args:
        found: with one image, which stands in for all others.
    """
    import torch

    from .. import adapters
    from . import preparation
    from .step import Stepper

    began = time.perf_counter()
    streams = yield from preparation.encoded(replaced(recipe, encodings_dir=None), family, resolution, found)
    encoding = (time.perf_counter() - began) / (2 if streams.classes else 1)
    counts = family.device.type == "cuda"
    seconds = 0.0
    with ExitStack() as stack:
        adapter = adapters.attach(family.networks, adapter_config(recipe), recipe.optimization.seed)
        stack.callback(adapter.detach)
        stepper = Stepper(accelerator, family, adapter, recipe, streams)
        stack.callback(stepper.release)
        stepper.prepare()
        if counts:
            torch.cuda.reset_peak_memory_stats(family.device)
        for step in (1, 2):
            began = time.perf_counter()
            try:
                stepper.advance(step)  # which reads the loss, and so waits for the device
            except NotFinite as error:
                raise UserError(f"{error}; {cause(error, recipe)}") from error
            seconds = time.perf_counter() - began
            if seconds > QUICK:
                break
        peak = torch.cuda.max_memory_allocated(family.device) if counts else None
    return Measured(encoding, seconds, peak)


def _lines(plan: Plan) -> list[str]:
    """The figures for people."""
    from ..device import size

    each = plan.images_seen / plan.images
    lines = [
        f"base model: {escaped(plan.base_model, 1000)} ({plan.family}), {plan.dtype} on {plan.device}",
        f"trained: {plan.parameters:,} parameters in {plan.layers} layers, a file of {size(plan.file_size)}",
        f"steps: {plan.steps}, that is {plan.images_seen:,} images at {plan.resolution} px, each of the {plan.images} "
        f"seen {each:.3g} times on average",
        f"memory: {size(plan.memory)} of {size(plan.free)}" + ("" if plan.fits else ": does not fit"),
    ]
    if plan.seconds is not None:
        lines.append(
            f"time: {_clock(plan.seconds)}, {plan.seconds_per_step:.2f} s a step, previews and class images aside"
        )
    return lines


def _clock(seconds: float) -> str:
    """1:02:03, as the bars have it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
